"""The worker that segments: rows that say what the model says, failures that stay alone, threads that take turns."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
import torch
from rows import rows_of

import boxinst
from boxinst import Instances, rle
from boxinst.metrics import mask_box_consistency
from pipelines import inference
from pipelines.config import Resolution
from pipelines.segmenter import Segmenter


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Equal rows, but for the last digits that a batch of another size may change."""
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        for name, value in row.items():
            numbers = name in ("score", "box_iou", "spill", "fill")
            assert value == (pytest.approx(other[name], abs=1e-5) if numbers else other[name]), name


def segmenter(folder: str, resolution: Resolution | None = None) -> Segmenter:
    return Segmenter(lambda: boxinst.load(folder), resolution or Resolution(0, 1333), "stored")


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
