"""Mask rows: one for every box, through corrupt images, failing boxes, kills and storage of every kind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from rows import masks_of, rows_of

import boxinst
from boxinst import InputError
from pipelines import claims, storage
from pipelines.segment import SegmentConfig, run

SLOW = {"short_side": 384, "checkpoint_images": 1, "batch_size": 1}
"""Large enough in the network, and written often enough, that a run can be killed in its middle."""


@pytest.fixture(scope="module")
def unbroken(shards: dict[str, str], tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run that nothing disturbed, with COCO results beside it."""
    root = tmp_path_factory.mktemp("unbroken")
    run(SegmentConfig(tiny_model, shards["train"], str(root / "out"), coco=str(root / "results.json"), **SLOW))
    return root


def test_every_box_has_one_row(unbroken: Path, shards: dict[str, str]) -> None:
    given = rows_of(shards["train"]).to_pylist()
    expected = [(row["image_id"], a) for row in given for a in row["annotation_ids"]]
    rows = masks_of(str(unbroken / "out"))
    assert [(row["image_id"], row["annotation_id"]) for row in rows] == expected
    manifest = storage.read_manifest(str(unbroken / "out"), "masks")
    assert manifest.counts == {"images": 12, "boxes": len(expected), "ok": len(expected), "empty": 0, "errors": 0}
    assert manifest.source["shards_hash"] == storage.read_manifest(shards["train"], "shards").hash
    assert {row["model"] for row in rows} == {"tiny"} == {manifest.source["model"]}


def test_coco_results_are_read_by_pycocotools(unbroken: Path, corpus: Any) -> None:
    truth = COCO(corpus.train)
    found = truth.loadRes(str(unbroken / "results.json"))
    assert {a["annotation_id"] for a in found.anns.values()} == set(truth.anns)
    for entry in found.anns.values():
        own = truth.anns[entry["annotation_id"]]
        assert (entry["image_id"], entry["category_id"]) == (own["image_id"], own["category_id"])
        assert np.allclose(entry["bbox"], own["bbox"], atol=1e-3)


def test_a_finished_output_is_left_alone(
    unbroken: Path, shards: dict[str, str], tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (unbroken / "out").iterdir()}
    again = tmp_path / "again.json"
    config = SegmentConfig(tiny_model, shards["train"], str(unbroken / "out"), coco=str(again), **SLOW)
    assert run(config).hash == storage.read_manifest(str(unbroken / "out"), "masks").hash
    assert "nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (unbroken / "out").iterdir()} == before
    assert again.read_text() == (unbroken / "results.json").read_text()
    with pytest.raises(InputError, match=r"output folder: .*--overwrite"):
        run(replace(config, short_side=128))


def test_a_killed_run_ends_where_an_unbroken_one_does(
    unbroken: Path, shards: dict[str, str], tiny_model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = SegmentConfig(tiny_model, shards["train"], str(out), **SLOW)
    script = f"from pipelines.segment import SegmentConfig, run; run({config!r})"
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen([sys.executable, "-c", script], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and driver.poll() is None:
                records = [file.stem for file in out.glob("checkpoint/*.parquet")]
                if len([stem for stem in records if not stem.endswith(".pending")]) >= 2:
                    break
                time.sleep(0.02)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    written = {image for file in out.glob("parts/*.parquet") for image in pq.read_table(file)["image_id"].to_pylist()}
    assert 0 < len(written) < 12, (tmp_path / "log").read_text()
    assert not (out / "manifest.json").exists()

    with pytest.raises(InputError, match=r"--out: .* was begun with short_side 384\. .*--overwrite"):
        run(replace(config, short_side=128))
    parts = out.glob("parts/*.parquet")
    next(part for part in parts if {part.stem, part.stem.rpartition("-")[0]} & {*records}).unlink()  # as a bad disk may
    run(config)
    assert masks_of(str(out)) == masks_of(str(unbroken / "out"))
    assert storage.read_manifest(str(out), "masks").hash == storage.read_manifest(str(unbroken / "out"), "masks").hash
    assert {p.name for p in out.iterdir()} == {p.name for p in (unbroken / "out").iterdir()}


# Bad input


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with claims.held(out, "--out"), pytest.raises(InputError, match=r"--out: .* is being written by"):
        run(SegmentConfig("none", "none", out))


def test_bad_input_is_refused_before_any_work(shards: dict[str, str], tiny_model: str, tmp_path: Path) -> None:
    good = SegmentConfig(tiny_model, shards["val"], str(tmp_path / "out"))
    config = boxinst.load(tiny_model).config
    boxinst.save(boxinst.CondInst(replace(config, prompt=False)), tmp_path / "detector")
    boxinst.save(boxinst.CondInst(replace(config, classes=("other",))), tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    for change, message in [
        ({"model": str(tmp_path / "detector")}, r"--model: .*detector takes no boxes.*Train one"),
        ({"model": str(tmp_path / "other")}, r"model: .* has the classes other.*trained on these classes"),
        ({"model": "/no/model"}, r"model: /no/model\. There is no such folder"),
        ({"shards": "/no/shards"}, r"shards folder: /no/shards does not exist"),
        ({"out": str(tmp_path / "full")}, r"output folder: .*holds something else \(diary.txt\)"),
        ({"workers": 99}, r"--workers: 99.*at most"),
    ]:
        with pytest.raises(InputError, match=message):
            run(replace(good, **change))  # type: ignore[arg-type]
    for option in ("workers", "batch_size", "checkpoint_images"):
        with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: 0. Give 1 or more"):
            replace(good, **{option: 0})
    with pytest.raises(InputError, match=r"--short-side: -1\. Give"):
        replace(good, short_side=-1)
    with pytest.raises(InputError, match=r"--max-side: 100\. Give at least the short side, 800"):
        replace(good, short_side=800, max_side=100)
