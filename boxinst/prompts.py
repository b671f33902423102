"""From the parameters of given boxes to the masks of one image, each in a window around its box.

Shape letters: P boxes, m of them at a time, C mask channels, K parameters of a box, H and W pixels, h and w cells.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from boxinst.dynamic import HeadShape, box_masks, dynamic_mask_windows, upsample, window_groups
from boxinst.losses import color_similarity
from boxinst.outlines import outline_contrast, promised_iou, reaching
from boxinst.structures import Instances

if TYPE_CHECKING:
    from boxinst.condinst import CondInst, Outputs

OUTSIDE = -30.0
"""Logit of a pixel that no window covers."""

CELLS_AT_ONCE = 2**21
"""Bound on instances × mask cells handled at once: about 130 MB of features at 16 channels."""

PIXELS_KEPT = 2**26
"""Bound on the pixels of boxes whose windows are kept where masks share no pixel: 5 bytes and more for each, 335 MB.
Where an image has more of them, its windows are computed twice."""

_Window: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Boxes in windows of one size: which boxes, int64 [m]; the first pixel (x, y) of each window, int64 [m, 2]; its pixels
inside box and image, bool [m, rows, columns]; mask logits [m, rows, columns]."""


def _windows(
    model: CondInst, features: Tensor, parameters: Tensor, boxes: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Mask logits of the boxes [P, 4] of one image, some boxes at a time, each in a window of the image.

    Args:
        model: the network.
        features: [1, C, h, w] mask features.
        parameters: [P, K].
        boxes: [P, 4] xyxy pixels.

    Yields:
        Which boxes, int64 [m]; the first pixel (x, y) of each window, int64 [m, 2]; logits [m, rows, columns]. Every
        box comes once.
    """
    stride = model.config.mask_stride
    points, scales = prompt_coordinates(boxes)
    # A cell of margin on either side keeps the interpolation inside the box free of the window's own border.
    for group in window_groups(boxes, (features.shape[2], features.shape[3]), stride, margin=2.0 * stride):
        cells = group.size[0] * group.size[1] * stride**2
        for part in torch.arange(len(group.members)).split(max(1, CELLS_AT_ONCE // cells)):
            who, origins = group.members[part], group.origins[part]
            coarse = dynamic_mask_windows(
                features,
                torch.zeros_like(who),
                parameters[who],
                points[who],
                scales[who],
                origins,
                group.size,
                head=HeadShape.of(model.config),
                stride=stride,
            ).float()
            yield who, origins * stride, upsample(upsample(coarse, 2), stride // 2)


def _region(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The whole pixels x0, y0, x1, y1 of an image of (height, width) that a box touches."""
    x0, y0 = min(max(math.floor(box[0]), 0), size[1]), min(max(math.floor(box[1]), 0), size[0])
    return x0, y0, max(min(math.ceil(box[2]), size[1]), x0), max(min(math.ceil(box[3]), size[0]), y0)


def box_crops(
    model: CondInst, outputs: Outputs, image: int, start: int, boxes: Tensor, size: tuple[int, int]
) -> list[Tensor]:
    """Probabilities in the ``_region`` of each box of one image of a batch, whose first box has the row ``start``."""
    assert outputs.prompt is not None
    crops: list[Tensor] = [boxes.new_zeros(0)] * len(boxes)
    features, parameters = outputs.mask_features[image : image + 1], outputs.prompt[start : start + len(boxes)]
    regions = [_region(box, size) for box in boxes.tolist()]
    for who, corners, logits in _windows(model, features, parameters, boxes):
        probability = logits.sigmoid()
        for k, (p, (x, y)) in enumerate(zip(who.tolist(), corners.tolist(), strict=True)):
            x0, y0, x1, y1 = regions[p]
            crops[p] = probability[k, y0 - y : y1 - y, x0 - x : x1 - x]
    return crops


def prompt_masks(
    model: CondInst,
    features: Tensor,
    parameters: Tensor,
    boxes: Tensor,
    seen: Tensor,
    image: Tensor,
    logits: bool = False,
    views: Sequence[Sequence[Tensor]] = (),
) -> Instances:
    """Masks of the given boxes of one image, some at a time; the cost of each follows the area of its box.

    Args:
        model: the network.
        features: [1, C, h, w] mask features.
        parameters: [P, K] of the prompt head.
        boxes: [P, 4] xyxy pixels.
        seen: the image as the network sees it, uint8 [3, h · stride, w · stride].
        image: the image as it was given, [3, H, W].
        logits: also return the mask logits.
        views: from other views of the image, the probabilities in each box's ``_region``.
    """
    height, width = image.shape[-2:]
    similarity = color_similarity(seen[None], stride=1)[0] if len(boxes) else seen[:0].float()
    masks = _blank_masks(len(boxes), height, width)
    raw = torch.full((len(boxes), height, width), OUTSIDE) if logits else None
    scores = torch.zeros(len(boxes))
    compute = functools.partial(_box_windows, model, features, parameters, boxes, (height, width), views)
    windows: Iterable[_Window] = compute()
    surest: Tensor | None = None
    if model.config.exclusive:  # a pixel's owner is known when all boxes have been seen
        few = float((boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sum()) <= PIXELS_KEPT
        windows = list(windows) if few else windows
        surest = _surest(windows, (seen.shape[1], seen.shape[2]))
        windows = windows if few else compute()
    for who, corners, inside, fine in windows:
        rows, columns = fine.shape[1:]
        probability = fine.sigmoid() * inside
        chosen = (probability >= reaching(probability, inside)[:, None, None]) & inside
        if surest is not None:
            best = torch.stack([surest[y : y + rows, x : x + columns] for x, y in corners.tolist()])
            own = chosen & (fine >= best)
            chosen = torch.where(own.any((1, 2), keepdim=True), own, chosen)
        score = promised_iou(probability, chosen) * outline_contrast(chosen, similarity, corners, (height, width))
        scores[who.cpu()] = score.cpu()
        chosen, values = chosen.cpu(), fine.cpu() if raw is not None else fine  # in one piece: each copy has a wait
        for k, (p, (x, y)) in enumerate(zip(who.tolist(), corners.tolist(), strict=True)):
            region = (p, slice(y, min(y + rows, height)), slice(x, min(x + columns, width)))
            size = (slice(0, max(0, height - y)), slice(0, max(0, width - x)))
            masks[region] = chosen[k][size]
            if raw is not None:
                raw[region] = values[k][size]
    return Instances(boxes.cpu(), scores, torch.zeros(len(boxes), dtype=torch.int64), masks, raw)


def _box_windows(
    model: CondInst,
    features: Tensor,
    parameters: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    views: Sequence[Sequence[Tensor]],
) -> Iterator[_Window]:
    """Mask logits of the boxes of one image of (height, width), in windows, of the mean of all views; see
    ``prompt_masks``."""
    height, width = size
    regions = [_region(box, size) for box in boxes.tolist()] if views else []
    for who, corners, fine in _windows(model, features, parameters, boxes):
        rows, columns = fine.shape[1:]
        inside = box_masks(boxes[who], (rows, columns), 1, corners)
        inside &= (corners[:, 1, None] + torch.arange(rows, device=fine.device) < height)[:, :, None]
        inside &= (corners[:, :1] + torch.arange(columns, device=fine.device) < width)[:, None]
        if views:
            probability = fine.sigmoid()
            for k, (p, (x, y)) in enumerate(zip(who.tolist(), corners.tolist(), strict=True)):
                x0, y0, x1, y1 = regions[p]
                own = probability[k, y0 - y : y1 - y, x0 - x : x1 - x]
                own.copy_((own + sum(view[p] for view in views)) / (1 + len(views)))
            fine = torch.logit(probability, eps=1e-7)
        yield who, corners, inside, fine


def _surest(windows: Iterable[_Window], size: tuple[int, int]) -> Tensor:
    """[height, width], the highest logit that any of the boxes gives a pixel of its own; −∞ in no box."""
    best: Tensor | None = None
    for _, corners, inside, fine in windows:
        best = fine.new_full(size, -math.inf) if best is None else best
        own = torch.where(inside, fine, -math.inf)
        for logits, (x, y) in zip(own, corners.tolist(), strict=True):
            region = best[y : y + logits.shape[0], x : x + logits.shape[1]]
            torch.maximum(region, logits, out=region)
    return torch.empty(0) if best is None else best


def _blank_masks(count: int, height: int, width: int) -> Tensor:
    """[count, height, width] bool, all False. What is never written to takes neither memory nor time, also where it is
    read: the system makes a page of zeros when it is first written to, where torch.zeros would fill all at once."""
    size = count * height * width
    # Private, since of a shared mapping reading makes pages too. It lives as long as the tensor does.
    zeros = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # where a system has them, a huge page would hold whole masks
        zeros.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(zeros, dtype=torch.bool)[:size].view(count, height, width)


def prompt_coordinates(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Reference points and scales of given boxes: coordinates run from −1 to 1 across the box.

    Args:
        boxes: [P, 4] xyxy pixels.

    Returns:
        points [P, 2] and scales [P, 2], in pixels.
    """
    return (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp(min=1.0) / 2
