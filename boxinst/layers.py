"""Layers that give what PyTorch's give, and cost less.

Shape letters: N images, C channels that go in, K that come out, h and w cells, T tiles of 4×4 cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FrozenBatchNorm2d


class FixedNorm(FrozenBatchNorm2d):
    """Batch normalisation with fixed statistics and affine, in one pass over features that keep their precision."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → the same shape."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # F.batch_norm would keep x for the backward pass, which has no use for it.
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


class Pointwise(nn.Conv2d):
    """A 1×1 convolution that a CPU computes as the product of matrices that it is, to the same values.

    With the channels last in memory the pixels are the rows of that matrix as they lie.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → [N, K, ⌈h / stride⌉, ⌈w / stride⌉]."""
        if x.device.type != "cpu":
            return super().forward(x)
        down, across = self.stride
        pixels = x[:, :, ::down, ::across].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _minimal_filtering() -> tuple[Tensor, Tensor, Tensor]:
    """The three transforms of F(4×4, 3×3) (arXiv 1509.09308, section 4.3), each as one matrix for both axes.

    Returns:
        [36, 36] of a tile of 6×6 cells, [36, 9] of the weights, [16, 36] of the products.
    """
    # Multiplies the polynomials of tile and weights at the points 0, 1, −1, 2, −2 and infinity.
    cells = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
    cells += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
    weights = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
    weights += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
    products = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    one, two, three = (torch.tensor(rows, dtype=torch.float64) for rows in (cells, weights, products))
    return torch.kron(one, one).float(), torch.kron(two, two).float(), torch.kron(three, three).float()


_OF_CELLS, _OF_WEIGHTS, _OF_PRODUCTS = _minimal_filtering()
_AT_ONCE = 98_304
"""Tiles times channels that are worked on together: the copies of them stay in a processor's cache."""


