"""A row of the shards as what the model takes: an image tensor and its Targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from boxinst import rle
from boxinst.structures import Targets
from pipelines import images


def sample_from_row(
    row: Mapping[str, Any], *, exif: Literal["stored", "applied"] = "stored", with_masks: bool = True
) -> tuple[Tensor, Targets, int]:
    """Decode one row of ``schema.SHARD_SCHEMA`` (an entry of ``table.to_pylist()``).

    Args:
        row: the columns image, image_id, annotation_ids, boxes, labels, masks and crowd.
        exif: the manifest's ``exif``: which pixels the boxes refer to.
        with_masks: False leaves the mask labels out, as if the corpus had boxes alone.

    Returns:
        The image, uint8 RGB [3, H, W]; its targets, of which ``has_mask`` names those that have a mask label
        (``masks`` is None when none has); and the image id.

    Raises:
        ValueError: the image's bytes cannot be decoded.
    """
    image = torch.from_numpy(np.ascontiguousarray(images.decode(row["image"], exif=exif).transpose(2, 0, 1)))
    height, width = image.shape[1:]
    masks, has_mask = masks_from_counts((row["masks"] or ()) if with_masks else (), height, width)
    targets = Targets(
        boxes=torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(row["labels"], dtype=torch.int64),
        masks=masks,
        has_mask=has_mask,  # type: ignore[arg-type]  # None: Targets fills it in
        ids=torch.tensor(row["annotation_ids"], dtype=torch.int64),
        crowd=torch.tensor(row["crowd"], dtype=torch.bool),
    )
    return image, targets, int(row["image_id"])


def masks_from_counts(counts: Sequence[bytes | None], height: int, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Run lengths, None where there is no mask → ``masks`` and ``has_mask`` of Targets; both None when none has one."""
    known = [c for c in counts if c is not None]
    if not known:
        return None, None
    has_mask = torch.tensor([c is not None for c in counts], dtype=torch.bool)
    if len(known) == len(counts):
        return rle.decode(known, height, width), has_mask
    masks = torch.zeros(len(counts), height, width, dtype=torch.bool)
    masks[has_mask] = rle.decode(known, height, width)
    return masks, has_mask
