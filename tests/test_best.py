"""pipelines.best: the best model stays, however many come after it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs
import pytest

import boxinst
from pipelines import best, storage
from pipelines.best import Best


@pytest.mark.parametrize("where", ["file", "s3"])
def test_the_best_model_is_kept(where: str, tiny_model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = str(tmp_path) if where == "file" else request.getfixturevalue("s3")
    fs, folder = storage.fs_path(f"{root}/runs/cells")
    made, model = Best(fs, folder), boxinst.load(tiny_model)
    kept = []
    for step, value in ((10, 0.5), (20, 0.7), (30, 0.6), (40, 0.7)):
        made.offer(model, step, {"box_iou": 1 - value, "mask_iou": value})
        assert best.recorded(fs, folder).get("step") != step  # the training does not wait for it
        if offered := made.take():
            offered.keep()
            kept.append(step)
    assert kept == [10, 20]
    assert best.recorded(fs, folder) == {"score": "mask_iou", "value": 0.7, "step": 20, "folder": "best_00000020"}
    found = fs.get_file_info(pafs.FileSelector(folder))
    assert sorted(info.base_name for info in found) == ["best.json", "best_00000020"]
    (tmp_path / "got").mkdir()
    pafs.copy_files(f"{folder}/best_00000020", str(tmp_path / "got"), source_filesystem=fs)
    assert boxinst.load(str(tmp_path / "got")).config == model.config

    again = Best(fs, folder)  # a run that goes on
    again.offer(model, 50, {"mask_iou": 0.65})
    again.offer(model, 60, {})  # a validation without masks or boxes
    assert again.take() is None
