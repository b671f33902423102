"""Validation during training: a share of the images on each rank, one score for all, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from boxinst.condinst import CondInst
from boxinst.metrics import CocoScorer, GivenBoxScorer
from boxinst.structures import Instances, Targets
from boxinst.transforms import eval_resize, restore
from boxinst.visualize import overlay, side_by_side
from pipelines.feed import ShardIndex
from pipelines.samples import sample_from_row

MAX_DETECTIONS = 1000
"""Dense images hold hundreds of objects; COCO's own limit of 100 would count the others as missed."""

PICTURES = 3
"""Images shown at each validation."""


@dataclass
class Validation:
    """The images one rank validates on, read once and kept as they are stored."""

    rows: list[dict[str, Any]]
    classes: Sequence[str]
    exif: Any
    short_side: int
    """Shorter side of the images in the network; 0 keeps their size."""
    max_side: int
    pictures: list[Tensor] = field(default_factory=list)
    """Of the last ``score``."""

    @classmethod
    def open(
        cls, index: ShardIndex, *, max_images: int, rank: int, ranks: int, short_side: int, max_side: int
    ) -> Validation:
        """Rank ``rank``'s share of at most ``max_images`` images (0 for all), spread evenly over the shards."""
        chosen = index.spread(max_images)[rank::ranks]
        classes = [c.name for c in index.manifest.categories]
        return cls(index.read(chosen).to_pylist(), classes, index.manifest.exif, short_side, max_side)

    def score(self, model: CondInst) -> tuple[Any, Any]:
        """States of a CocoScorer and a GivenBoxScorer over this rank's images.

        With the prompt head every given box gets a mask; without it, masks and boxes are detections, whose consistency
        is that of each mask with the box it came with.
        """
        ap, given = CocoScorer(self.classes, MAX_DETECTIONS), GivenBoxScorer()
        self.pictures = []
        for row in self.rows:
            image, targets, image_id = sample_from_row(row, exif=self.exif)
            wanted = targets[~targets.crowd]
            found = self._predict(model, image, wanted)
            height, width = image.shape[1:]
            ap.update(image_id, height, width, found, targets)
            given.update(found, wanted if model.config.prompt else Targets(found.boxes, found.labels))
            if len(self.pictures) < PICTURES:
                self.pictures.append(picture(image, wanted, found))
        return ap.state(), given.state()

    def merge(self, states: Sequence[tuple[Any, Any]]) -> dict[str, float]:
        """The metrics over all ranks, from each rank's states."""
        ap, given = CocoScorer(self.classes, MAX_DETECTIONS), GivenBoxScorer()
        for ap_state, given_state in states:
            ap.merge(ap_state)
            given.merge(given_state)
        return {**ap.compute(), **given.compute()}

    def _predict(self, model: CondInst, image: Tensor, targets: Targets) -> Instances:
        resized, scale = eval_resize(image, self.short_side, self.max_side)
        if model.config.prompt:
            (found,) = model.segment([resized], [targets.boxes * scale], [targets.labels])
            return replace(restore(found, *image.shape[1:]), boxes=targets.boxes)
        (found,) = model.detect([resized], max_detections=MAX_DETECTIONS, sizes=[(image.shape[1], image.shape[2])])
        return found


def picture(image: Tensor, targets: Targets, found: Instances) -> Tensor:
    """Boxes, predicted masks and, where there are any, true masks of an image, side by side."""
    panels, titles = [overlay(image, targets.boxes), overlay(image, found.boxes, found.masks)], ["boxes", "masks"]
    if targets.masks is not None:
        labelled = targets[targets.has_mask]
        panels.append(overlay(image, labelled.boxes, labelled.masks))
        titles.append("true masks")
    return side_by_side(panels, titles)


def stack(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures u8 [3, H, W] one below the other, on white."""
    width = max(p.shape[2] for p in pictures)
    return torch.cat([F.pad(p, (0, width - p.shape[2]), value=255) for p in pictures], 1)
