"""pipelines.samples: a shard row becomes an image and its Targets."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from boxinst import rle
from pipelines.samples import masks_from_counts, sample_from_row


def png(width: int = 6, height: int = 4) -> bytes:
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1:3, 2:5] = True
    return {
        "image_id": 3,
        "image": png(),
        "annotation_ids": [10, 11],
        "boxes": [[2.0, 1.0, 5.0, 3.0], [0.0, 0.0, 6.0, 4.0]],
        "labels": [1, 0],
        "masks": [rle.encode(mask)[0], None],
        "crowd": [False, True],
        **changes,
    }


def test_everything_known_of_the_image_arrives() -> None:
    image, targets, image_id = sample_from_row(row())
    assert image_id == 3
    assert image.dtype == torch.uint8
    assert torch.equal(image.permute(1, 2, 0).flatten(), torch.arange(72, dtype=torch.uint8))
    assert targets.boxes.tolist() == [[2, 1, 5, 3], [0, 0, 6, 4]]
    assert targets.labels.tolist() == [1, 0]
    assert targets.ids.tolist() == [10, 11]
    assert targets.crowd.tolist() == [False, True]
    assert targets.tight.tolist() == [True, True]
    assert targets.has_mask.tolist() == [True, False]
    assert targets.masks is not None
    assert targets.masks.shape == (2, 4, 6)
    assert targets.masks[0].nonzero().amin(0).tolist() == [1, 2]
    assert targets.masks[0].sum() == 6
    assert not targets.masks[1].any()


def test_masks_can_be_left_out() -> None:
    _, targets, _ = sample_from_row(row(), with_masks=False)
    assert targets.masks is None
    assert not targets.has_mask.any()


@pytest.mark.parametrize("masks", [None, []])
def test_an_image_without_boxes(masks: object) -> None:
    _, targets, _ = sample_from_row(row(annotation_ids=[], boxes=[], labels=[], masks=masks, crowd=[]))
    assert len(targets) == 0
    assert targets.boxes.shape == (0, 4)


def test_exif_decides_which_pixels_the_boxes_refer_to() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.open(io.BytesIO(png())).convert("RGB").save(buffer, format="png", exif=exif)
    stored, _, _ = sample_from_row(row(image=buffer.getvalue(), masks=[None, None]))
    applied, _, _ = sample_from_row(row(image=buffer.getvalue(), masks=[None, None]), exif="applied")
    assert stored.shape == (3, 4, 6)
    assert applied.shape == (3, 6, 4)
    assert torch.equal(applied, stored.rot90(-1, (1, 2)))


def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(ValueError, match="image"):
        sample_from_row(row(image=b"nothing"))


def test_no_counts_are_no_masks() -> None:
    assert masks_from_counts([None, None], 4, 6) == (None, None)
