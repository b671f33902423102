"""Masks as COCO compressed run-length counts: the form in which they are stored and compared.

A mask's bytes are the ``counts`` of COCO's format and mean nothing without its height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pycocotools import mask as coco_mask
from torch import Tensor


def encode(masks: Tensor) -> list[bytes]:
    """Run-length counts of masks [n, H, W] bool, one entry per mask."""
    if len(masks) == 0:
        return []
    # pycocotools reads columns first: [H, W, n] in Fortran order is [n, W, H] in C order.
    columns = masks.cpu().view(torch.uint8).transpose(1, 2).contiguous().numpy()
    return [entry["counts"] for entry in coco_mask.encode(columns.transpose(2, 1, 0))]


def decode(counts: Sequence[bytes], height: int, width: int) -> Tensor:
    """Inverse of ``encode``: [n, height, width] bool, whose columns lie first in memory, as in the counts."""
    if len(counts) == 0:
        return torch.zeros(0, height, width, dtype=torch.bool)
    masks = torch.from_numpy(coco_mask.decode(to_coco(counts, height, width)))  # [H, W, n] uint8
    return masks.permute(2, 0, 1).view(torch.bool)


def extent(counts: Sequence[bytes], height: int, width: int) -> Tensor:
    """The tight box of each mask, xyxy pixels [n, 4] float32; an empty mask has 0, 0, 0, 0."""
    if len(counts) == 0:
        return torch.zeros(0, 4)
    boxes = torch.from_numpy(coco_mask.toBbox(to_coco(counts, height, width))).float()
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def area(counts: Sequence[bytes], height: int, width: int) -> list[int]:
    """The number of pixels of each mask."""
    return [int(pixels) for pixels in coco_mask.area(to_coco(counts, height, width))] if len(counts) else []


def to_coco(counts: Sequence[bytes], height: int, width: int) -> list[dict[str, object]]:
    """The dicts that pycocotools works on."""
    return [{"size": [height, width], "counts": entry} for entry in counts]
