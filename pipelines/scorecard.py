"""The worker that evaluates, and the scorecard it fills: any model over any part of the shards, then added up.

It knows nothing of Ray or MLflow, which a worker process would have to load before its first image.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from boxinst.condinst import CondInst
from boxinst.metrics import CocoScorer, GivenBoxScorer, filled_box, inscribed_ellipse
from boxinst.structures import Instances, Targets
from pipelines import inference
from pipelines.config import Mode, Resolution
from pipelines.samples import sample_from_row

BASELINES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "filled_box": filled_box,
    "inscribed_ellipse": inscribed_ellipse,
}
"""Masks that need no model: what a trained one has to beat."""


class Scorecard:
    """Scores of a model, and in prompt mode of the baselines beside it.

    Args:
        classes: the class list.
        mode: "prompt" scores one mask for every given box, "detect" scores detections.
        max_detections: the best of an image, per class, that count for AP.
        baselines: score the baselines too, on the boxes that have a mask label.
    """

    def __init__(self, classes: Sequence[str], mode: Mode, max_detections: int, baselines: bool) -> None:
        self.mode = mode
        names = ["", *(f"{name}_" for name in BASELINES if baselines and mode == "prompt")]
        self._coco = {name: CocoScorer(classes, max_detections) for name in names}
        self._given = {name: GivenBoxScorer() for name in names} if mode == "prompt" else {}

    def update(self, image_id: int, height: int, width: int, found: Instances, targets: Targets) -> None:
        """Add an image. In prompt mode ``found`` holds one mask for every target that is not a crowd, in order."""
        if self.mode == "detect":
            self._coco[""].update(image_id, height, width, found, targets)
            return
        single = targets[~targets.crowd]
        candidates = {"": replace(found, labels=single.labels)}
        if targets.masks is not None:
            ones = torch.ones(len(single))
            for name, draw in BASELINES.items():
                masks = draw(single.boxes, height, width)
                candidates[f"{name}_"] = Instances(single.boxes, ones, single.labels, masks)
        for name, instances in candidates.items():
            if name in self._given:
                self._given[name].update(instances, single)
                self._coco[name].update(image_id, height, width, instances, targets)

    def to_json(self) -> str:
        """What was gathered, as text that ``merge`` takes."""
        state = {
            "coco": {name: scorer.state() for name, scorer in self._coco.items()},
            "given": {name: scorer.state() for name, scorer in self._given.items()},
        }
        return json.dumps(state, default=bytes.decode)  # RLE counts are ASCII

    def merge(self, text: str) -> None:
        """Add what another scorecard gathered."""
        state = json.loads(text)
        for name, images in state["coco"].items():
            self._coco[name].merge({int(image_id): image for image_id, image in images.items()})
        for name, sums in state["given"].items():
            self._given[name].merge(sums)

    def compute(self) -> dict[str, float]:
        """The figures of the model, and those of the baselines behind their name, such as ``filled_box_mask_iou``.

        What cannot be known without mask labels is left out.
        """
        figures: dict[str, float] = {}
        for name, scorer in self._coco.items():
            # With boxes given, box AP would only say that they were given.
            kept = {k: v for k, v in scorer.compute().items() if self.mode == "detect" or k.startswith("mask_")}
            given = self._given[name].compute() if name in self._given else {}
            if name:
                given = {k: v for k, v in given.items() if k == "mask_iou"}
            figures |= {f"{name}{key}": value for key, value in {**given, **kept}.items()}
        return figures


class Evaluator:
    """A worker: loads the model once, then takes batches of shard rows and gives their scorecards.

    Args:
        load: gives the model.
        resolution: of the images in the network.
        exif: which pixels the boxes refer to.
        mode: as for ``Scorecard``.
        score_threshold: least class probability × centre-ness of a detection.
        max_detections: kept per image.
        baselines: as for ``Scorecard``.
    """

    def __init__(
        self,
        load: Callable[[], CondInst],
        resolution: Resolution,
        exif: Literal["stored", "applied"],
        mode: Mode,
        score_threshold: float,
        max_detections: int,
        baselines: bool,
    ) -> None:
        self._model, self._resolution, self._exif, self._mode = load(), resolution, exif, mode
        self._score_threshold, self._max_detections, self._baselines = score_threshold, max_detections, baselines

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Shard rows to one row: the scorecard as JSON, the number of images, and the seconds the model took."""
        samples = [sample_from_row(row, exif=self._exif) for row in batch.to_pylist()]
        card = Scorecard(self._model.config.classes, self._mode, self._max_detections, self._baselines)
        start = time.perf_counter()
        found = self._predict([(image, targets) for image, targets, _ in samples])
        seconds = time.perf_counter() - start
        for instances, (image, targets, image_id) in zip(found, samples, strict=True):
            card.update(image_id, image.shape[1], image.shape[2], instances, targets)
        return pa.table({"scores": [card.to_json()], "images": [len(samples)], "seconds": [seconds]})

    def _predict(self, samples: Sequence[tuple[Tensor, Targets]]) -> list[Instances]:
        if self._mode == "detect":
            return [self._detect(image) for image, _ in samples]
        boxes = [targets.boxes[~targets.crowd] for _, targets in samples]
        images = [image for image, _ in samples]
        pieces: list[list[Instances]] = [[] for _ in samples]
        for k, _, piece in inference.segment(self._model, images, boxes, self._resolution):
            pieces[k].append(piece)
        return [_joined(parts) if parts else _nothing(image) for parts, image in zip(pieces, images, strict=True)]

    def _detect(self, image: Tensor) -> Instances:
        return inference.detect(
            self._model,
            image,
            self._resolution,
            score_threshold=self._score_threshold,
            max_detections=self._max_detections,
        )


def _joined(pieces: Sequence[Instances]) -> Instances:
    if len(pieces) == 1:
        return pieces[0]
    names = ("boxes", "scores", "labels", "masks")
    return Instances(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in names))


def _nothing(image: Tensor) -> Instances:
    masks = torch.zeros((0, *image.shape[1:]), dtype=torch.bool)
    return Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), masks)
