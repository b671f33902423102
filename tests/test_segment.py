"""Mask rows: one for every box, through corrupt images, failing boxes, kills and storage of every kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools.coco import COCO

import boxinst
from boxinst import InputError, Instances, rle
from boxinst.metrics import mask_box_consistency
from pipelines import claims, inference, maskrows, storage
from pipelines.config import Resolution
from pipelines.maskrows import BoxMask
from pipelines.schema import MASK_SCHEMA, Category, Manifest
from pipelines.segment import SegmentConfig, run
from pipelines.segmenter import Segmenter

SLOW = {"short_side": 384, "checkpoint_images": 1, "batch_size": 1}
"""Large enough in the network, and written often enough, that a run can be killed in its middle."""


def rows_of(shards: str) -> pa.Table:
    manifest = storage.read_manifest(shards, "shards")
    return pa.concat_tables(pq.read_table(path) for path in storage.shard_files(shards, manifest))


def masks_of(out: str) -> list[dict[str, Any]]:
    manifest = storage.read_manifest(out, "masks")
    return [row for table in storage.row_groups(out, manifest) for row in table.to_pylist()]


def segmenter(folder: str, resolution: Resolution | None = None) -> Segmenter:
    return Segmenter(lambda: boxinst.load(folder), resolution or Resolution(0, 1333), "stored")


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Equal rows, but for the last digits that a batch of another size may change."""
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        for name, value in row.items():
            numbers = name in ("score", "box_iou", "spill", "fill")
            assert value == (pytest.approx(other[name], abs=1e-5) if numbers else other[name]), name


# The worker


def test_batched_equals_single(shards: dict[str, str], tiny_model: str) -> None:
    table = rows_of(shards["val"])
    worker = segmenter(tiny_model)
    single = [row for k in range(len(table)) for row in worker(table.slice(k, 1)).to_pylist()]
    assert_same(worker(table).to_pylist(), single)


def test_a_row_says_what_the_model_says(shards: dict[str, str], tiny_model: str) -> None:
    table = rows_of(shards["val"]).slice(0, 1)
    (given,) = table.to_pylist()
    (row,) = segmenter(tiny_model)(table).to_pylist()
    from pipelines import images

    pixels = torch.from_numpy(images.decode(given["image"])).permute(2, 0, 1)
    boxes = torch.tensor(given["boxes"])
    (wanted,) = boxinst.load(tiny_model).segment([pixels], [boxes])
    assert row["mask"] == rle.encode(wanted.masks)
    assert row["annotation_id"] == given["annotation_ids"]
    assert row["label"] == given["labels"]
    assert row["score"] == pytest.approx(wanted.scores.tolist())
    box_iou, spill, fill = mask_box_consistency(wanted.masks, boxes)
    assert row["box_iou"] == pytest.approx(box_iou.tolist())
    assert row["spill"] == pytest.approx(spill.tolist())
    assert row["fill"] == pytest.approx(fill.tolist())
    assert set(row["status"]) == {"ok"}


