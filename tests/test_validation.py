"""pipelines.validation: the score does not depend on how many ranks share the images."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import boxinst
from boxinst import rle
from boxinst.condinst import CondInst
from boxinst.config import ModelConfig
from boxinst.structures import Instances
from pipelines.feed import ShardIndex
from pipelines.samples import sample_from_row
from pipelines.schema import Category, Manifest
from pipelines.validation import PICTURES, Validation, stack

CLASSES = ("x", "y")


class Table:
    """Rows that stand for a table."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def to_pylist(self) -> list[dict[str, Any]]:
        return self.rows


class Index(ShardIndex):
    """A shard set in memory."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        categories = [Category(k, name) for k, name in enumerate(CLASSES)]
        object.__setattr__(self, "manifest", Manifest("shards", categories, [], {}))
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[attr-defined]

    def read(self, rows: np.ndarray) -> Table:  # type: ignore[override]
        return Table([self.rows[k] for k in rows])  # type: ignore[attr-defined]


def row(image_id: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(image_id).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="png")
    masks = torch.zeros(2, 64, 80, dtype=torch.bool)
    masks[0, 8:30, 10 : 40 + image_id] = True
    masks[1, 20:60, 50:70] = True
    return {
        "image_id": image_id,
        "image": buffer.getvalue(),
        "annotation_ids": [0, 1, 2],
        "boxes": [[10, 8, 40 + image_id, 30], [50, 20, 70, 60], [0, 0, 80, 64]],
        "labels": [0, 1, 0],
        "masks": [*rle.encode(masks), None],
        "crowd": [False, False, True],
    }


@pytest.fixture(scope="module")
def index() -> Index:
    return Index([row(k) for k in range(5)])


@pytest.fixture(scope="module", params=["prompt", "detect"])
def model(request: pytest.FixtureRequest) -> CondInst:
    torch.manual_seed(0)
    config = ModelConfig(classes=CLASSES, backbone="resnet18", width=16, fpn_channels=16, mask_stride=4)
    prompt = request.param == "prompt"
    model = boxinst.CondInst(replace(config, prompt=prompt, detect=not prompt)).eval()
    if model.dense_head is not None:
        torch.nn.init.zeros_(model.dense_head.class_logits.bias)  # an untrained head is sure that there is nothing
    return model


def opened(index: Index, rank: int = 0, ranks: int = 1, **options: Any) -> Validation:
    sizes = {"max_images": 0, "short_side": 0, "max_side": 1333}
    return Validation.open(index, rank=rank, ranks=ranks, **{**sizes, **options})


def test_two_ranks_find_what_one_finds(index: Index, model: CondInst) -> None:
    alone = opened(index)
    expected = alone.merge([alone.score(model)])
    pair = [opened(index, rank, 2) for rank in range(2)]
    assert [len(v.rows) for v in pair] == [3, 2]
    together = pair[0].merge([v.score(model) for v in pair])
    assert together == pytest.approx(expected)
    assert {"box_iou", "spill", "fill_over_95", "fill_under_05", "mask_ap"} <= set(expected)


def test_given_boxes_get_one_mask_each_and_crowds_none(index: Index, model: CondInst) -> None:
    validation = opened(index, short_side=48)
    metrics = validation.merge([validation.score(model)])
    if model.config.prompt:
        assert metrics["instances"] == 10
        assert 0 <= metrics["mask_iou"] <= 1
        assert metrics["box_ap"] > 0.9  # the boxes are given
    else:
        assert "mask_iou" not in metrics


def test_the_limit_spreads_over_the_shards(index: Index) -> None:
    assert [r["image_id"] for r in opened(index, max_images=2).rows] == [0, 2]
    assert len(opened(index, max_images=100).rows) == 5
    assert opened(index, rank=4, ranks=9, max_images=2).rows == []


def test_the_picture_shows_boxes_masks_and_truth(index: Index, model: CondInst) -> None:
    validation = opened(index)
    validation.score(model)
    assert len(validation.pictures) == PICTURES
    assert all(p.shape[2] >= 3 * 80 for p in validation.pictures)
    whole = stack([*validation.pictures, torch.zeros(3, 5, 7, dtype=torch.uint8)])
    assert whole.shape[1] == sum(p.shape[1] for p in validation.pictures) + 5
    assert whole[:, -1, -1].tolist() == [255, 255, 255]


class Perfect:
    """Knows the true masks, by their boxes."""

    config = ModelConfig(classes=CLASSES, detect=False)

    def __init__(self, index: Index) -> None:
        everything = [sample_from_row(r)[1] for r in index.rows]  # type: ignore[attr-defined]
        self.truth = {str(t.boxes[:2].tolist()): t.masks[:2] for t in everything if t.masks is not None}

    def segment(self, images: list[Any], boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> list[Instances]:
        return [Instances(boxes[0], torch.ones(2), labels[0], self.truth[str(boxes[0].tolist())])]


def test_a_perfect_model_has_perfect_scores(index: Index) -> None:
    validation = opened(index)
    metrics = validation.merge([validation.score(Perfect(index))])  # type: ignore[arg-type]
    assert [metrics[k] for k in ("mask_iou", "mask_ap", "box_iou")] == pytest.approx([1, 1, 1], abs=1e-6)
