"""The worker that segments: shard rows in, one row of masks per image out, and every failure a status.

It knows nothing of Ray or MLflow, which a worker process would have to load before its first image.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import pyarrow as pa
from torch import Tensor

import boxinst
from boxinst import rle
from boxinst.condinst import CondInst
from boxinst.metrics import mask_box_consistency
from pipelines import inference, maskrows
from pipelines.config import Resolution
from pipelines.maskrows import BoxMask
from pipelines.samples import sample_from_row
from pipelines.schema import SHARD_SCHEMA

COLUMNS = [name for name in SHARD_SCHEMA.names if name != "masks"]
"""What it needs of a shard row."""


class Segmenter:
    """A worker: loads the model once, then takes batches of shard rows and gives rows of ``maskrows.PART_SCHEMA``.

    Several threads may call it: while one has the model, the others decode images and encode masks.

    Args:
        load: gives the model.
        resolution: of the images in the network.
        exif: which pixels the boxes refer to.
        count: is told how many images, boxes, mask rows and rejects were done.
    """

    def __init__(
        self,
        load: Callable[[], CondInst],
        resolution: Resolution,
        exif: Literal["stored", "applied"],
        count: Callable[..., None] | None = None,
    ) -> None:
        self._model, self._resolution, self._exif, self._count = _InTurn(load()), resolution, exif, count

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Shard rows to one row per image. What fails becomes the status of its boxes, and nothing else fails."""
        rows = batch.to_pylist()
        samples: list[tuple[Tensor, Tensor] | Exception] = []
        for row in rows:
            try:
                image, targets, _ = sample_from_row(row, exif=self._exif, with_masks=False)
                samples.append((image, targets.boxes))
            except Exception as error:
                samples.append(error)
        found = iter(self._segment([s for s in samples if not isinstance(s, Exception)]))
        results = []
        for row, sample in zip(rows, samples, strict=True):
            boxes = [_failed(sample)] * len(row["boxes"]) if isinstance(sample, Exception) else next(found)
            results.append(maskrows.part_row(row, boxes))
        statuses = [status for result in results for status in result["status"]]
        failed = sum(status not in ("ok", "empty") for status in statuses)
        if self._count:
            self._count(images=len(rows), boxes=len(statuses), mask_rows=len(statuses), rejects=failed)
        return pa.Table.from_pylist(results, schema=maskrows.PART_SCHEMA)

    def _segment(self, samples: Sequence[tuple[Tensor, Tensor]]) -> list[list[BoxMask]]:
        """The boxes of each (image, boxes). What cannot be done together is tried image by image, then box by box; a
        pixel may then belong to several masks, whatever the model says."""
        try:
            return self._together(samples)
        except Exception as error:
            if len(samples) > 1:
                return [boxes for sample in samples for boxes in self._segment([sample])]
            image, given = samples[0]
            if len(given) > 1:
                return [[box for one in given.split(1) for box in self._segment([(image, one)])[0]]]
            return [[_failed(error)] * len(given)]

    def _together(self, samples: Sequence[tuple[Tensor, Tensor]]) -> list[list[BoxMask]]:
        found: list[list[BoxMask]] = [[] for _ in samples]
        images, boxes = [image for image, _ in samples], [given for _, given in samples]
        for k, which, instances in inference.segment(self._model, images, boxes, self._resolution):
            found[k] += _measured(instances, boxes[k][which])
        return found


class _InTurn:
    """A model that one thread at a time may use, and no longer than it is at work."""

    def __init__(self, model: inference.Prompted) -> None:
        self._model, self._turn = model, threading.Lock()

    def segment(self, images: list[Tensor], boxes: list[Tensor]) -> list[boxinst.Instances]:
        with self._turn:
            return self._model.segment(images, boxes)


def _measured(instances: boxinst.Instances, boxes: Tensor) -> Iterator[BoxMask]:
    """Masks as RLE, with what can be said of them without a label."""
    counts = rle.encode(instances.masks)
    box_iou, spill, fill = (values.tolist() for values in mask_box_consistency(instances.masks, boxes))
    scores, some = instances.scores.tolist(), instances.masks.flatten(1).any(1).tolist()
    for k, mask in enumerate(counts):
        status = "ok" if some[k] else "empty"
        yield BoxMask(mask if some[k] else None, scores[k], box_iou[k], spill[k], fill[k], status)


def _failed(error: Exception) -> BoxMask:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return BoxMask(None, None, None, None, None, f"error: {reason}")
