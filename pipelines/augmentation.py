"""From rows of the stream to a batch: decoded and augmented in the data workers, padded in the training workers."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from boxinst import rle
from boxinst.config import AugmentConfig
from boxinst.structures import Batch, Targets
from boxinst.transforms import augment, collate
from pipelines.samples import masks_from_counts, sample_from_row
from pipelines.schema import BOX

SAMPLE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("pixels", pa.binary()),  # uint8 RGB, 3 x height x width
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("ignore_bottom", pa.int32()),  # rows at the bottom that take no part in the colour edges
        ("annotation_ids", pa.list_(pa.int64())),
        ("boxes", pa.list_(BOX)),
        ("labels", pa.list_(pa.int64())),
        ("masks", pa.list_(pa.binary())),  # COCO compressed RLE counts at height x width, or null
        ("tight", pa.list_(pa.bool_())),
    ]
)
"""One row per augmented image, as it travels from the data workers to the training workers."""


def augment_table(
    table: pa.Table,
    *,
    config: AugmentConfig,
    seed: int,
    exif: Literal["stored", "applied"],
    with_masks: bool,
    bottom_pixels: int,
) -> pa.Table:
    """Decode and augment each row, as a function of the seed, the row's epoch and its image alone.

    Args:
        table: of ``feed.STREAM_SCHEMA``.
        config: what is done to the images.
        seed: of the run.
        exif: which pixels the boxes refer to, from the manifest.
        with_masks: whether mask labels are kept.
        bottom_pixels: rows at the bottom of an image as stored that take no part in the colour edges.

    Returns:
        A table of ``SAMPLE_SCHEMA``. Crowd regions, which are not trained on, are left out.
    """
    samples = []
    for row in table.to_pylist():
        image, targets, image_id = sample_from_row(row, exif=exif, with_masks=with_masks)
        height = image.shape[1]
        rng = np.random.default_rng([seed, row["epoch"], image_id % 2**64])  # ids may be negative, seeds may not
        image, targets = augment(image, targets[~targets.crowd], config, rng)
        samples.append(
            {
                "image_id": image_id,
                "pixels": image.contiguous().numpy().tobytes(),
                "height": image.shape[1],
                "width": image.shape[2],
                "ignore_bottom": bottom_pixels * image.shape[1] // height,
                "annotation_ids": targets.ids.numpy(),
                "boxes": targets.boxes.tolist(),
                "labels": targets.labels.numpy(),
                "masks": _counts(targets),
                "tight": targets.tight.numpy(),
            }
        )
    return pa.Table.from_pylist(samples, schema=SAMPLE_SCHEMA)


def batch_from_table(table: pa.Table) -> Batch:
    """``SAMPLE_SCHEMA`` → a padded batch."""
    rows = table.to_pylist()
    images = [
        torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8).view(3, row["height"], row["width"])
        for row in rows
    ]
    return collate(
        images,
        [_targets(row) for row in rows],
        [row["image_id"] for row in rows],
        ignore_bottom=[row["ignore_bottom"] for row in rows],
    )


def _counts(targets: Targets) -> list[bytes | None]:
    """The masks as run lengths, None for instances that have none."""
    counts: list[bytes | None] = [None] * len(targets)
    if targets.masks is not None:
        labelled = targets.has_mask.nonzero().squeeze(1)
        for place, count in zip(labelled.tolist(), rle.encode(targets.masks[labelled]), strict=True):
            counts[place] = count
    return counts


def _targets(row: dict[str, Any]) -> Targets:
    """The targets of one row of ``SAMPLE_SCHEMA``."""
    boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
    masks, has_mask = masks_from_counts(row["masks"], row["height"], row["width"])
    return Targets(
        boxes=boxes,
        labels=torch.tensor(row["labels"], dtype=torch.int64),
        masks=masks,
        has_mask=has_mask,  # type: ignore[arg-type]  # None: Targets fills it in
        tight=torch.tensor(row["tight"], dtype=torch.bool),
        ids=torch.tensor(row["annotation_ids"], dtype=torch.int64),
    )
