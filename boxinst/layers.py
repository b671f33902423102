"""Layers that give what PyTorch's give, and cost less.

Shape letters: N images, C channels, h and w cells.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FrozenBatchNorm2d

HAS_NNPACK = hasattr(torch, "_nnpack_spatial_convolution") and torch._nnpack_available()
"""Whether this PyTorch has it and this processor can run it."""


class FixedNorm(FrozenBatchNorm2d):
    """Batch normalisation with fixed statistics and affine, in one pass over features that keep their precision."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → the same shape."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # F.batch_norm would keep x for the backward pass, which has no use for it.
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


class Pointwise(nn.Conv2d):
    """A 1×1 convolution that one thread of a CPU computes about twice as fast, to the same values.

    PyTorch hands a 1×1 convolution of fewer than 16 images to oneDNN only where there are more threads, and else to a
    product of matrices of about half the speed. A worker of a cluster often has one thread, and a batch of few images.
    As every pixel is on its own here, the rows of the images can be the images of a larger batch, which goes to oneDNN;
    with the channels last in memory that is a view. On few pixels most of the time goes into reading the weights, and
    nothing is gained.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → [N, out_channels, ⌈h / stride⌉, ⌈w / stride⌉]."""
        down, across = self.stride
        n, channels, h, w = x.shape[0], x.shape[1], -(-x.shape[2] // down), -(-x.shape[3] // across)
        if x.device.type != "cpu" or torch.get_num_threads() > 1 or n * h * w < 256:
            return super().forward(x)
        pixels = x[:, :, ::down, ::across].permute(0, 2, 3, 1)
        rows = pixels.reshape(n * h, 1, w, channels).permute(0, 3, 1, 2)
        out = F.conv2d(rows, self.weight, self.bias).permute(0, 2, 3, 1)
        return out.reshape(n, h, w, self.out_channels).permute(0, 3, 1, 2)


class _Winograd(torch.autograd.Function):
    """A 3×3 convolution and its gradient for the input by minimal filtering (arXiv 1509.09308), an image at a time.

    The gradient for the input is itself a 3×3 convolution, with the weights turned around; that for the weights comes
    from oneDNN. NNPACK is slower on a batch than on its images one by one.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        of = [torch._nnpack_spatial_convolution(x[n : n + 1], weight, bias, 1) for n in range(len(x))]
        return of[0] if len(of) == 1 else torch.cat(of)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else [len(bias)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, *for_parameters = ctx.needs_input_grad
        of_x = _Winograd.forward(gradient, weight.flip(2, 3).transpose(0, 1), None) if for_x else None
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            *(gradient, x, weight, ctx.bias_sizes),
            *([1, 1], [1, 1], [1, 1], False, [0, 0], 1),  # stride, padding, dilation, not transposed, groups
            [False, *for_parameters],
        )
        return of_x, of_weight, of_bias


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1 that one thread of a CPU trains faster: by NNPACK, which multiplies about a fifth
    as often on many channels and pixels.

    Its rounding is about ten times as coarse, some 1e-5 of the largest value. So nothing but training takes it: a
    trained network gives the same numbers on every machine. With more threads NNPACK gains nothing over oneDNN.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → [N, out_channels, h, w]."""
        large = min(self.in_channels, self.out_channels) >= 80 and x.shape[2] * x.shape[3] >= 500
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        alone = torch.get_num_threads() == 1 and not torch.compiler.is_compiling()
        trains = self.training and torch.is_grad_enabled()
        if len(x) and large and plain and alone and trains and HAS_NNPACK:
            return _Winograd.apply(x, self.weight, self.bias)
        return super().forward(x)
