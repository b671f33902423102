"""The dynamic mask head: a pure function from mask features and per-instance parameters to mask logits.

CondInst, arXiv 2003.05664, section 3.2: each instance owns the weights of a tiny fully convolutional network
(1×1 convolutions) that reads the shared mask features and the coordinates relative to the instance.

Shape letters: N images, P instances, C mask channels, K parameters of one instance, h and w cells of the mask grid.
A cell (row i, column j) of a grid with a stride s stands for the pixel position ((j + ½)·s, (i + ½)·s).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from boxinst.config import ModelConfig

# Instances × cells that go through the layers at a time: on a CPU what one layer hands to the next stays in the cache.
_CELLS_AT_ONCE = 1 << 16
_CELLS_AT_ONCE_GPU = 1 << 22


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the dynamic head."""

    in_channels: int
    """C, without the two coordinates."""
    channels: int = 8
    layers: int = 3

    @classmethod
    def of(cls, model: ModelConfig) -> HeadShape:
        """The head of a network."""
        return cls(model.mask_channels, model.head_channels, model.head_layers)

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        inner = [self.channels] * (self.layers - 1)
        return list(zip([self.in_channels + 2, *inner], [*inner, 1], strict=True))

    @property
    def num_parameters(self) -> int:
        """K: all weights, then all biases."""
        return sum(i * o + o for i, o in self.widths)

    def split(self, parameters: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[P, K] → per layer weights [P, out, in] and biases [P, out, 1]."""
        weights = [i * o for i, o in self.widths]
        biases = [o for _, o in self.widths]
        parts = parameters.split(weights + biases, dim=1)
        return [
            (parts[k].unflatten(1, (o, i)), parts[self.layers + k].unsqueeze(2)) for k, (i, o) in enumerate(self.widths)
        ]


def relative_axes(
    points: Tensor, scales: Tensor, grid: tuple[int, int], stride: int, origins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Coordinates of the cells relative to each instance, (point − cell) / scale, one axis at a time.

    Args:
        points: [P, 2] reference points (x, y) in pixels.
        scales: [P, 2] what one unit of the relative coordinate is, in pixels.
        grid: (h, w) of the grid or window.
        stride: pixels per cell.
        origins: [P, 2] cell (column, row) of each window's first cell; the whole map when None.

    Returns:
        x [P, w] and y [P, h].
    """
    rows, columns = grid
    start = torch.zeros_like(points) if origins is None else origins.to(points.dtype)
    j = torch.arange(columns, device=points.device, dtype=points.dtype)
    i = torch.arange(rows, device=points.device, dtype=points.dtype)
    x = (start[:, :1] + j + 0.5) * stride
    y = (start[:, 1:] + i + 0.5) * stride
    return (points[:, :1] - x) / scales[:, :1], (points[:, 1:] - y) / scales[:, 1:]


def _coordinate_part(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What the coordinates and the bias add to the first layer, which is linear: a row plus a column vector.

    weight [P, channels, C + 2], bias [P, channels, 1], x [P, w], y [P, h] → [P, channels, h·w].
    """
    x, y = x.to(weight.dtype), y.to(weight.dtype)
    along_x = (weight[:, :, 0, None] * x[:, None] + bias).unsqueeze(2)  # [P, channels, 1, w]
    along_y = (weight[:, :, 1, None] * y[:, None]).unsqueeze(3)  # [P, channels, h, 1]
    return (along_x + along_y).flatten(2)


def _run_layers(first: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The layers after the first one. first: [P, channels, cells] before its ReLU → [P, cells]."""
    x = first
    for weight, bias in layers:
        x = torch.baddbmm(bias, weight, x.relu_())
    return x.squeeze(1)


def _in_one_precision(features: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the finer precision of the two: under autocast, features are coarser than what a controller in the
    precision of its weights says."""
    dtype = torch.promote_types(features.dtype, parameters.dtype)
    return features.to(dtype), parameters.to(dtype)


def _parts(start: int, end: int, cells: int, device: torch.device) -> Iterator[slice]:
    """The instances from ``start`` to ``end``, each of so many cells, in parts that go through the layers together."""
    limit = _CELLS_AT_ONCE if device.type == "cpu" else _CELLS_AT_ONCE_GPU
    step = max(1, limit // max(cells, 1))
    return (slice(first, min(first + step, end)) for first in range(start, end, step))


def dynamic_masks(
    features: Tensor,
    image_index: list[int],
    parameters: Tensor,
    points: Tensor,
    scales: Tensor,
    *,
    head: HeadShape,
    stride: int,
) -> Tensor:
    """Mask logits of every instance over the whole map.

    The first layer is linear in (x, y, features), so its feature part is one matrix product and its coordinate
    part is the sum of a row and a column vector: neither the features nor the coordinates are copied for each
    instance.

    Args:
        features: [N, C, h, w] mask features.
        image_index: P entries, ascending: the image of each instance.
        parameters: [P, K].
        points: [P, 2] reference points in pixels.
        scales: [P, 2] pixels per unit of relative coordinate.
        head: sizes of the dynamic head.
        stride: pixels per cell of ``features``.

    Returns:
        [P, h, w] logits.
    """
    h, w = features.shape[-2:]
    features, parameters = _in_one_precision(features, parameters)
    masks = [features.new_zeros((0, h, w)) + parameters.sum()]  # also where there is no instance, one can go back
    for n, group in groupby(range(len(image_index)), image_index.__getitem__):
        members = list(group)
        for part in _parts(members[0], members[-1] + 1, h * w, features.device):
            (weight, bias), *rest = head.split(parameters[part])
            x, y = relative_axes(points[part], scales[part], (h, w), stride)
            coordinates = _coordinate_part(weight, bias, x, y)
            # The features are the same for all, so that their part is one matrix product.
            first = torch.addmm(coordinates.flatten(0, 1), weight[:, :, 2:].flatten(0, 1), features[n].flatten(1))
            masks.append(_run_layers(first.view_as(coordinates), rest).unflatten(1, (h, w)))
    return torch.cat(masks)


def dynamic_mask_windows(
    features: Tensor,
    image_index: Tensor,
    parameters: Tensor,
    points: Tensor,
    scales: Tensor,
    origins: Tensor,
    size: tuple[int, int],
    *,
    head: HeadShape,
    stride: int,
) -> Tensor:
    """``dynamic_masks`` for one window of the map per instance; the cost follows the windows, not the map.

    Args:
        features: [N, C, h, w].
        image_index: [P] int64.
        parameters: [P, K].
        points: [P, 2] reference points in pixels.
        scales: [P, 2] pixels per unit of relative coordinate.
        origins: [P, 2] int64 cell (column, row) of each window's first cell; windows lie inside the map.
        size: (rows, columns) of every window.
        head: sizes of the dynamic head.
        stride: pixels per cell.

    Returns:
        [P, rows, columns] logits.
    """
    features, parameters = _in_one_precision(features, parameters)
    masks = [features.new_zeros((0, *size)) + parameters.sum()]
    for part in _parts(0, len(parameters), size[0] * size[1], features.device):
        (weight, bias), *rest = head.split(parameters[part])
        x, y = relative_axes(points[part], scales[part], size, stride, origins[part])
        crops = gather_windows(features, image_index[part], origins[part], size)  # [P, C, rows, columns]
        first = torch.baddbmm(_coordinate_part(weight, bias, x, y), weight[:, :, 2:], crops.flatten(2))
        masks.append(_run_layers(first, rest).unflatten(1, size))
    return torch.cat(masks)


def gather_windows(maps: Tensor, image_index: Tensor, origins: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts one window per instance out of a batch of maps.

    Args:
        maps: [N, C, h, w].
        image_index: [P] int64.
        origins: [P, 2] int64 (column, row) of the first cell.
        size: (rows, columns); every window lies inside the map.

    Returns:
        [P, C, rows, columns].
    """
    rows = origins[:, 1, None] + torch.arange(size[0], device=maps.device)  # [P, rows]
    columns = origins[:, 0, None] + torch.arange(size[1], device=maps.device)  # [P, columns]
    # Channels last while indexing: each gathered cell is then one contiguous run of C values.
    picked = maps.permute(0, 2, 3, 1)[image_index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


@dataclass
class WindowGroup:
    """Instances whose windows have one size, so that they run as one batch."""

    members: Tensor
    """[m] int64 positions in the list of boxes."""
    origins: Tensor
    """[m, 2] int64 (column, row) of the first cell."""
    size: tuple[int, int]
    """(rows, columns) in cells."""


def window_groups(boxes: Tensor, grid: tuple[int, int], stride: int, margin: float | Tensor) -> list[WindowGroup]:
    """Puts each box into a window of the mask grid that covers it and ``margin`` pixels around it.

    Window sides are rounded up to a few sizes (steps of about a third), so that boxes of any size run in a
    handful of batches. A window that would leave the map is moved inside; one larger than the map is the map.

    Args:
        boxes: [P, 4] xyxy pixels.
        grid: (h, w) of the mask grid.
        stride: pixels per cell.
        margin: pixels around each box, one number or [P, 1].

    Returns:
        Groups in ascending order of window size; together they hold every box once.
    """
    if not len(boxes):
        return []
    b = boxes.detach().float().cpu()
    if isinstance(margin, Tensor):
        margin = margin.detach().float().cpu()
    limit = torch.tensor([grid[1], grid[0]])
    first = ((b[:, :2] - margin) / stride).floor().clamp(min=0).minimum(limit - 1.0)
    last = ((b[:, 2:] + margin) / stride).ceil().clamp(min=1).minimum(limit.float())
    need = (last - first).clamp(min=1)
    side = torch.tensor(_window_sides(int(limit.max())))
    wanted = side[torch.searchsorted(side, need.amax(dim=1).ceil().long())]  # square windows: fewer groups
    size = torch.minimum(wanted[:, None], limit)  # [P, 2] (columns, rows)
    origins = (((first + last - size) / 2).round().long()).clamp(min=0).minimum(limit - size)
    groups = []
    for value in wanted.unique().tolist():
        members = (wanted == value).nonzero().squeeze(1)
        groups.append(
            WindowGroup(
                members.to(boxes.device),
                origins[members].to(boxes.device),
                (min(value, grid[0]), min(value, grid[1])),
            )
        )
    return groups


def _window_sides(largest: int) -> list[int]:
    """8, 12, 16, 24, 32, 48, ... until ``largest`` is covered."""
    sides, step = [8, 12], 8
    while sides[-1] < largest:
        step *= 2
        sides += [step, step * 3 // 2]
    return sides


def aligned_upsample(maps: Tensor, factor: int) -> Tensor:
    """Up-sampling of the published mask head: output j comes from source (j − ⌊f/2⌋) / f, clamped at the borders.

    Args:
        maps: [P, h, w].
        factor: f ≥ 1.

    Returns:
        [P, h·f, w·f].
    """
    if factor == 1:
        return maps
    h, w = maps.shape[-2:]
    x = F.pad(maps[:, None], (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, size=(factor * h + 1, factor * w + 1), mode="bilinear", align_corners=True)
    half = factor // 2
    x = F.pad(x, (half, 0, half, 0), mode="replicate")
    return x[:, 0, : factor * h, : factor * w]


def upsample(maps: Tensor, factor: int) -> Tensor:
    """Bilinear up-sampling that keeps cell centres where they are in the image.

    Args:
        maps: [P, h, w].
        factor: f ≥ 1.

    Returns:
        [P, h·f, w·f].
    """
    if factor == 1:
        return maps
    return F.interpolate(maps[:, None], scale_factor=factor, mode="bilinear", align_corners=False)[:, 0]


def box_sides(
    boxes: Tensor, grid: tuple[int, int], stride: float, origins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows [P, h] and the columns [P, w] of a grid that boxes hold, bool: ``box_masks`` before they are crossed."""
    start = torch.zeros_like(boxes[:, :2]) if origins is None else origins.to(boxes.dtype)

    def axis(low: Tensor, high: Tensor, offset: Tensor, length: int) -> Tensor:
        first, last = (low / stride - 0.5 - offset).ceil(), (high / stride - 0.5 - offset).floor()
        middle = ((low + high) / (2 * stride) - offset).floor()
        empty = last < first
        first = torch.where(empty, middle, first)
        last = torch.where(empty, middle, last)
        # A box at the far border of the map may round to one cell beyond it.
        first, last = first.clamp(max=length - 1), last.clamp(min=0)
        cells = torch.arange(length, device=boxes.device)
        return (cells >= first[:, None]) & (cells <= last[:, None])

    columns = axis(boxes[:, 0], boxes[:, 2], start[:, 0], grid[1])
    return axis(boxes[:, 1], boxes[:, 3], start[:, 1], grid[0]), columns


def box_masks(boxes: Tensor, grid: tuple[int, int], stride: float, origins: Tensor | None = None) -> Tensor:
    """Boxes drawn on a grid: cells whose centre lies inside.

    A box so small that it holds no centre gets the one cell nearest to its own centre, so that no instance is
    ever without a target.

    Args:
        boxes: [P, 4] xyxy pixels.
        grid: (h, w) of the grid or window.
        stride: pixels per cell.
        origins: [P, 2] (column, row) of each window's first cell; the whole map when None.

    Returns:
        [P, h, w] bool.
    """
    rows, columns = box_sides(boxes, grid, stride, origins)
    return rows[:, :, None] & columns[:, None, :]
