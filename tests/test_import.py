"""The command `import`: a published checkpoint becomes a folder that every other command takes as a model."""

from __future__ import annotations

from pathlib import Path

import published_reference as ref
import pytest
import torch

import boxinst
from jobs import cli
from pipelines import storage


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("published") / "model_final.pth"
    torch.save({"model": ref.random_state(), "iteration": 1}, path)
    return str(path)


def test_a_checkpoint_becomes_a_model(
    checkpoint: str, tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nhot dog\nd\n\ne\n")
    out = tmp_path / "model"
    words = ["import", "--from", "adelaidet", checkpoint, "--out", str(out), "--classes", str(tmp_path / "names.txt")]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "warm-up's counter is left out" in shown
    assert "resnet50, 5 classes" in shown
    assert f"boxinst evaluate --mode detect --short-side 800 --model {out}" in shown
    model = boxinst.load(out)
    assert model.config.classes == ("a", "b", "hot dog", "d", "e")
    assert len(model.detect([torch.zeros(3, 40, 50, dtype=torch.uint8)])) == 1
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    assert cli.main([f"{s3}/model" if word == str(out) else word for word in words]) == 0
    assert set(storage.list_files(f"{s3}/model")) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "a", "b"], "--classes: 2 names, but"),
        ([], "5 classes, which are not COCO's 80"),
        (["--from", "mmdet", "--classes", "a", "b", "c", "d", "e"], "--from as its origin"),
    ],
)
def test_what_does_not_fit_is_said(
    checkpoint: str, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words if "--from" in words else ["--from", "adelaidet", *words]
    assert cli.main(["import", checkpoint, "--out", str(tmp_path / "model"), *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
