"""Run-length counts: an exact inverse pair, in COCO's own format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from boxinst import rle


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 4), (3, 1, 9), (2, 33, 64)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_decode_is_the_inverse_of_encode(shape: tuple[int, int, int], share: float) -> None:
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    counts = rle.encode(masks)
    assert all(isinstance(entry, bytes) for entry in counts)
    decoded = rle.decode(counts, *shape[1:])
    assert decoded.dtype == torch.bool
    assert decoded.transpose(1, 2).is_contiguous() or 1 in shape, "no copy"
    assert torch.equal(decoded, masks)


def test_the_bytes_are_cocos() -> None:
    masks = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    expected = [coco_mask.encode(np.asfortranarray(m.numpy().astype(np.uint8)))["counts"] for m in masks]
    assert rle.encode(masks) == expected
    assert rle.encode(masks.flip(2)[:, :, ::2]) == rle.encode(masks.flip(2)[:, :, ::2].contiguous())


def test_extent_and_area() -> None:
    masks = torch.zeros(3, 8, 10, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 0, 0] = masks[1, 7, 9] = True
    counts = rle.encode(masks)
    assert rle.extent(counts, 8, 10).tolist() == [[3, 2, 9, 5], [0, 0, 10, 8], [0, 0, 0, 0]]
    assert rle.area(counts, 8, 10) == [18, 2, 0]


def test_no_masks() -> None:
    assert rle.encode(torch.zeros(0, 4, 5, dtype=torch.bool)) == []
    assert rle.decode([], 4, 5).shape == (0, 4, 5)
    assert rle.extent([], 4, 5).shape == (0, 4)
    assert rle.area([], 4, 5) == []
