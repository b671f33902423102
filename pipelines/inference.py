"""A model at work on stored images: shipped to a worker as bytes, run at a chosen resolution, in bounded memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import boxinst
from boxinst.condinst import CondInst
from boxinst.config import ModelConfig
from boxinst.errors import InputError
from boxinst.structures import Instances
from boxinst.tensors import CONFIG_FILE, WEIGHTS_FILE
from boxinst.transforms import eval_resize, restore
from pipelines.config import Resolution

MASK_PIXELS = 2**28
"""Bound on the bytes that the masks of an image take: of one that goes through the model in company, and of what is
restored to the size of its image at a time."""

MASK_PIXELS_OF_ONE = 2**31
"""The same of an image that goes through the model alone. Its boxes are cut into pieces only above that: a pixel that
several of them hold may have to belong to one mask (``model.exclusive``)."""


def pack(folder: Path) -> dict[str, bytes]:
    """A model's folder as bytes, so that it reaches workers that share no disk with this process."""
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def unpack(files: Callable[[], Mapping[str, bytes]], *, device: str = "cpu", threads: int = 0) -> CondInst:
    """Inverse of ``pack``: the model on ``device``.

    Args:
        files: gives what ``pack`` made; on a cluster it is fetched by the worker.
        device: where the model runs.
        threads: CPU threads of torch in this process; 0 leaves them as they are.
    """
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files().items():
            (Path(folder) / name).write_bytes(data)
        return boxinst.load(folder, device=device)


def check_prompted(model: ModelConfig, uri: str) -> None:
    """Whether a model takes boxes, as ``segment`` needs it.

    Raises:
        InputError: it does not; ``uri`` is how the user named it.
    """
    if not model.prompt:
        raise InputError("--model", f"{uri} takes no boxes (model.prompt is off)", "Train one with it on.")


def threads(workers: int) -> int:
    """Threads of torch for each of ``workers``: a share of this machine's cores, or what a cluster's Ray sets (0)."""
    return 0 if os.environ.get("RAY_ADDRESS") else max(1, len(os.sched_getaffinity(0)) // workers)


class Prompted(Protocol):
    """What can give a mask for every given box, as a ``CondInst`` does."""

    def segment(self, images: list[Tensor], boxes: list[Tensor]) -> list[Instances]:
        """See ``boxinst.predict.segment``."""


def segment(
    model: Prompted, images: Sequence[Tensor], boxes: Sequence[Tensor], resolution: Resolution
) -> Iterator[tuple[int, slice, Instances]]:
    """One mask for every given box.

    Args:
        model: with the prompt head.
        images: N uint8 RGB [3, H, W].
        boxes: N float xyxy [n, 4] in the pixels of their image.
        resolution: in the network.

    Yields:
        The position of an image, which of its boxes, and their masks in the image's own pixels. An image with many
        boxes comes in several pieces; together they hold every box once, in order. All boxes of an image are seen
        together, unless their masks were to take more than ``MASK_PIXELS_OF_ONE``.
    """
    resized = [eval_resize(image, resolution.short_side, resolution.max_side) for image in images]
    scaled = [given * scale for given, (_, scale) in zip(boxes, resized, strict=True)]
    held = [_held(given, image) for given, (image, _) in zip(scaled, resized, strict=True)]
    fits = [k for k in range(len(images)) if sum(held[k]) <= MASK_PIXELS]
    together = model.segment([resized[k][0] for k in fits], [scaled[k] for k in fits]) if fits else []
    for k, found in zip(fits, together, strict=True):
        yield from _restored(k, 0, found, images[k])
    for k in sorted(set(range(len(images))) - set(fits)):
        for part in _pieces(held[k]):
            (found,) = model.segment([resized[k][0]], [scaled[k][part]])
            yield from _restored(k, part.start, found, images[k])


def detect(
    model: CondInst, image: Tensor, resolution: Resolution, *, score_threshold: float, max_detections: int
) -> Instances:
    """Detections in one image (uint8 RGB [3, H, W]), in its own pixels."""
    resized, _ = eval_resize(image, resolution.short_side, resolution.max_side)
    size = (image.shape[1], image.shape[2])
    (found,) = model.detect([resized], score_threshold=score_threshold, max_detections=max_detections, sizes=[size])
    return found


def _held(boxes: Tensor, image: Tensor) -> list[int]:
    """At most the bytes that the mask of each box [n, 4] of an image [3, H, W] takes before it is restored: those of
    the rows of its window, which is square. Nothing else of it is written to (``prompts._blank_masks``)."""
    longer = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).max(1).values if len(boxes) else boxes.new_zeros(0)
    rows = (2 * longer + 64).clamp(max=image.shape[1])
    return [int(r) * image.shape[2] for r in rows.tolist()]


def _pieces(held: Sequence[int]) -> Iterator[slice]:
    """Boxes in order, cut where what their masks hold would pass ``MASK_PIXELS_OF_ONE``."""
    start = total = 0
    for k, size in enumerate(held):
        if total and total + size > MASK_PIXELS_OF_ONE:
            yield slice(start, k)
            start, total = k, 0
        total += size
    yield slice(start, len(held))


def _restored(k: int, start: int, found: Instances, image: Tensor) -> Iterator[tuple[int, slice, Instances]]:
    size = max(1, MASK_PIXELS // (image.shape[1] * image.shape[2]))
    for first in range(0, len(found), size):
        part = slice(first, first + size)
        piece = replace(
            found,
            boxes=found.boxes[part],
            scores=found.scores[part],
            labels=found.labels[part],
            masks=found.masks[part],
        )
        end = start + first + len(piece)
        yield k, slice(start + first, end), restore(piece, image.shape[1], image.shape[2])