def _tiles(shape: Sequence[int]) -> tuple[int, int]:
    """How many tiles cover features of this shape, down and across."""
    return -(-shape[-2] // 4), -(-shape[-1] // 4)


class _Strip(NamedTuple):
    """Some rows of tiles of one image."""

    features: int
    """Which of the features."""
    image: int
    first: int
    rows: int
    across: int
    """Tiles in a row."""
    start: int
    """Of its tiles among those that are worked on together."""

    def of(self, tiles: Tensor) -> Tensor:
        """[a, b, T, C] of all that are worked on together → its own [rows, a, across, b, C], a view."""
        own = tiles[:, :, self.start : self.start + self.rows * self.across]
        return own.unflatten(2, (self.rows, self.across)).permute(2, 0, 3, 1, 4)

    def cells(self, framed: Tensor) -> Tensor:
        """The cells under and around its tiles.

        Args:
            framed: [N, 4 down + 2, 4 across + 2, C], features with a frame of one cell.

        Returns:
            [rows, 6, across, 6, C], a view: neighbours share two cells.
        """
        _, down, across, _ = framed.stride()
        size = (self.rows, 6, self.across, 6, framed.shape[3])
        return framed[self.image, 4 * self.first :].as_strided(size, (4 * down, down, 4 * across, across, 1))

    def blocks(self, features: Tensor) -> Tensor:
        """[N, 4 down, 4 across, C] → the cells under its tiles [rows, 4, across, 4, C], a view."""
        rows = features[self.image, 4 * self.first : 4 * (self.first + self.rows)]
        return rows.unflatten(0, (self.rows, 4)).unflatten(2, (self.across, 4))

    def add(self, cells: Tensor, sums: Tensor) -> None:
        """Add cells [rows, 6, across, 6, C] where ``cells`` takes them from, in [N, down + 1, 4, across + 1, 4, C]."""
        own = sums[self.image, self.first : self.first + self.rows + 1]
        own[:-1, :, :-1] += cells[:, :4, :, :4]
        own[1:, :2, :-1] += cells[:, 4:, :, :4]
        own[:-1, :, 1:, :2] += cells[:, :4, :, 4:]
        own[1:, :2, 1:, :2] += cells[:, 4:, :, 4:]


def _strips(shapes: list[torch.Size], limit: int) -> Iterator[tuple[list[_Strip], int]]:
    """All rows of tiles of features of these shapes, in parcels of at most ``limit`` tiles, or of one row if it has
    more, each with its number of tiles."""
    parcel: list[_Strip] = []
    count = 0
    for k, shape in enumerate(shapes):
        down, across = _tiles(shape)
        for image in range(shape[0]):
            first = 0
            while first < down:
                if parcel and count + across > limit:
                    yield parcel, count
                    parcel, count = [], 0
                rows = min(max((limit - count) // across, 1), down - first)
                parcel.append(_Strip(k, image, first, rows, across, count))
                first, count = first + rows, count + rows * across
    if parcel:
        yield parcel, count


def _parcels(weight: Tensor, features: Sequence[Tensor]) -> Iterator[tuple[list[_Strip], list[Tensor]]]:
    """The strips of features, parcel by parcel, each with room for its cells [6, 6, T, C], the same transformed
    [36, T, C], the products [36, T, K] and the tiles [4, 4, T, K]."""
    k, c = weight.shape[:2]
    room: list[Tensor] = []
    for parcel, t in _strips([x.shape for x in features], _AT_ONCE // max(c, k)):
        if not room or room[0].shape[2] != t:
            room = [weight.new_empty(size) for size in ((6, 6, t, c), (36, t, c), (36, t, k), (4, 4, t, k))]
        yield parcel, room


def _framed(x: Tensor) -> Tensor:
    """[N, C, h, w] → [N, 4 down + 2, 4 across + 2, C]: whole tiles, with a frame of one cell of zeros."""
    down, across = _tiles(x.shape)
    framed = x.new_zeros(len(x), 4 * down + 2, 4 * across + 2, x.shape[1])
    framed[:, 1 : x.shape[2] + 1, 1 : x.shape[3] + 1] = x.permute(0, 2, 3, 1)
    return framed


def _filters(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] → [36, K, C]."""
    return (_OF_WEIGHTS @ weight.reshape(-1, 9).T).view(36, *weight.shape[:2])


class _Filtering(torch.autograd.Function):
    """A 3×3 convolution of a few features by minimal filtering: a quarter of the products, all of them of matrices.

    A tile of 4×4 cells of the result takes 6×6 cells, which become 36 numbers for each channel, as do the weights;
    their 36 products, each of the matrices [T, C] and [C, K], become the tile. The gradients go the same way back.
    Features and weights are kept for it, and transformed again.
    """

    @staticmethod
    def forward(weight: Tensor, bias: Tensor | None, *features: Tensor) -> tuple[Tensor, ...]:
        filters, framed = _filters(weight).transpose(1, 2), [_framed(x) for x in features]
        out = [x.new_empty(len(x), *(4 * count for count in _tiles(x.shape)), len(weight)) for x in features]
        for parcel, (cells, transformed, products, tiles) in _parcels(weight, features):
            for strip in parcel:
                strip.of(cells).copy_(strip.cells(framed[strip.features]))
            torch.mm(_OF_CELLS, cells.view(36, -1), out=transformed.view(36, -1))
            torch.bmm(transformed, filters, out=products)
            torch.mm(_OF_PRODUCTS, products.view(36, -1), out=tiles.view(16, -1))
            for strip in parcel:
                own, place = strip.of(tiles), strip.blocks(out[strip.features])
                place.copy_(own) if bias is None else torch.add(own, bias, out=place)
        cropped = (y[:, : x.shape[2], : x.shape[3]] for x, y in zip(features, out, strict=True))
        return tuple(y.contiguous().permute(0, 3, 1, 2) for y in cropped)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight, _, *features = inputs
        ctx.save_for_backward(weight, *features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *features = ctx.saved_tensors
        has_bias = ctx.needs_input_grad[1]
        filters, framed = _filters(weight), [_framed(x) for x in features]
        of_filters = torch.zeros_like(filters)
        whole, of_features = [], []
        for x, gradient in zip(features, gradients, strict=True):
            down, across = _tiles(x.shape)
            missing = (0, 0, 0, 4 * across - x.shape[3], 0, 4 * down - x.shape[2])
            pixels = gradient.permute(0, 2, 3, 1)
            whole.append(F.pad(pixels, missing) if any(missing) else pixels)
            # With the frame of one cell, and two more: a tile's 6×6 cells reach two into its neighbours.
            of_features.append(x.new_zeros(len(x), down + 1, 4, across + 1, 4, x.shape[1]))
        for parcel, (cells, transformed, products, tiles) in _parcels(weight, features):
            for strip in parcel:
                strip.of(tiles).copy_(strip.blocks(whole[strip.features]))
            torch.mm(_OF_PRODUCTS.T, tiles.view(16, -1), out=products.view(36, -1))
            for strip in parcel:
                strip.of(cells).copy_(strip.cells(framed[strip.features]))
            torch.mm(_OF_CELLS, cells.view(36, -1), out=transformed.view(36, -1))
            of_filters.baddbmm_(products.transpose(1, 2), transformed)
            torch.bmm(products, filters, out=transformed)
            torch.mm(_OF_CELLS.T, transformed.view(36, -1), out=cells.view(36, -1))
            for strip in parcel:
                strip.add(strip.of(cells), of_features[strip.features])
        unframed = (
            y.flatten(3, 4).flatten(1, 2)[:, 1 : x.shape[2] + 1, 1 : x.shape[3] + 1].permute(0, 3, 1, 2)
            for x, y in zip(features, of_features, strict=True)
        )
        of_weight = (of_filters.flatten(1).T @ _OF_WEIGHTS).view_as(weight)
        of_bias = torch.stack([g.sum((0, 2, 3)) for g in gradients]).sum(0) if has_bias else None
        return of_weight, of_bias, *unframed


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1, which a CPU trains by minimal filtering where there are many channels and cells:
    that multiplies a quarter as often.

    Its rounding is coarser, some 1e-5 of the largest value. So nothing but training takes it.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → [N, K, h, w]."""
        return self.each([x])[0]

    def each(self, features: list[Tensor]) -> list[Tensor]:
        """The same for features of several sizes, such as the levels of a pyramid, whose tiles go together."""
        if self._pays(features):
            return list(_Filtering.apply(self.weight, self.bias, *features))
        return [super(Conv3x3, self).forward(x) for x in features]

    def _pays(self, features: list[Tensor]) -> bool:
        """Whether minimal filtering may be used, and costs less."""
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return False
        single = all(x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 for x in features)
        tiles = sum(len(x) * math.prod(_tiles(x.shape)) for x in features)
        # What the weights cost to transform is gained back on so many tiles: more where the cache does not hold them.
        enough = tiles >= max(20, self.in_channels * self.out_channels // 8192)
        wide = min(self.in_channels, self.out_channels) >= 80
        return single and enough and wide and not torch.is_autocast_enabled("cpu")
