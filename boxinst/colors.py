"""Colours of the cells that the losses work on, and a unit for their distances.

Shape letters: N images, K neighbours of a cell, H and W pixels, h and w cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# sRGB to XYZ (D65) and the white point of the 2° observer: the constants of skimage.color.rgb2lab.
_XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)

LEAST_CONTRAST = 1.0
"""Mean colour distance below which a place counts as flat: one ΔE of CIE-LAB is just about visible, so that smaller
differences are noise."""


def local_contrast(distances: Tensor, valid: Tensor, reach: int) -> Tensor:
    """Mean of the valid distances [N, K, h, w] over the (2·reach + 1)² cells around each cell → [N, 1, h, w]."""

    def around(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.sum(1, keepdim=True), 2 * reach + 1, stride=1, padding=reach)

    mean = around(distances * valid) / around(valid.float()).clamp(min=1e-6)
    return mean.clamp(min=LEAST_CONTRAST)


@torch.no_grad()
def cell_colors(images: Tensor, stride: int) -> Tensor:
    """CIE-LAB of an image reduced by averaging stride × stride pixels and cut to 8 bits, as BoxInst reduces it.

    Args:
        images: [N, 3, H, W] RGB in 0..255, uint8 or float.
        stride: pixels per cell, along each axis.

    Returns:
        [N, 3, H // stride, W // stride] float32.
    """
    return _lab_from_rgb(_reduced(images, stride).clamp(0, 255).long())


@torch.no_grad()
def root_colors(images: Tensor, stride: int) -> Tensor:
    """√(v + 4) of the values v of an image reduced like ``cell_colors``: [N, 3, H // stride, W // stride] float32.

    Noise is about the same everywhere on this scale: counted light, with two grey levels of noise from reading it out
    (Anscombe, 1948, and its generalisation). The middle between the colours of an object and its ground then lies near
    the outline that people draw, for bright objects on dark ground and the reverse. In LAB it lies inside the bright
    ones and outside the dark ones.
    """
    return (_reduced(images, stride) + 4).sqrt_()


def _reduced(images: Tensor, stride: int) -> Tensor:
    return F.avg_pool2d(images.float(), stride) if stride > 1 else images.float()


def cells_valid(valid: Tensor, stride: int) -> Tensor:
    """Whether the pixel at the centre of each cell is valid: [N, H, W] → [N, H // stride, W // stride] bool."""
    h, w = valid.shape[1] // stride, valid.shape[2] // stride
    return valid[:, stride // 2 :: stride, stride // 2 :: stride][:, :h, :w]


def _lab_from_rgb(rgb: Tensor) -> Tensor:
    """sRGB [N, 3, h, w] int64 in 0..255 -> CIE-LAB (D65, 2°) [N, 3, h, w] float32."""
    levels = torch.arange(256, dtype=torch.float64, device=rgb.device) / 255
    linear = torch.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)
    red, green, blue = linear.float()[rgb].unbind(1)
    f = []
    # Plain sums of products: a GPU may compute a matrix product in reduced precision.
    for (r, g, b), white in zip(_XYZ_FROM_RGB, _WHITE, strict=True):
        t = red * (r / white) + green * (g / white) + blue * (b / white)
        f.append(torch.where(t > 0.008856, t.clamp(min=0.008856) ** (1 / 3), 7.787 * t + 16 / 116))
    x, y, z = f
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
