"""A reviewer for demos: judges masks by the truth where the corpus has it, by their consistency where it has not."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as coco_mask

from boxinst import rle
from pipelines import coco, storage
from pipelines.schema import Manifest
from pipelines.verdicts import Verdict

GOOD, BAD = 0.8, 0.5
"""Masks of at least this IoU with the truth are accepted, those below the other are rejected, the rest need a fix."""
CONSISTENT, INCONSISTENT = 0.9, 0.7
"""The same for the IoU of the mask's extent with the box."""

_COLUMNS = ["annotation_id", "width", "height", "mask", "box_iou", "status"]


def verdicts(masks: str, manifest: Manifest, annotations: str) -> dict[int, Verdict]:
    """A verdict for every mask row.

    Args:
        masks: an artefact of ``boxinst segment``.
        manifest: its manifest.
        annotations: COCO JSON of the same corpus, with masks or without.
    """
    truth = true_masks(annotations)
    rows = (row for table in storage.row_groups(masks, manifest, _COLUMNS) for row in table.to_pylist())
    return {row["annotation_id"]: _judge(row, truth.get(row["annotation_id"])) for row in rows}


def true_masks(annotations: str) -> dict[int, bytes]:
    """RLE counts of the mask labels in a COCO JSON file, by annotation id."""
    corpus = coco.parse(storage.read_bytes(annotations), annotations)
    labels = {category.id: label for label, category in enumerate(corpus.categories)}
    found: dict[int, bytes] = {}
    for image in corpus.images:
        if image.width and image.height:
            row, _ = coco.to_row(image, b"", (image.width, image.height), labels)
            pairs = zip(row["annotation_ids"], row["masks"], strict=True)
            found |= {annotation: mask for annotation, mask in pairs if mask is not None}
    return found


def _judge(row: dict[str, Any], truth: bytes | None) -> Verdict:
    if row["status"] != "ok":
        return "reject"
    if truth is None:
        return _graded(row["box_iou"], CONSISTENT, INCONSISTENT)
    ours, theirs = rle.to_coco([row["mask"], truth], row["height"], row["width"])
    return _graded(float(coco_mask.iou([ours], [theirs], [False])[0, 0]), GOOD, BAD)


def _graded(value: float, good: float, bad: float) -> Verdict:
    return "accept" if value >= good else "reject" if value < bad else "fix"
