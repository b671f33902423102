"""How good masks are: COCO AP, mask IoU where the boxes are given, mask–box consistency, and two baselines.

The scorers gather image by image, on any number of workers: ``state`` is plain data, ``merge`` adds it to another.

Shape letters: n instances of one image, H and W pixels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from boxinst import rle
from boxinst.errors import InputError
from boxinst.structures import Instances, Targets

FULL, HOLLOW = 0.95, 0.05
"""A mask that fills more, or less, of its box than this is taken for a collapsed one."""

# Pixels of masks handled at a time, so that the float copies stay in the cache.
_CHUNK = 1 << 19


# ------------------------------------------------------------------------------------------------ one mask, one box


def mask_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """IoU of each mask with the true mask of the same row, [n, H, W] bool twice -> [n]; 0 where both are empty."""
    if len(masks) == 0:
        return torch.zeros(0, device=masks.device)
    return torch.cat([_iou(a, b) for a, b in zip(_chunks(masks), _chunks(truth), strict=True)])


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Of uint8 masks."""
    intersection, area_a, area_b = (x.float().sum((1, 2)) for x in (a & b, a, b))
    return intersection / (area_a + area_b - intersection).clamp(min=1)


def mask_box_consistency(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How well each mask agrees with its box; no mask label is needed.

    A pixel cut by the box's side counts inside by the share of its area that is, so that fractional boxes are exact.

    Args:
        masks: [n, H, W] bool.
        boxes: [n, 4] xyxy pixels.

    Returns:
        box_iou [n]: IoU of the mask's tight extent with the box.
        spill [n]: share of the mask's area that lies outside the box.
        fill [n]: share of the box's area that the mask covers.
        All 0 for an empty mask.
    """
    boxes = boxes.to(masks.device, torch.float32)
    if len(masks) == 0:
        return (boxes.new_zeros(0),) * 3
    chunks = _chunks(masks)
    parts = [_consistency(*part) for part in zip(chunks, boxes.split(len(chunks[0])), strict=True)]
    box_iou, spill, fill = torch.cat(parts, 1).unbind()
    return box_iou, spill, fill


def _chunks(masks: Tensor) -> tuple[Tensor, ...]:
    """Masks [n, H, W] bool, n > 0, in parts of similar cost, as uint8: conversions from bool are slow in torch."""
    return masks.view(torch.uint8).split(max(1, _CHUNK // (masks.shape[1] * masks.shape[2])))


def _consistency(masks: Tensor, boxes: Tensor) -> Tensor:
    """Of masks [n, H, W] uint8: box IoU, spill and fill, [3, n]."""
    _, height, width = masks.shape
    x0, y0, x1, y1 = (side[:, None] for side in boxes.unbind(1))
    x = torch.arange(width, device=masks.device)
    y = torch.arange(height, device=masks.device)
    in_x = (torch.minimum(x + 1, x1) - torch.maximum(x, x0)).clamp(min=0)  # [n, W], share of the column in the box
    in_y = (torch.minimum(y + 1, y1) - torch.maximum(y, y0)).clamp(min=0)  # [n, H]
    by_column = torch.stack([in_y, torch.ones_like(in_y)], 1) @ masks.float()  # [n, 2, W]: pixels within in_y, pixels
    inside = (by_column[:, 0] * in_x).sum(1)
    area = by_column[:, 1].sum(1)
    box_area = ((x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)).squeeze(1)

    columns, rows = by_column[:, 1] > 0, masks.amax(2) > 0
    left, right = torch.where(columns, x, width).amin(1), torch.where(columns, x + 1, 0).amax(1)
    top, bottom = torch.where(rows, y, height).amin(1), torch.where(rows, y + 1, 0).amax(1)
    overlap_x = (torch.minimum(right, boxes[:, 2]) - torch.maximum(left, boxes[:, 0])).clamp(min=0)
    overlap_y = (torch.minimum(bottom, boxes[:, 3]) - torch.maximum(top, boxes[:, 1])).clamp(min=0)
    overlap = overlap_x * overlap_y
    box_iou = overlap / ((right - left) * (bottom - top) + box_area - overlap)
    spill = (1 - inside / area).clamp(0, 1)
    fill = (inside / box_area.clamp(min=1e-6)).clamp(0, 1)
    return torch.where(area > 0, torch.stack([box_iou, spill, fill]), 0.0)


def filled_box(boxes: Tensor, height: int, width: int) -> Tensor:
    """Baseline: the pixels whose centre lies in the box. [n, 4] -> [n, height, width] bool."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    x0, y0, x1, y1 = (side[:, None] for side in boxes.cpu().unbind(1))
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None]


