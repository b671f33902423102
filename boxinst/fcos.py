"""The detector under the masks: the FCOS dense head, with target assignment and decoding.

FCOS: arXiv 1904.01355 and its improved form, as CondInst and BoxInst use it.

Shape letters: N images, L locations of all levels together, n boxes of one image, C classes, K controller
parameters, h and w cells of a level. Level l has a stride of 2^l pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from boxinst.layers import Conv3x3

DETECT_LEVELS = (3, 4, 5, 6, 7)
SIZES_OF_INTEREST = (64.0, 128.0, 256.0, 512.0, 1024.0)
"""Per detection level: the largest side regressed there, and the unit of its relative coordinates (pixels)."""
REGRESSION_RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, math.inf))
CENTER_RADIUS = 1.5


@dataclass
class Controllers:
    """The controller of the dense head, a 3×3 convolution that runs only where its parameters are wanted.

    Of thousands of locations at most a hundred make a mask; the published program computes K parameters for all.
    """

    features: list[Tensor]
    """[N, channels, h, w] of each level, after the box tower."""
    weight: Tensor
    """[K, channels, 3, 3]."""
    bias: Tensor
    """[K]."""

    def at(self, image: int, where: Tensor) -> Tensor:
        """Parameters of the dynamic head, in the precision of the weights.

        Args:
            image: which image of the batch.
            where: [m] int64, locations.

        Returns:
            [m, K].
        """
        device, start = where.device, 0
        rows, corners, widths = [], [], []
        for level in self.features:
            h, w = level.shape[2:]
            rows.append(F.pad(level[image].permute(1, 2, 0), (0, 0, 1, 1, 1, 1)).flatten(0, 1))
            first = start + torch.arange(h, device=device) * (w + 2)  # of each row, where the frame is a cell wide
            corners.append((first[:, None] + torch.arange(w, device=device)).flatten())
            widths.append(torch.full((h * w,), w + 2, device=device))
            start += (h + 2) * (w + 2)
        three = torch.arange(3, device=device)
        down = torch.cat(widths)[where, None, None] * three[:, None]
        cells = torch.cat(corners)[where, None, None] + down + three  # [m, 3, 3]
        patches = torch.cat(rows)[cells.flatten(1)].flatten(1)
        return F.linear(patches.to(self.weight.dtype), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


@dataclass
class DenseOutputs:
    """What the dense head says at every location; L runs over the levels in ``DETECT_LEVELS``, rows, columns."""

    class_logits: Tensor
    """[N, L, C]."""
    distances: Tensor
    """[N, L, 4] left, top, right, bottom in units of the level's stride, ≥ 0."""
    centerness: Tensor
    """[N, L] logits."""
    controllers: Controllers
    """The parameters of the dynamic head."""
    grids: list[tuple[int, int]]
    """(h, w) of each level."""