def test_a_corrupt_image_fails_alone(shards: dict[str, str], tiny_model: str) -> None:
    table = rows_of(shards["val"])
    rows = table.to_pylist()
    rows[1]["image"] = rows[1]["image"][: len(rows[1]["image"]) // 2]
    spoiled = segmenter(tiny_model)(pa.Table.from_pylist(rows, schema=table.schema)).to_pylist()
    good = segmenter(tiny_model)(table).to_pylist()
    assert_same(spoiled[:1] + spoiled[2:], good[:1] + good[2:])
    assert len(spoiled[1]["status"]) == len(rows[1]["boxes"])
    assert all(status.startswith("error: ") for status in spoiled[1]["status"])
    assert spoiled[1]["mask"] == [None] * len(rows[1]["boxes"])


class Fragile:
    """A model that fails on some boxes, and finds nothing in others."""

    def __init__(self, fails: float, empty: float) -> None:
        self.fails, self.empty = fails, empty

    def segment(self, images: list[torch.Tensor], boxes: list[torch.Tensor]) -> list[Instances]:
        found = []
        for image, given in zip(images, boxes, strict=True):
            if (given[:, 0] == self.fails).any():
                raise RuntimeError("out of\nluck")
            masks = torch.ones(len(given), *image.shape[1:], dtype=torch.bool)
            masks[given[:, 0] == self.empty] = False
            found.append(Instances(given, torch.ones(len(given)), torch.zeros(len(given)).long(), masks))
        return found


def test_a_failing_box_fails_alone_and_an_empty_mask_says_so(shards: dict[str, str]) -> None:
    table = rows_of(shards["val"])
    first, last = table.to_pylist()[0], table.to_pylist()[-1]
    fails, empty = first["boxes"][0][0], last["boxes"][0][0]
    found = Segmenter(lambda: Fragile(fails, empty), Resolution(0, 1333), "stored")(table).to_pylist()  # type: ignore[arg-type, return-value]
    for given, row in zip(table.to_pylist(), found, strict=True):
        for box, status, mask in zip(given["boxes"], row["status"], row["mask"], strict=True):
            wanted = {fails: "error: out of luck", empty: "empty"}.get(box[0], "ok")
            assert status == wanted
            assert (mask is not None) == (wanted == "ok")


class OneAtATime:
    """A model that notices when two threads use it."""

    def __init__(self) -> None:
        self.inside = self.most = 0

    def segment(self, images: list[torch.Tensor], boxes: list[torch.Tensor]) -> list[Instances]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        found = []
        for image, given in zip(images, boxes, strict=True):
            masks = torch.ones(len(given), *image.shape[1:], dtype=torch.bool)
            found.append(Instances(given, torch.ones(len(given)), torch.zeros(len(given)).long(), masks))
        self.inside -= 1
        return found


def test_threads_take_turns_at_the_model(shards: dict[str, str]) -> None:
    model = OneAtATime()
    worker = Segmenter(lambda: model, Resolution(0, 1333), "stored")  # type: ignore[arg-type, return-value]
    table = rows_of(shards["val"])
    batches = [table.slice(k % len(table), 1) for k in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(worker, batches))
    assert found == [worker(batch) for batch in batches]
    assert model.most == 1


class FirstWaitedFor(Fragile):
    """Its second call ends when the results of the first one are done."""

    def __init__(self) -> None:
        super().__init__(fails=-1, empty=-1)
        self.first_done, self.in_time, self.calls = threading.Event(), False, 0

    def segment(self, images: list[torch.Tensor], boxes: list[torch.Tensor]) -> list[Instances]:
        self.calls += 1
        if self.calls == 2:
            self.in_time = self.first_done.wait(20)
        return super().segment(images, boxes)


def test_what_the_model_has_given_is_worked_on_while_another_thread_has_the_model(shards: dict[str, str]) -> None:
    model = FirstWaitedFor()
    worker = Segmenter(lambda: model, Resolution(0, 1333), "stored")  # type: ignore[arg-type, return-value]
    table = rows_of(shards["val"])

    def work(number: int) -> None:
        if number:
            while not model.calls:
                time.sleep(0.001)
        worker(table.slice(0, 2))
        if not number:
            model.first_done.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert model.in_time


def test_many_boxes_come_in_pieces_with_the_same_masks(
    shards: dict[str, str], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = rows_of(shards["val"])
    for resolution in (Resolution(0, 1333), Resolution(64, 1333)):
        whole = segmenter(tiny_model, resolution)(table).to_pylist()
        monkeypatch.setattr(inference, "MASK_PIXELS", 2 * 96 * 96)
        assert_same(segmenter(tiny_model, resolution)(table).to_pylist(), whole)
        monkeypatch.setattr(inference, "MASK_PIXELS_OF_ONE", 2 * 96 * 96)
        assert_same(segmenter(tiny_model, resolution)(table).to_pylist(), whole)
        monkeypatch.undo()


def test_masks_come_back_in_the_pixels_of_the_image(shards: dict[str, str], tiny_model: str) -> None:
    table = rows_of(shards["val"])
    found = segmenter(tiny_model, Resolution(160, 1333))(table).to_pylist()
    for given, row in zip(table.to_pylist(), found, strict=True):
        masks = rle.decode(row["mask"], given["height"], given["width"])
        # The masks keep to the boxes as given, but for the pixel that resizing may blur.
        extent = rle.extent(row["mask"], given["height"], given["width"])
        boxes = torch.tensor(given["boxes"])
        assert masks.flatten(1).any(1).all()
        assert (extent[:, :2] >= boxes[:, :2].floor() - 1).all()
        assert (extent[:, 2:] <= boxes[:, 2:].ceil() + 1).all()


# Publishing


def part(image_id: int, masks: list[BoxMask]) -> dict[str, Any]:
    ids = [image_id * 10 + k for k in range(len(masks))]
    return maskrows.part_row(
        {
            "image_id": image_id,
            "file_name": f"{image_id}.png",
            "width": 4,
            "height": 3,
            "annotation_ids": ids,
            "labels": [k % 2 for k in range(len(masks))],
            "boxes": [[0.0, 0.0, 1.0 + k, 2.0] for k in range(len(masks))],
        },
        masks,
    )


MASK = rle.encode(torch.ones(1, 3, 4, dtype=torch.bool))[0]
OK = BoxMask(MASK, 0.5, 0.6, 0.1, 0.9, "ok")
EMPTY = BoxMask(None, 0.1, 0.0, 0.0, 0.0, "empty")
ERROR = BoxMask(None, None, None, None, None, "error: no luck")


@pytest.fixture
def unfinished(tmp_path: Path) -> tuple[str, str, Manifest]:
    """Shards of images 5, 3, 9, 4 and an output whose parts hold them in another order, one of them twice."""
    shards, out = str(tmp_path / "shards"), str(tmp_path / "out")
    table = pa.table({"image_id": pa.array([5, 3, 9, 4], pa.int64())})
    file = storage.write_parquet(f"{shards}/s.parquet", [table], table.schema)
    counts = {"images": 4, "boxes": 6}
    manifest = Manifest("shards", [Category(11, "a"), Category(7, "b")], [file], counts, {})

    def write(name: str, rows: list[dict[str, Any]], record: str) -> None:
        made = pa.Table.from_pylist(rows, schema=maskrows.PART_SCHEMA)
        storage.write_parquet(f"{out}/parts/{name}.parquet", [made], maskrows.PART_SCHEMA)
        storage.write_bytes(f"{out}/checkpoint/{record}.parquet", b"")

    write("w_1-0", [part(9, [OK, ERROR, EMPTY]), part(5, [OK])], "w_1")
    write("w_2", [part(4, [])], "w_2")
    write("x_1-0", [part(3, [OK, OK]), part(9, [OK, ERROR, EMPTY])], "x_1")
    write("x_2-0", [part(4, [OK])], "x_2.pending")  # not recorded as complete
    return shards, out, manifest


def test_small_parts_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3 * maskrows._PARTS_IN_MEMORY
    shards, out = str(tmp_path / "shards"), str(tmp_path / "out")
    table = pa.table({"image_id": pa.array(range(count), pa.int64())})
    file = storage.write_parquet(f"{shards}/s.parquet", [table], table.schema)
    for k in range(count):
        one = pa.Table.from_pylist([part(k, [OK])], schema=maskrows.PART_SCHEMA)
        storage.write_parquet(f"{out}/parts/{k:04d}.parquet", [one], maskrows.PART_SCHEMA)
        storage.write_bytes(f"{out}/checkpoint/{k:04d}.parquet", b"")
    whole: list[str] = []
    read = pq.read_table

    def counted(path: str, **options: Any) -> pa.Table:
        if "columns" not in options:
            whole.append(path)
        return read(path, **options)

    monkeypatch.setattr(maskrows.pq, "read_table", counted)
    monkeypatch.setattr(maskrows, "_IMAGES_AT_ONCE", 8)
    manifest = Manifest("shards", [Category(1, "a"), Category(2, "b")], [file], {"images": count, "boxes": count}, {})
    assert maskrows.publish(out, shards, manifest, {"model": "m"}).counts["ok"] == count
    assert len(whole) == len(set(whole)) == count


def test_parts_are_published_in_the_order_of_the_shards(
    unfinished: tuple[str, str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out, manifest = unfinished
    monkeypatch.setattr(maskrows, "_IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(maskrows, "FILE_BYTES", 1)
    for left in ("masks-00000.parquet.0a1b.partial", "masks-00007.parquet"):  # by a run that was killed here
        storage.write_bytes(f"{out}/{left}", b"half")
    made = maskrows.publish(out, shards, manifest, {"model": "m/1"})
    assert storage.read_manifest(out, "masks").hash == made.hash
    assert made.counts == {"images": 4, "boxes": 6, "ok": 4, "empty": 1, "errors": 1}
    assert len(made.files) == 2
    assert set(storage.list_files(out)) == {"manifest.json", *(file.path for file in made.files)}
    rows = masks_of(out)
    assert [row["annotation_id"] for row in rows] == [50, 30, 31, 90, 91, 92]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "ok", "error: no luck", "empty"]
    assert {row["model"] for row in rows} == {"m/1"}
    assert rows[5]["box"] == [0.0, 0.0, 3.0, 2.0]
    assert pq.read_schema(f"{out}/{made.files[0].path}").equals(MASK_SCHEMA)


def test_a_missing_image_or_box_is_never_published(unfinished: tuple[str, str, Manifest]) -> None:
    shards, out, manifest = unfinished
    with pytest.raises(RuntimeError, match=r"the shards hold .*'boxes': 7"):
        maskrows.publish(out, shards, replace(manifest, counts={"images": 4, "boxes": 7}), {"model": "m"})
    Path(f"{out}/parts/w_2.parquet").unlink()
    with pytest.raises(RuntimeError, match="1 images have no masks, the first is 4"):
        maskrows.publish(out, shards, manifest, {"model": "m"})
    assert not storage.exists(f"{out}/manifest.json")


def test_only_shards_with_work_left_are_read_again(tmp_path: Path) -> None:
    shards, out, files = str(tmp_path / "shards"), str(tmp_path / "out"), []

    def ids(path: str, *numbers: int) -> None:
        table = pa.table({"image_id": pa.array(numbers, pa.int64())})
        files.append(storage.write_parquet(path, [table], table.schema))

    for name, numbers in {"a": (5, 3), "b": (9,), "c": (4, 8), "d": (6,)}.items():
        ids(f"{shards}/{name}.parquet", *numbers)
    manifest = Manifest("shards", [], files.copy(), {})
    assert maskrows.unfinished(out, shards, manifest) == storage.shard_files(shards, manifest)
    ids(f"{out}/checkpoint/x_0.parquet", 3, 6)  # whose part was lost
    assert maskrows.unfinished(out, shards, manifest) == storage.shard_files(shards, manifest)
    for name, record, numbers in (("w_1-0", "w_1", (9, 5)), ("w_2", "w_2", (8, 4, 9)), ("x_1-0", "x_1.pending", (3,))):
        ids(f"{out}/parts/{name}.parquet", *numbers)
        ids(f"{out}/checkpoint/{record}.parquet", *numbers)
    left = [Path(path).stem for path in maskrows.unfinished(out, shards, manifest)]
    assert left == ["a", "d"]
    ids(f"{out}/parts/x_2-0.parquet", 3, 6)
    ids(f"{out}/checkpoint/x_2.parquet", 3, 6)
    assert maskrows.unfinished(out, shards, manifest) == []


def test_coco_results_have_an_entry_for_every_box(unfinished: tuple[str, str, Manifest], tmp_path: Path) -> None:
    shards, out, manifest = unfinished
    made = maskrows.publish(out, shards, manifest, {"model": "m"})
    path = tmp_path / "deep" / "results.json"
    maskrows.write_coco(str(path), out, made)
    entries = json.loads(path.read_text())
    assert [e["annotation_id"] for e in entries] == [50, 30, 31, 90, 91, 92]
    assert [e["category_id"] for e in entries] == [11, 11, 7, 11, 7, 11]
    assert [e.get("status") for e in entries] == [None, None, None, None, "error: no luck", "empty"]
    assert entries[2]["bbox"] == [0.0, 0.0, 2.0, 2.0]
    sizes = [int(rle.decode([e["segmentation"]["counts"].encode()], 3, 4).sum()) for e in entries]
    assert sizes == [12, 12, 12, 12, 0, 0]
    assert [e["score"] for e in entries] == [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]
    assert os.listdir(path.parent) == ["results.json"]


# The whole stage


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
