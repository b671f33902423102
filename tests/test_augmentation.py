"""pipelines.augmentation: the same seed, epoch and image give the same sample, and nothing is lost on its way."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from boxinst import rle
from boxinst.config import AugmentConfig
from pipelines.augmentation import SAMPLE_SCHEMA, augment_table, batch_from_table
from pipelines.feed import STREAM_SCHEMA
from pipelines.samples import sample_from_row

PLAIN = AugmentConfig(hflip=False)


def row(image_id: int, **changes: Any) -> dict[str, Any]:
    """A noisy image with two instances, of which the first has a mask."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(image_id + 9).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="png")
    mask = torch.zeros(1, 96, 80, dtype=torch.bool)
    mask[0, 10:40, 20:50] = True
    return {
        "image_id": image_id,
        "file_name": "",
        "image": buffer.getvalue(),
        "width": 80,
        "height": 96,
        "annotation_ids": [7, 8],
        "boxes": [[20, 10, 50, 40], [60.5, 50, 78, 80.25]],
        "labels": [0, 1],
        "masks": [rle.encode(mask)[0], None],
        "crowd": [False, False],
        "epoch": 0,
        **changes,
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=STREAM_SCHEMA)


def augmented(data: pa.Table, config: AugmentConfig = PLAIN, **changes: Any) -> pa.Table:
    options = {"seed": 1, "exif": "stored", "with_masks": True, "bottom_pixels": 0}
    return augment_table(data, config=config, **{**options, **changes})


def test_augmentation_follows_seed_epoch_and_image_alone() -> None:
    crops = AugmentConfig(crop=64)
    rows = [row(k) for k in (-3, 0, 4)]  # ids may be negative
    together = augmented(table(*rows), crops)
    assert together.schema.equals(SAMPLE_SCHEMA)
    alone = [augmented(table(r), crops).to_pylist()[0] for r in reversed(rows)]
    assert alone == together.to_pylist()[::-1]
    later = augmented(table(*({**r, "epoch": 1} for r in rows)), crops)
    assert later["pixels"] != together["pixels"]
    assert augmented(table(*rows), crops, seed=2)["pixels"] != together["pixels"]


def test_samples_reach_the_batch_unchanged() -> None:
    rows = [row(1), row(2, masks=[None, None]), row(3, annotation_ids=[], boxes=[], labels=[], masks=[], crowd=[])]
    batch = batch_from_table(augmented(table(*rows)))
    assert batch.sizes == [(96, 80)] * 3
    assert batch.images.shape == (3, 3, 96, 96)  # padded to the network's stride
    assert batch.image_ids == [1, 2, 3]
    assert batch.valid[:, :, :80].all()
    assert not batch.valid[:, :, 80:].any()
    for k, r in enumerate(rows):
        image, targets, _ = sample_from_row(r)
        assert torch.equal(batch.images[k, :, :, :80], image)
        for name in ("boxes", "labels", "ids", "tight", "has_mask"):
            assert torch.equal(getattr(batch.targets[k], name), getattr(targets, name)), name
    truth = sample_from_row(rows[0])[1].masks
    masks = batch.targets[0].masks
    assert masks is not None
    assert truth is not None
    assert torch.equal(masks[:, :, :80], truth)
    assert [t.masks for t in batch.targets[1:]] == [None, None]


def test_a_cut_box_stays_marked_as_cut() -> None:
    sample = augmented(table(row(1)), AugmentConfig(crop=40, hflip=False)).to_pylist()[0]
    batch = batch_from_table(augmented(table(row(1)), AugmentConfig(crop=40, hflip=False)))
    assert batch.targets[0].tight.tolist() == sample["tight"]
    assert False in sample["tight"]  # no box of 30 pixels beside another fits


def test_masks_can_be_left_out() -> None:
    batch = batch_from_table(augmented(table(row(1)), with_masks=False))
    assert batch.targets[0].masks is None
    assert batch.targets[0].has_mask.tolist() == [False, False]


def test_the_bottom_rows_follow_the_scale() -> None:
    batch = batch_from_table(augmented(table(row(1)), AugmentConfig(short_sides=(40,)), bottom_pixels=10))
    assert batch.sizes == [(48, 40)]
    assert batch.valid[0].nonzero().amax(0).tolist() == [48 - 5 - 1, 39]  # 10 rows of 96 are 5 of 48


def test_crowds_are_not_trained_on() -> None:
    batch = batch_from_table(augmented(table(row(1, crowd=[True, False]))))
    assert batch.targets[0].ids.tolist() == [8]


def test_an_image_that_cannot_be_decoded_is_an_error() -> None:
    with pytest.raises(ValueError, match="image"):
        augmented(table(row(1, image=b"")))
