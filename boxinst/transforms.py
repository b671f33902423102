"""Images with their targets: stretch, resize, flip, crop, augment, and batches padded to one size; and the way back.

Images are uint8 RGB [3, H, W]. Boxes are mapped exactly; masks follow their pixels. Nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from boxinst.config import AugmentConfig
from boxinst.structures import Batch, Instances, Targets


def augment(image: Tensor, targets: Targets, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Targets]:
    """A random view of an image and its targets; the same for the same state of ``rng``."""
    if config.contrast_stretch is not None:
        image = contrast_stretch(image, *config.contrast_stretch)
    if config.short_sides:
        short_side = int(rng.choice(config.short_sides))
        image, targets = resize(image, targets, _fit(image.shape[1], image.shape[2], short_side, config.max_side))
    if config.crop:
        height, width = min(config.crop, image.shape[1]), min(config.crop, image.shape[2])
        y = int(rng.integers(image.shape[1] - height + 1))
        x = int(rng.integers(image.shape[2] - width + 1))
        image, targets = crop(image, targets, (x, y, x + width, y + height))
    # Both are drawn whatever the config, so that one switch does not change the rest of the sequence.
    mirror, upside_down = rng.random(2) < 0.5
    if config.hflip and mirror:
        image, targets = hflip(image, targets)
    if config.vflip and upside_down:
        image, targets = vflip(image, targets)
    return image, targets


def contrast_stretch(image: Tensor, low: float, high: float) -> Tensor:
    """Maps the percentiles ``low`` and ``high`` of all channels together to 0 and 255, linearly, and clips.

    Args:
        image: uint8 [3, H, W].
        low: percentile in 0..100, interpolated linearly between pixel values.
        high: percentile above ``low``.

    Returns:
        uint8 [3, H, W]; the image itself where both percentiles are equal, as in a constant image.
    """
    up_to = torch.bincount(image.flatten(), minlength=256).cumsum(0)  # pixels of a value or less
    # Order statistics, without sorting: the value at a rank is the first that more pixels than the rank reach.
    rank = torch.tensor([low, high], dtype=torch.float64, device=image.device) / 100 * (image.numel() - 1)
    below, above = (torch.searchsorted(up_to, r.long(), right=True).double() for r in (rank.floor(), rank.ceil()))
    darkest, brightest = (below + (above - below) * rank.frac()).float().unbind()
    span = brightest - darkest
    stretched = image.float().sub_(darkest).mul_(255 / span.clamp(min=1e-6)).clamp_(0, 255).round_().to(torch.uint8)
    return torch.where(span > 0, stretched, image)


def resize(image: Tensor, targets: Targets, size: tuple[int, int]) -> tuple[Tensor, Targets]:
    """Resizes to (height, width): the image bilinear with antialiasing, masks to the nearest pixel centre."""
    height, width = image.shape[1:]
    if (height, width) == size:
        return image, targets
    masks = targets.masks
    if masks is not None:
        masks = F.interpolate(masks[None].to(torch.uint8), size, mode="nearest-exact")[0].bool()
    scale = targets.boxes.new_tensor([size[1] / width, size[0] / height] * 2)
    return resample(image, size), replace(targets, boxes=targets.boxes * scale, masks=masks)


def resample(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image uint8 [3, H, W] at (height, width): bilinear, with antialiasing, rounded to the nearest value."""
    if image.device.type == "cpu":  # has a kernel for bytes
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def hflip(image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """Mirrors left and right."""
    x0, y0, x1, y1 = targets.boxes.unbind(1)
    width = image.shape[2]
    boxes = torch.stack([width - x1, y0, width - x0, y1], 1)
    return image.flip(2), replace(targets, boxes=boxes, masks=None if targets.masks is None else targets.masks.flip(2))


def vflip(image: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """Mirrors up and down."""
    x0, y0, x1, y1 = targets.boxes.unbind(1)
    height = image.shape[1]
    boxes = torch.stack([x0, height - y1, x1, height - y0], 1)
    return image.flip(1), replace(targets, boxes=boxes, masks=None if targets.masks is None else targets.masks.flip(1))


def crop(image: Tensor, targets: Targets, box: tuple[int, int, int, int]) -> tuple[Tensor, Targets]:
    """Cuts out a rectangle.

    Boxes that reach beyond it are clipped and no longer tight. Of those, one that keeps less than a pixel on a side,
    or whose mask label keeps no pixel, is dropped.

    Args:
        image: [3, H, W].
        targets: of the image.
        box: x0, y0, x1, y1 whole pixels within the image.
    """
    x0, y0, x1, y1 = box
    boxes = targets.boxes
    offset, limit = boxes.new_tensor([x0, y0, x0, y0]), boxes.new_tensor([x1 - x0, y1 - y0] * 2)
    moved = boxes - offset
    clipped = torch.minimum(moved.clamp(min=0), limit)
    whole = (clipped == moved).all(1)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = whole | (sides >= 1).all(1)
    masks = targets.masks
    if masks is not None:
        masks = masks[:, y0:y1, x0:x1]
        keep &= whole | ~targets.has_mask | masks.flatten(1).any(1)
    cut = replace(targets, boxes=clipped, masks=masks, tight=targets.tight & whole)[keep]
    return image[:, y0:y1, x0:x1], cut


def collate(
    images: Sequence[Tensor],
    targets: Sequence[Targets],
    image_ids: Sequence[int],
    *,
    stride: int = 32,
    ignore_bottom: Sequence[int] | None = None,
) -> Batch:
    """A batch of images of any sizes, padded with 0 at right and bottom to the least multiple of ``stride``.

    Args:
        images: N uint8 [3, H, W].
        targets: N.
        image_ids: N.
        stride: the network's largest.
        ignore_bottom: for each image, the rows at its bottom that take no part in the colour edges.
    """
    height = math.ceil(max(image.shape[1] for image in images) / stride) * stride
    width = math.ceil(max(image.shape[2] for image in images) / stride) * stride
    pixels = torch.zeros(len(images), 3, height, width, dtype=images[0].dtype)
    valid = torch.zeros(len(images), height, width, dtype=torch.bool)
    padded = []
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        h, w = image.shape[1:]
        pixels[i, :, :h, :w] = image
        valid[i, : max(0, h - (ignore_bottom[i] if ignore_bottom else 0)), :w] = True
        if target.masks is not None:
            target = replace(target, masks=F.pad(target.masks, (0, width - w, 0, height - h)))
        padded.append(target)
    return Batch(pixels, valid, padded, list(image_ids), [(image.shape[1], image.shape[2]) for image in images])


def eval_resize(image: Tensor, short_side: int, max_side: int = 1333) -> tuple[Tensor, Tensor]:
    """Resizes an image for inference; ``restore`` leads back.

    Args:
        image: uint8 [3, H, W].
        short_side: the shorter side wanted; 0 keeps the size.
        max_side: upper bound of the longer side, which wins.

    Returns:
        The image, and the scale [4] float32 by which its xyxy boxes are to be multiplied.
    """
    height, width = image.shape[1:]
    size = _fit(height, width, short_side, max_side) if short_side else (height, width)
    if size != (height, width):
        image = resample(image, size)
    return image, torch.tensor([size[1] / width, size[0] / height] * 2)


def restore(instances: Instances, height: int, width: int) -> Instances:
    """Instances of a resized image in the pixels of the original, which is [3, height, width].

    Masks come from the logits where there are any, else from the masks, by bilinear interpolation.
    """
    rows, columns = instances.masks.shape[1:]
    if (rows, columns) == (height, width):
        return instances
    masks = torch.zeros(len(instances), height, width, dtype=torch.bool, device=instances.masks.device)
    logits = None if instances.mask_logits is None else masks.new_zeros(masks.shape, dtype=torch.float32)
    for i in range(len(instances)):  # one by one: hundreds of float masks at once would take gigabytes
        source = instances.masks[i].float() - 0.5 if instances.mask_logits is None else instances.mask_logits[i].float()
        resized = F.interpolate(source[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
        masks[i] = resized > 0
        if logits is not None:
            logits[i] = resized
    scale = instances.boxes.new_tensor([width / columns, height / rows] * 2)
    return replace(instances, boxes=instances.boxes * scale, masks=masks, mask_logits=logits)


def _fit(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side at ``short_side``, or less where the longer would pass ``max_side``."""
    # One factor after the other, and halves rounded up, as in the published program: a pixel can depend on it.
    shorter, scale = min(height, width), short_side / min(height, width)
    down = min(1.0, max_side / (max(height, width) * scale))
    exact = [short_side * down if side == shorter else side * scale * down for side in (height, width)]
    return max(1, math.floor(exact[0] + 0.5)), max(1, math.floor(exact[1] + 0.5))
