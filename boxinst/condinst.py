"""The network: ResNet-FPN, a shared mask branch, and two sources of parameters for the dynamic mask head.

CondInst: arXiv 2003.05664. *detect* takes the parameters from FCOS locations, as published; *prompt* takes them
from the features of a given box and so makes one mask for every box.

Shape letters: N images, P instances or given boxes, C mask channels, K parameters of one instance, H and W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from boxinst import predict
from boxinst.backbone import FPN, ResNet
from boxinst.config import ModelConfig
from boxinst.dynamic import HeadShape, aligned_upsample
from boxinst.errors import InputError
from boxinst.fcos import DETECT_LEVELS, DenseHead, DenseOutputs, norm_groups
from boxinst.layers import Conv3x3, Pointwise
from boxinst.structures import Instances
from boxinst.tensors import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE, load_backbone, load_strict

_HIDDEN = 256
"""Units of the prompt head between the pooled features and the parameters."""

SAMPLES = 2
"""Points in each direction that RoIAlign takes the mean of in a cell."""


@dataclass
class Outputs:
    """What one forward pass says of a batch; masks are made from it by the dynamic head."""

    mask_features: Tensor
    """[N, C, h, w] at the mask stride."""
    dense: DenseOutputs | None
    """The FCOS head, when the model detects and was not told to leave it out."""
    prompt: Tensor | None
    """[P, K] parameters, one row per given box in order, when the model takes prompts and boxes were given."""


class MaskBranch(nn.Module):
    """Adds up the pyramid's levels at the mask stride and turns them into the shared mask features."""

    def __init__(
        self, levels: tuple[int, ...], in_channels: int, channels: int, out_channels: int, layers: int
    ) -> None:
        super().__init__()

        def block(inputs: int) -> nn.Sequential:
            conv = Conv3x3(inputs, channels, bias=False)
            nn.init.kaiming_uniform_(conv.weight, a=1)  # as published
            return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))

        self.levels = levels
        self.refine = nn.ModuleList(block(in_channels) for _ in levels)
        self.tower = nn.Sequential(*(block(channels) for _ in range(layers)), Pointwise(channels, out_channels, 1))

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Pyramid features by level → [N, out_channels, h, w] at the finest of its levels."""
        finest, *coarser = self.levels
        x = self.refine[0](features[finest])
        for level, refine in zip(coarser, list(self.refine)[1:], strict=True):
            y = refine(features[level])
            n, factor = len(y), 2 ** (level - finest)
            x = x + aligned_upsample(y.flatten(0, 1), factor).unflatten(0, (n, -1))
        return self.tower(x)


def pool_without_waiting(features: list[Tensor], boxes: list[Tensor], levels: tuple[int, ...], cells: int) -> Tensor:
    """What torchvision's ``MultiScaleRoIAlign`` gives, in a form whose sizes are known beforehand.

    That one sorts the boxes by their level, and waits for a GPU to say how many each has; here every level pools all
    boxes, and those of another level are left out: on a GPU that costs less than to wait.

    Args:
        features: [N, C, h, w] of each level.
        boxes: N of [n, 4] in pixels.
        levels: log2 of the stride of each of the features, rising by one.
        cells: side of the grid.

    Returns:
        [P, C, cells, cells].
    """
    of = LevelMapper(levels[0], levels[-1])(boxes)  # [P], from 0
    images = torch.cat([torch.full_like(b[:, :1], n) for n, b in enumerate(boxes)])
    regions = torch.cat([images, torch.cat(boxes)], 1)
    pooled = regions.new_zeros((len(regions), features[0].shape[1], cells, cells), dtype=features[0].dtype)
    for k, (level, maps) in enumerate(zip(levels, features, strict=True)):
        found = roi_align(maps, regions.to(maps.dtype), cells, 0.5**level, SAMPLES)
        pooled = torch.where((of == k)[:, None, None, None], found.to(pooled.dtype), pooled)
    return pooled


class PromptHead(nn.Module):
    """Reads the features around a given box and writes the parameters of its dynamic head."""

    def __init__(self, channels: int, levels: tuple[int, ...], cells: int, context: float, head: HeadShape) -> None:
        super().__init__()
        self.levels, self.context, self.cells = levels, context, cells
        self.pool = MultiScaleRoIAlign([str(k) for k in levels], cells, sampling_ratio=SAMPLES)
        groups = norm_groups(channels)
        self.convs = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU()
                )
                for _ in range(2)
            )
        )
        self.hidden = nn.Sequential(nn.Linear(channels * cells**2, _HIDDEN), nn.LayerNorm(_HIDDEN), nn.ReLU())
        self.controller = nn.Linear(_HIDDEN, head.num_parameters)
        # Start from one common head that already responds to the features (the bias), so that the product of
        # three layers does not start at zero, where its gradient vanishes; the boxes then learn to differ.
        nn.init.normal_(self.controller.weight, std=0.1)
        with torch.no_grad():
            start = torch.zeros(1, head.num_parameters)
            for weight, _ in head.split(start):
                nn.init.kaiming_normal_(weight[0])
            self.controller.bias.copy_(start[0])

    def forward(self, features: dict[int, Tensor], boxes: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Pyramid features, N lists of boxes [n, 4] in pixels, padded (height, width) → [P, K]."""
        grown = []
        for b in boxes:
            centre, half = (b[:, :2] + b[:, 2:]) / 2, (b[:, 2:] - b[:, :2]).clamp(min=1.0) * (self.context / 2)
            # Half precision would move a side of a box by pixels.
            precision = torch.promote_types(features[self.levels[0]].dtype, torch.float32)
            grown.append(torch.cat([centre - half, centre + half], 1).to(precision))
        if grown[0].device.type == "cpu":
            x = self.pool({str(k): features[k] for k in self.levels}, grown, [size] * len(boxes))
        else:
            x = pool_without_waiting([features[k] for k in self.levels], grown, self.levels, self.cells)
        # Adam moves every weight by the learning rate, so a sum over all hidden units moves by many times that, and
        # the product of three layers made of it runs away. Normalised units and this factor keep the steps small.
        hidden = self.hidden(self.convs(x).flatten(1)) * _HIDDEN**-0.5
        return self.controller(hidden)