def norm_groups(channels: int) -> int:
    """Groups of a normalisation of so many channels: 32 of the published 256, and fewer in slim heads, as a group of
    one value cannot be normalised."""
    return math.gcd(32, max(channels // 8, 1), channels)


class DenseHead(nn.Module):
    """FCOS head: two towers of convolutions with GroupNorm, shared by the levels; centre-ness and the controller
    read the box tower."""

    def __init__(self, channels: int, num_classes: int, num_parameters: int, *, layers: int, groups: int = 0) -> None:
        super().__init__()

        groups = groups or norm_groups(channels)

        def tower() -> nn.Sequential:
            parts: list[nn.Module] = []
            for _ in range(layers):
                parts += [Conv3x3(channels, channels), nn.GroupNorm(groups, channels)]
                parts += [nn.ReLU(inplace=True)]
            return nn.Sequential(*parts)

        self.class_tower, self.box_tower = tower(), tower()
        self.class_logits = Conv3x3(channels, num_classes)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.controller = nn.Conv2d(channels, num_parameters, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(DETECT_LEVELS)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        # Focal loss starts from a foreground probability of 0.01 (arXiv 1708.02002, section 4.1).
        nn.init.constant_(self.class_logits.bias, -math.log(99.0))  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> DenseOutputs:
        """Pyramid features of ``DETECT_LEVELS`` → the outputs at every location."""

        def flat(x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

        def through(parts: Iterable[nn.Module]) -> list[Tensor]:
            levels = features
            for part in parts:
                levels = part.each(levels) if isinstance(part, Conv3x3) else [part(x) for x in levels]
            return levels

        boxes = through(self.box_tower)
        classes = through([*self.class_tower, self.class_logits])
        distances = [flat(F.relu(self.distances(x) * self.scales[k])) for k, x in enumerate(boxes)]
        centerness = [flat(self.centerness(x)).squeeze(2) for x in boxes]
        return DenseOutputs(
            torch.cat([flat(x) for x in classes], 1),
            torch.cat(distances, 1),
            torch.cat(centerness, 1),
            Controllers(boxes, self.controller.weight, self.controller.bias),  # type: ignore[arg-type]
            [(x.shape[2], x.shape[3]) for x in features],
        )


@dataclass
class Locations:
    """The places where the dense head predicts."""

    points: Tensor
    """[L, 2] (x, y) pixels."""
    strides: Tensor
    """[L] pixels."""
    levels: Tensor
    """[L] int64, index into ``DETECT_LEVELS``."""
    sizes: Tensor
    """[L] pixels, of ``SIZES_OF_INTEREST``."""
    ranges: Tensor
    """[L, 2] pixels, of ``REGRESSION_RANGES``."""


def locations(grids: list[tuple[int, int]], device: torch.device) -> Locations:
    """Centres of the cells of each detection level, (column · s + ⌊s/2⌋, row · s + ⌊s/2⌋)."""
    points, strides, levels, sizes, ranges = [], [], [], [], []
    for k, (level, (h, w)) in enumerate(zip(DETECT_LEVELS, grids, strict=True)):
        s = 2**level
        y = torch.arange(h, device=device, dtype=torch.float32) * s + s // 2
        x = torch.arange(w, device=device, dtype=torch.float32) * s + s // 2
        points.append(torch.stack([x.repeat(h), y.repeat_interleave(w)], 1))
        strides.append(torch.full((h * w,), float(s), device=device))
        levels.append(torch.full((h * w,), k, device=device))
        sizes.append(torch.full((h * w,), SIZES_OF_INTEREST[k], device=device))
        # Filled in rather than looked up: no number is copied from the host, which would wait for the device.
        ranges.append(torch.stack([torch.full((h * w,), end, device=device) for end in REGRESSION_RANGES[k]], 1))
    return Locations(*(torch.cat(parts) for parts in (points, strides, levels, sizes, ranges)))


@dataclass
class Assignment:
    """Targets of the dense head for one image."""

    instance: Tensor
    """[L] int64: the box each location predicts, −1 for background."""
    distances: Tensor
    """[L, 4] left, top, right, bottom in units of the stride; 1 on background, so that every loss is finite there."""
    centerness: Tensor
    """[L] in 0..1, 0 on background."""


def sampling_centers(boxes: Tensor, size: tuple[int, int], masks: Tensor | None = None) -> Tensor:
    """The point of each instance around which its positive locations lie.

    As published it is the centre of gravity of the instance drawn on whole pixels, where a pixel counts by its index:
    of its mask where there is one, else of its box, which covers the pixels ⌊x0⌋ to ⌊x1⌋ and ⌊y0⌋ to ⌊y1⌋.

    Args:
        boxes: [n, 4] xyxy pixels.
        size: (height, width) of the padded image.
        masks: [n, height, width] bool; rows without any pixel count as no mask. None when there are no masks.

    Returns:
        [n, 2] (x, y).
    """
    far = torch.stack([boxes[:, 2].floor().clamp(max=size[1] - 1), boxes[:, 3].floor().clamp(max=size[0] - 1)], 1)
    centers = (boxes[:, :2].floor() + far) / 2
    if masks is None or not len(masks):
        return centers
    columns, rows = masks.sum(1), masks.sum(2)  # [n, width], [n, height] int64, so that the moments are exact
    area = columns.sum(1)
    moments = [(counts * torch.arange(counts.shape[1], device=masks.device)).sum(1) for counts in (columns, rows)]
    gravity = torch.stack(moments, 1) / area.clamp(min=1)[:, None]
    return torch.where((area > 0)[:, None], gravity.to(centers.dtype), centers)


def assign(places: Locations, boxes: Tensor, centers: Tensor | None = None) -> Assignment:
    """Which location predicts which box (FCOS section 3.1 with centre sampling).

    A location is positive for a box when it lies strictly inside the box and inside a square of ``CENTER_RADIUS``
    strides around its centre, and when the largest of its four distances falls in the level's range (both ends
    included). Where several boxes qualify, the smallest wins.

    Args:
        places: L locations.
        boxes: [n, 4] xyxy pixels.
        centers: [n, 2] from ``sampling_centers``; the middles of the boxes when None.
    """
    count = len(places.points)
    if not len(boxes):
        return Assignment(
            torch.full((count,), -1, device=boxes.device, dtype=torch.int64),
            boxes.new_ones((count, 4)),
            boxes.new_zeros(count),
        )
    x, y = places.points[:, 0, None], places.points[:, 1, None]  # [L, 1]
    x0, y0, x1, y1 = boxes.unbind(1)  # [n]
    distances = torch.stack([x - x0, y - y0, x1 - x, y1 - y], 2)  # [L, n, 4]
    reach = CENTER_RADIUS * places.strides[:, None]
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    if centers is not None:
        cx, cy = centers.unbind(1)
    inside = distances.amin(2) > 0
    inside &= (x - torch.maximum(cx - reach, x0)).minimum(torch.minimum(cx + reach, x1) - x) > 0
    inside &= (y - torch.maximum(cy - reach, y0)).minimum(torch.minimum(cy + reach, y1) - y) > 0
    largest = distances.amax(2)
    inside &= (largest >= places.ranges[:, :1]) & (largest <= places.ranges[:, 1:])
    area = torch.where(inside, (x1 - x0) * (y1 - y0), math.inf)  # [L, n]
    smallest, instance = area.min(1)
    positive = smallest < math.inf
    own = distances[torch.arange(count, device=boxes.device), instance]  # [L, 4]
    horizontal, vertical = own[:, 0::2].clamp(min=0), own[:, 1::2].clamp(min=0)
    centerness = torch.sqrt(
        horizontal.amin(1) / horizontal.amax(1).clamp(min=1e-9) * vertical.amin(1) / vertical.amax(1).clamp(min=1e-9)
    )
    return Assignment(
        torch.where(positive, instance, -1),
        torch.where(positive[:, None], own / places.strides[:, None], 1.0),
        torch.where(positive, centerness, 0.0),
    )


def sample_positives(instance: Tensor, scores: Tensor, limit: int, boxes: int) -> Tensor:
    """At most ``limit`` positive locations of one image, shared evenly among its boxes, best scores first.

    Of g boxes that have a positive location each gets at most max(⌊limit / g⌋, 1), also where there are fewer than
    ``limit`` in all, as published. Nothing here waits for the device, so that the result has one slot for each that
    there could be.

    Args:
        instance: [L] the box of each location, −1 for background.
        scores: [L] class × centre-ness, of the best class.
        limit: how many in all; each box gets at least one.
        boxes: how many boxes the image has.

    Returns:
        [max(limit, boxes)] int64 indices of the locations, by box and within a box by score, then −1 in empty slots.
    """
    owner = torch.where(instance >= 0, instance, boxes)
    order = scores.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]  # by box, within a box by score; the background comes last
    counts = owner.new_zeros(boxes + 1).scatter_add_(0, owner, torch.ones_like(owner))
    share = (limit // (counts[:boxes] > 0).sum().clamp(min=1)).clamp(min=1)
    grouped = owner[order]
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[grouped]
    chosen = (rank < share) & (grouped < boxes)
    slots = max(limit, boxes)
    # The n-th of the chosen goes to slot n, and all others to one more slot, which is cut off.
    slot = torch.where(chosen, chosen.cumsum(0) - 1, slots)
    return order.new_full((slots + 1,), -1).scatter_(0, slot, order)[:slots]


def boxes_from_distances(points: Tensor, distances: Tensor) -> Tensor:
    """[L, 2] points and [L, 4] distances in pixels → [L, 4] xyxy."""
    return torch.cat([points - distances[:, :2], points + distances[:, 2:]], 1)


@dataclass
class Detections:
    """Decoded detections of one image before their masks."""

    boxes: Tensor
    """[m, 4] xyxy pixels."""
    scores: Tensor
    """[m]."""
    labels: Tensor
    """[m] int64."""
    location: Tensor
    """[m] int64 index into the locations."""


def decode(
    outputs: DenseOutputs,
    image: int,
    size: tuple[int, int],
    *,
    score_threshold: float = 0.05,
    before_nms: int = 1000,
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> Detections:
    """Dense outputs of one image → its detections, best first.

    The score is √(class × centre-ness); candidates are those whose class × centre-ness is above
    ``score_threshold``, the best ``before_nms`` of each level. Boxes are clipped to the image last, as published: a
    box that reaches far beyond the image is told from its neighbours by all of its extent, and one of which nothing
    is left is dropped only then.

    Args:
        outputs: dense outputs of a batch.
        image: which image of the batch.
        size: its (height, width) without padding.
        score_threshold: in the unit of class × centre-ness.
        before_nms: candidates of a level.
        nms_threshold: IoU above which the lesser of two boxes of one class is dropped.
        max_detections: boxes of all classes that are kept.
    """
    places = locations(outputs.grids, outputs.class_logits.device)
    centerness = outputs.centerness[image].float().sigmoid()
    quality = outputs.class_logits[image].float().sigmoid() * centerness[:, None]  # [L, C]
    picked = []
    for k in range(len(outputs.grids)):
        location, label = ((quality > score_threshold) & (places.levels == k)[:, None]).nonzero().unbind(1)
        best = quality[location, label].topk(min(before_nms, len(location))).indices
        picked.append(torch.stack([location[best], label[best]], 1))
    location, label = torch.cat(picked).unbind(1)
    distances = outputs.distances[image].float()[location] * places.strides[location, None]
    boxes = boxes_from_distances(places.points[location], distances)
    scores = quality[location, label].sqrt()
    # batched_nms may move the classes apart by large shifts, which in single precision would blur the coordinates,
    # and does it right for coordinates from 0 only.
    moved = boxes.double() - (boxes.amin() if len(boxes) else 0)
    keep = batched_nms(moved, scores.double(), label, nms_threshold)[:max_detections]
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([size[1], size[0], size[1], size[0]]))
    keep = keep[((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)[keep]]
    return Detections(boxes[keep], scores[keep], label[keep], location[keep])
