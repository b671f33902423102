"""From an image to a pyramid of features: ResNet and FPN.

FPN: arXiv 1612.03144.

Shape letters: N images, H and W pixels, h and w cells of a level. Level l has a stride of 2^l pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from boxinst.config import BACKBONES


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
        if len(x) and large and plain and alone and torch.is_grad_enabled() and torch._nnpack_available():
            return _Winograd.apply(x, self.weight, self.bias)
        return super().forward(x)


class ResNet(resnet.ResNet):
    """torchvision's ResNet as a pyramid of features, with a settable width.

    Args:
        name: a key of ``config.BACKBONES``.
        width: channels of the stem; 64 is the published network.
        frozen_norm: batch normalisation with fixed statistics and affine, for pretrained weights.
        stride_in_1x1: bottlenecks halve the resolution in their first convolution, as in Caffe's ResNets.
        frozen_stages: 1 the stem, 2 the first stage of blocks too, ...: parameters that are not trained.
    """

    def __init__(
        self, name: str, width: int, *, frozen_norm: bool, stride_in_1x1: bool = False, frozen_stages: int = 0
    ) -> None:
        kind, layers = BACKBONES[name]
        block = getattr(resnet, kind)
        norm: Callable[..., nn.Module] = FixedNorm if frozen_norm else nn.BatchNorm2d
        super().__init__(block, list(layers), norm_layer=norm)
        del self.fc
        if width != 64:  # torchvision fixes the stem at 64 channels, so a slimmer trunk is laid here
            self.inplanes = width
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = norm(width)
            stages = [
                self._make_layer(block, width * 2**k, count, stride=1 if k == 0 else 2)
                for k, count in enumerate(layers)
            ]
            self.layer1, self.layer2, self.layer3, self.layer4 = stages
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if stride_in_1x1 and kind == "Bottleneck":
            for first in (stage[0] for stage in stages):  # torchvision lays the stride into the second convolution
                first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # torchvision has no parameter for these
                if module.kernel_size == (1, 1):
                    module.__class__ = Pointwise
                elif module.kernel_size == (3, 3) and module.stride == (1, 1):
                    module.__class__ = Conv3x3
        for module in [self.conv1, self.bn1][: 2 * frozen_stages] + stages[: max(frozen_stages - 1, 0)]:
            module.requires_grad_(False)
        self.channels = {1: width, **{level: width * 2 ** (level - 2) * block.expansion for level in (2, 3, 4, 5)}}

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """[N, 3, H, W] → features by level: 1 (the stem, stride 2), 2, 3, 4, 5 (stride 32)."""
        stem = self.relu(self.bn1(self.conv1(x)))
        c2 = self.layer1(self.maxpool(stem))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return {1: stem, 2: c2, 3: c3, 4: c4, 5: self.layer4(c4)}


class FPN(nn.Module):
    """Feature pyramid from ``finest`` to level 5, and P6, P7 by strided convolutions where detection wants them."""

    def __init__(self, in_channels: dict[int, int], channels: int, *, finest: int, top: bool) -> None:
        super().__init__()
        self.levels = tuple(range(finest, 6))
        self.lateral = nn.ModuleDict({str(k): Pointwise(in_channels[k], channels, 1) for k in self.levels})
        self.output = nn.ModuleDict({str(k): Conv3x3(channels, channels) for k in self.levels})
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if top else None
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if top else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: dict[int, Tensor]) -> dict[int, Tensor]:
        """Backbone features by level → pyramid features [N, channels, h, w] by level."""
        out: dict[int, Tensor] = {}
        coarser: Tensor | None = None
        for level in reversed(self.levels):
            x = self.lateral[str(level)](features[level])
            if coarser is not None:
                x = x + F.interpolate(coarser, scale_factor=2, mode="nearest")
            out[level] = self.output[str(level)](x)
            coarser = x
        if self.p6 is not None and self.p7 is not None:
            out[6] = self.p6(out[5])
            out[7] = self.p7(F.relu(out[6]))
        return out