class CondInst(nn.Module):
    """Instance masks from shared mask features and per-instance parameters.

    Args:
        config: the network.
        pretrained: fetch ``config.backbone_weights``; False where all weights are about to be loaded.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        self.config = config
        levels = tuple(range(config.mask_level, 6))
        head, channels = HeadShape.of(config), config.fpn_channels
        self.backbone = ResNet(
            config.backbone,
            config.width,
            frozen_norm=config.frozen_norm or bool(config.backbone_weights),
            stride_in_1x1=config.stride_in_1x1,
            frozen_stages=config.frozen_stages,
        )
        if config.backbone_weights and pretrained:
            load_backbone(self.backbone, config)
        self.fpn = FPN(self.backbone.channels, channels, finest=levels[0], top=config.detect)
        self.mask_branch = MaskBranch(
            levels, channels, config.mask_branch_channels, config.mask_channels, config.mask_branch_layers
        )
        # A class list may still be empty while only prompts are used; the dense head then keeps one class.
        classes = max(len(config.classes), 1)
        self.dense_head = (
            DenseHead(channels, classes, head.num_parameters, layers=config.dense_layers, groups=config.head_groups)
            if config.detect
            else None
        )
        self.prompt_head = (
            PromptHead(channels, tuple(k for k in levels if k >= 2), config.prompt_cells, config.prompt_context, head)
            if config.prompt
            else None
        )
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """RGB 0..255 [N, 3, H, W] → network input; padding (beyond ``sizes``) is 0 after normalisation."""
        x = (images.float() - self.pixel_mean) / self.pixel_std
        for n, (height, width) in enumerate(sizes):
            x[n, :, height:] = 0
            x[n, :, :, width:] = 0
        return x

    def forward(
        self,
        images: Tensor,
        boxes: list[Tensor] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        detect: bool = True,
    ) -> Outputs:
        """One pass over a batch.

        Args:
            images: [N, 3, H, W] RGB in 0..255, contrast already stretched; H and W multiples of 32.
            boxes: N tensors [n, 4] xyxy pixels to make masks for, or None.
            sizes: N (height, width) without padding; all of the image when None.
            detect: run the FCOS head, where the model has one.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise InputError(
                "images", f"{height}×{width}", "Pad height and width to multiples of 32 (transforms.collate)."
            )
        x = self.normalize(images, sizes or [(height, width)] * len(images))
        features = self.fpn(self.backbone(x.contiguous(memory_format=torch.channels_last)))
        return Outputs(
            mask_features=self.mask_branch(features),
            dense=self.dense_head([features[k] for k in DETECT_LEVELS]) if detect and self.dense_head else None,
            prompt=(
                None
                if self.prompt_head is None or boxes is None
                else self.prompt_head(features, boxes, (height, width))
            ),
        )

    def segment(
        self, images: list[Tensor], boxes: list[Tensor], labels: list[Tensor] | None = None, *, logits: bool = False
    ) -> list[Instances]:
        """One mask for every given box. See ``predict.segment``."""
        return predict.segment(self, images, boxes, labels, logits=logits)

    def detect(
        self,
        images: list[Tensor],
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
        logits: bool = False,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Instances]:
        """Detections with masks. See ``predict.detect``."""
        return predict.detect(
            self,
            images,
            score_threshold=score_threshold,
            max_detections=max_detections,
            logits=logits,
            sizes=sizes,
        )


def load(path: str | Path, device: str | torch.device = "cpu") -> CondInst:
    """A model from the folder that ``boxinst.save`` wrote, ready to predict.

    Raises:
        InputError: not such a folder, written by a newer version, or weights that do not fit the config.
    """
    folder = Path(path)
    remedy = "Give a folder that boxinst.save wrote (model.safetensors and config.json)."
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise InputError("model", str(folder), remedy)
    try:
        data = json.loads((folder / CONFIG_FILE).read_text())
        version, fields = data["format"], dict(data["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(folder / CONFIG_FILE), f"unreadable ({error!r})", remedy) from error
    if version > FORMAT_VERSION:
        raise InputError(str(folder), f"model format {version}, this program reads up to {FORMAT_VERSION}", "Upgrade.")
    for name, value in fields.items():  # JSON has no tuples
        fields[name] = tuple(value) if isinstance(value, list) else value
    try:
        config = ModelConfig(**fields)
    except TypeError as error:
        raise InputError(str(folder / CONFIG_FILE), str(error), "Written by another version: upgrade.") from error
    model = CondInst(config, pretrained=False)
    load_strict(model, load_file(folder / WEIGHTS_FILE), str(folder))
    return model.to(device).eval()
