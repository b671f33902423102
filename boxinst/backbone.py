"""From an image to a pyramid of features: ResNet and FPN.

FPN: arXiv 1612.03144.

Shape letters: N images, H and W pixels, h and w cells of a level. Level l has a stride of 2^l pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from boxinst.config import BACKBONES
from boxinst.layers import Conv3x3, FixedNorm, Pointwise


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