def inscribed_ellipse(boxes: Tensor, height: int, width: int) -> Tensor:
    """Baseline: the pixels whose centre lies in the ellipse that touches the box's sides. As ``filled_box``."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    x0, y0, x1, y1 = (side[:, None] for side in boxes.cpu().unbind(1))
    across = ((2 * x - x0 - x1) / (x1 - x0).clamp(min=1e-6)).square()  # [n, W]
    down = ((2 * y - y0 - y1) / (y1 - y0).clamp(min=1e-6)).square()  # [n, H]
    return down[:, :, None] + across[:, None] <= 1


# ------------------------------------------------------------------------------------------------ scorers


class CocoScorer:
    """COCO's AP of masks and boxes (cocodataset.org/#detection-eval), for any limit on the detections of an image.

    Mask AP is over the images in which every instance has a mask label, box AP over all.

    Args:
        classes: the class list.
        max_detections: the best of an image that count, per class. 100 in COCO; images that hold more objects need
            more, as what is cut off counts as missed.
    """

    def __init__(self, classes: Sequence[str], max_detections: int = 100) -> None:
        if max_detections < 1:
            raise InputError("max_detections", max_detections, "Give at least 1.")
        self.classes = tuple(classes)
        self.max_detections = max_detections
        self._images: dict[int, dict[str, Any]] = {}

    def update(self, image_id: int, height: int, width: int, instances: Instances, targets: Targets) -> None:
        """Adds an image, in its own pixels. An image given again replaces what was known of it."""
        truth_masks: list[bytes | None] = [None] * len(targets)
        if targets.masks is not None:
            labelled = targets.has_mask.nonzero().squeeze(1).tolist()
            for i, counts in zip(labelled, rle.encode(targets.masks[targets.has_mask]), strict=True):
                truth_masks[i] = counts
        self._images[image_id] = {
            "height": height,
            "width": width,
            "truth": {
                "boxes": targets.boxes.tolist(),
                "labels": targets.labels.tolist(),
                "crowd": targets.crowd.tolist(),
                "masks": truth_masks,
            },
            "found": {
                "boxes": instances.boxes.tolist(),
                "labels": instances.labels.tolist(),
                "scores": instances.scores.tolist(),
                "masks": rle.encode(instances.masks),
            },
        }

    def state(self) -> dict[int, dict[str, Any]]:
        """All that was gathered, by image id, as plain data."""
        return self._images

    def merge(self, state: dict[int, dict[str, Any]]) -> None:
        """Adds what another scorer gathered."""
        self._images.update(state)

    def compute(self, kinds: Sequence[str] = ("mask", "box")) -> dict[str, float]:
        """``mask_ap``, ``mask_ap50``, ``mask_ap75``, ``mask_ap_small``, ``_medium``, ``_large``, and ``box_…`` alike.

        A figure for which there is no truth is left out. Small, medium and large go by the area of the true mask, or of
        the box where there is none.

        Args:
            kinds: which of the two to compute. Box AP says nothing where the boxes were given.
        """
        figures = {}
        for kind in kinds:
            precision, params = self._precision({"mask": "segm", "box": "bbox"}[kind])
            for name, thresholds, area in (
                ("ap", params.iouThrs, "all"),
                ("ap50", [0.5], "all"),
                ("ap75", [0.75], "all"),
                ("ap_small", params.iouThrs, "small"),
                ("ap_medium", params.iouThrs, "medium"),
                ("ap_large", params.iouThrs, "large"),
            ):
                chosen = precision[np.isin(params.iouThrs, thresholds)][:, :, :, params.areaRngLbl.index(area), -1]
                if (chosen > -1).any():  # −1 marks what has no truth
                    figures[f"{kind}_{name}"] = float(chosen[chosen > -1].mean())
        return figures

    def _precision(self, iou_type: str) -> tuple[np.ndarray, Any]:
        """pycocotools' precision [IoU thresholds, recalls, classes, areas, 1] and its parameters."""
        images, truth, found = [], [], []
        for image_id, image in sorted(self._images.items()):
            masks, crowd = image["truth"]["masks"], image["truth"]["crowd"]
            if iou_type == "segm" and any(m is None and not c for m, c in zip(masks, crowd, strict=True)):
                continue
            images.append({"id": image_id, "height": image["height"], "width": image["width"]})
            truth += _annotations(image_id, image, image["truth"], iou_type)
            found += _annotations(image_id, image, image["found"], iou_type)
        categories = [{"id": label, "name": name} for label, name in enumerate(self.classes)]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
            evaluation = COCOeval(_coco(images, categories, truth), _coco(images, categories, found), iou_type)
            evaluation.params.maxDets = [self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"], evaluation.params


def _annotations(image_id: int, image: dict[str, Any], rows: dict[str, Any], iou_type: str) -> list[dict[str, Any]]:
    """Rows of a scorer's state as COCO annotations."""
    size = image["height"], image["width"]
    annotations = []
    for i, (box, label, counts) in enumerate(zip(rows["boxes"], rows["labels"], rows["masks"], strict=True)):
        if iou_type == "segm" and counts is None:
            continue  # a crowd without a mask
        x0, y0, x1, y1 = box
        annotation = {
            "image_id": image_id,
            "category_id": label,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
        }
        if "scores" in rows:
            annotation["score"] = rows["scores"][i]
        else:
            annotation["iscrowd"] = int(rows["crowd"][i])
        # COCO measures a true object by its mask, whatever is compared, and a detection by what is compared.
        if counts is not None and ("scores" not in rows or iou_type == "segm"):
            annotation["segmentation"] = rle.to_coco([counts], *size)[0]
            annotation["area"] = rle.area([counts], *size)[0]
        annotations.append(annotation)
    return annotations


def _coco(images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    for i, annotation in enumerate(annotations):
        annotation["id"] = i + 1  # from 1: pycocotools takes a match with id 0 for none
    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


class GivenBoxScorer:
    """Means over the instances of masks that were made for given boxes; crowd regions are left out."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(
            ("instances", "box_iou", "spill", "fill", "fill_over_95", "fill_under_05", "labelled", "mask_iou"), 0.0
        )

    def update(self, instances: Instances, targets: Targets) -> None:
        """Adds an image: one instance for each target, in the same order and pixels."""
        if len(instances) != len(targets):
            raise InputError("instances", f"{len(instances)} for {len(targets)} boxes", "Give one mask per box.")
        wanted = ~targets.crowd
        masks = instances.masks[wanted]
        box_iou, spill, fill = mask_box_consistency(masks, targets.boxes[wanted])
        labelled = targets.has_mask & wanted
        added: dict[str, Tensor | int] = {
            "instances": len(masks),
            "box_iou": box_iou.sum(),
            "spill": spill.sum(),
            "fill": fill.sum(),
            "fill_over_95": (fill > FULL).sum(),
            "fill_under_05": (fill < HOLLOW).sum(),
            "labelled": labelled.sum(),
            "mask_iou": 0,
        }
        if targets.masks is not None:
            added["mask_iou"] = mask_iou(instances.masks[labelled], targets.masks[labelled]).sum()
        for name, value in added.items():
            self._sums[name] += float(value)

    def state(self) -> dict[str, float]:
        """Sums and counts, as plain data."""
        return dict(self._sums)

    def merge(self, state: dict[str, float]) -> None:
        """Adds what another scorer gathered."""
        for name, value in state.items():
            self._sums[name] += value

    def compute(self) -> dict[str, float]:
        """The means, and ``instances``, their number.

        ``mask_iou`` is over the instances with a mask label and left out where there is none; ``box_iou``, ``spill``
        and ``fill`` are those of ``mask_box_consistency``; ``fill_over_95`` and ``fill_under_05`` the shares of
        collapsed masks. No mean at all without an instance.
        """
        sums = dict(self._sums)
        count, labelled, iou = sums.pop("instances"), sums.pop("labelled"), sums.pop("mask_iou")
        figures = {"instances": count}
        if labelled:
            figures["mask_iou"] = iou / labelled
        if count:
            figures |= {name: value / count for name, value in sums.items()}
        return figures
