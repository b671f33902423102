"""A unit for colour distances: how much colours change around a cell."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LEAST_CONTRAST = 1.0
"""Mean colour distance below which a place counts as flat: one ΔE of CIE-LAB is just about visible, so that smaller
differences are noise."""


def local_contrast(distances: Tensor, valid: Tensor, reach: int) -> Tensor:
    """Mean of the valid distances [N, K, h, w] over the (2·reach + 1)² cells around each cell → [N, 1, h, w]."""

    def around(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.sum(1, keepdim=True), 2 * reach + 1, stride=1, padding=reach)

    mean = around(distances * valid) / around(valid.float()).clamp(min=1e-6)
    return mean.clamp(min=LEAST_CONTRAST)
