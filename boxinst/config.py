"""Every choice about network, losses and augmentation. Imports nothing heavy: a command line is read at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from boxinst.errors import InputError

BACKBONES = {
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
    "resnet101": ("Bottleneck", (3, 4, 23, 3)),
}
"""Torchvision's residual block, and the number of them at each stride."""

ANY_FILL = (0.0, 1.0)
"""A ``LossConfig.fill_range`` that penalises nothing."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. Two models with equal configs have the same parameters by name and shape."""

    classes: tuple[str, ...] = ()
    """Names of the classes in label order. Left empty, training takes them from the corpus."""
    backbone: str = "resnet50"
    """resnet18, resnet34, resnet50 or resnet101. Smaller ones for laptops and simple objects."""
    width: int = 64
    """Channels of the backbone's stem. 64 is the published network; 32 halves every stage for small data on a CPU."""
    backbone_weights: str = ""
    """Where the backbone starts: empty for random weights with trainable normalisation; `imagenet`, or the name of a
    torchvision weight such as `IMAGENET1K_V2`, or a file in torchvision's or Detectron2's layout, for pretrained
    weights with frozen normalisation."""
    stride_in_1x1: bool = False
    """Where a bottleneck of ResNet-50 and -101 halves the resolution: in its first 1×1 convolution, as Detectron2's and
    Caffe's weights want it, or in its 3×3 convolution, as torchvision's do."""
    frozen_norm: bool = False
    """Keep the statistics and the affine of the backbone's batch normalisation fixed. Always so where
    `backbone_weights` are given."""
    frozen_stages: int = 0
    """How much of the backbone is not trained: 1 the stem, 2 the first stage of blocks too, and so on to 5. 2 as
    published, for pretrained weights; 0 where the backbone starts from random weights."""
    fpn_channels: int = 256
    """Channels of the feature pyramid and the heads on it."""
    detect: bool = True
    """Train and keep the FCOS head: detections with masks, no boxes needed."""
    prompt: bool = True
    """Train and keep the box-prompt head: one mask for every given box."""
    dense_layers: int = 4
    """Convolutions in each tower of the FCOS head."""
    head_groups: int = 0
    """Groups of the normalisation in the towers of the FCOS head; must divide `fpn_channels`. 0 for 32, as published,
    at 256 channels, and for fewer in slimmer heads."""
    mask_stride: int = 8
    """Pixels per cell of the mask features: 8 as published, 4 or 2 where objects are only some 20 pixels wide. Mask
    logits, and so the losses, have half this stride."""
    mask_branch_channels: int = 128
    """Channels inside the mask branch."""
    mask_branch_layers: int = 4
    """Convolutions of the mask branch after the levels are added up."""
    mask_channels: int = 16
    """Channels of the mask features that the dynamic head reads."""
    head_channels: int = 8
    """Channels of the dynamic head."""
    head_layers: int = 3
    """Layers of the dynamic head."""
    prompt_context: float = 1.2
    """The prompt head looks at the given box grown by this factor."""
    prompt_cells: int = 7
    """Side of the grid that RoIAlign samples in that region."""
    contrast_stretch: tuple[float, float] | None = None
    """Percentiles (low, high) stretched to black and white, over the whole image, before anything else. Useful for dim
    images such as fluorescence microscopy: (0.5, 99.8)."""
    views: int = 1
    """Views of an image whose masks of given boxes are averaged: 1 the image alone, 2 with its mirror image, 4 upside
    down as well. Better masks for that many times the work; no change to training. For objects that may lie any way."""
    exclusive: bool = False
    """A pixel in several given boxes belongs to one mask, that of the highest probability there. For objects that touch
    or cover each other and whose masks must not overlap; no change to training."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """RGB mean that the network's input is shifted by."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """RGB deviation that the network's input is divided by."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise InputError("model.backbone", self.backbone, f"Choose one of {', '.join(BACKBONES)}.")
        if self.views not in (1, 2, 4):
            raise InputError("model.views", self.views, "Choose 1, 2 or 4.")
        if self.mask_stride not in (2, 4, 8):
            raise InputError("model.mask_stride", self.mask_stride, "Choose 2, 4 or 8.")
        if not (self.detect or self.prompt):
            raise InputError("model.detect and model.prompt", "both False", "Switch at least one of them on.")
        if self.backbone_weights and self.width != 64:
            raise InputError(
                "model.width", self.width, "Pretrained backbones have width 64: set it, or drop the weights."
            )
        for name in ("width", "fpn_channels", "mask_branch_channels", "mask_channels", "head_channels", "prompt_cells"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}", getattr(self, name), "Give a positive number.")
        for name in ("dense_layers", "mask_branch_layers"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name}", getattr(self, name), "Give 0 or more.")
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(v) and (v > 0 or name == "pixel_mean") for v in values):
                raise InputError(f"model.{name}", values, "Give a number for each of red, green and blue.")
        if not 0 <= self.frozen_stages <= 5:
            raise InputError("model.frozen_stages", self.frozen_stages, "Give 0 (train all) to 5 (none of it).")
        if self.head_groups < 0 or (self.head_groups and self.fpn_channels % self.head_groups):
            remedy = f"Give a divisor of model.fpn_channels ({self.fpn_channels}), or 0."
            raise InputError("model.head_groups", self.head_groups, remedy)
        if self.head_layers < 2:
            raise InputError("model.head_layers", self.head_layers, "Give at least 2.")
        if not 1 <= self.prompt_context < math.inf:
            raise InputError("model.prompt_context", self.prompt_context, "Give 1 (the box itself) or more.")
        if self.contrast_stretch is not None:
            low, high = self.contrast_stretch
            if not 0 <= low < high <= 100:
                raise InputError("model.contrast_stretch", self.contrast_stretch, "Give 0 ≤ low < high ≤ 100.")

    @property
    def mask_level(self) -> int:
        """log2 of the mask stride."""
        return int(math.log2(self.mask_stride))

    @property
    def loss_stride(self) -> int:
        """Pixels per cell of the mask logits."""
        return self.mask_stride // 2


@dataclass(frozen=True)
class LossConfig:
    """Weights and constants of the losses."""

    projection_weight: float = 1.0
    """Weight of the projection loss (BoxInst eq. 4)."""
    pairwise_weight: float = 1.0
    """Weight of the pairwise colour loss (BoxInst eq. 7). 0 leaves projection alone, which yields boxy masks."""
    mask_weight: float = 1.0
    """Weight of the dice loss on mask labels. Raise it where a few objects have masks and the rest only boxes, so that
    they are heard; where all have masks it scales the whole mask loss, which SGD feels like a higher rate."""
    warmup_steps: int = 10_000
    """Steps over which the pairwise weight grows from 0. 10,000 as published for 90,000 steps; for short schedules
    about a tenth of the steps. Raise it when masks collapse early in training."""
    color_threshold: float = 0.3
    """Least colour similarity (τ) of neighbours that are taken to have one label. Raise it when masks flow over their
    object's border, lower it when they stay patchy."""
    kernel_size: int = 3
    """Side of the neighbourhood of the colour edges: 3, 5 or 7."""
    dilation: int = 2
    """Spacing of that neighbourhood, in cells of the loss grid."""
    theta: float = 2.0
    """Scale θ of the colour similarity exp(−‖c_i − c_j‖ / θ)."""
    contrast_reach: int = 0
    """Measure colour distances against their local mean, over so many cells of the loss grid in each direction; θ is
    then in units of that mean. About the size of an object. For corpora of grainy and faint images together, where one
    threshold cannot fit all. 0 as published."""
    region_weight: float = 0.0
    """Weight of the two-region colour energy, in prompt mode: a mask should explain the colours in and around its box
    by one colour of its own and one of the rest. For objects of an even colour on an even ground, as cells are. 0 as
    published."""
    overlap_weight: float = 0.0
    """Weight of the penalty on pixels that several boxes hold and more than one of their masks takes, in prompt mode: a
    pixel has one owner. 0 as published."""
    fill_range: tuple[float, float] = ANY_FILL
    """Shares of its box that a mask may fill unpenalised, in prompt mode; (0, 1) for any, as published. Round objects
    fill up to 0.785 of their box, as an ellipse does, and seldom less than 0.6."""
    fill_weight: float = 1.0
    """Weight of the penalty on the rest."""
    teacher_weight: float = 0.0
    """Weight of the dice loss on the masks of a mean teacher, the running average of the network, in prompt mode and
    late in training, each mask weighing as much as the teacher is sure of it. 0 as published."""
    bottom_pixels: int = 0
    """Rows at the bottom of the original image that take no part in colour edges. 10 for COCO, whose photographs often
    have a border there; 0 elsewhere."""
    prompt_margin: float = 0.5
    """Background around each box that the prompt losses see, as a share of its longer side, and at least four cells of
    the mask features. It is what teaches that not everything is object: with little of it, masks saturate."""
    max_positives: int = 64
    """Detection: locations per image that get mask losses, shared evenly among its objects, best scores first."""
    max_positives_in_all: int = 0
    """Detection: where above 0, every positive location gets mask losses, up to this many over the images of a worker's
    batch, drawn at random, in place of the shares of `max_positives`. 500 as published for CondInst with masks."""

    def __post_init__(self) -> None:
        for name in (
            "projection_weight",
            "pairwise_weight",
            "mask_weight",
            "warmup_steps",
            "bottom_pixels",
            "prompt_margin",
            "max_positives_in_all",
            "contrast_reach",
            "region_weight",
            "overlap_weight",
            "fill_weight",
            "teacher_weight",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"loss.{name}", getattr(self, name), "Give 0 or more.")
        if not 0 <= self.color_threshold <= 1:
            raise InputError("loss.color_threshold", self.color_threshold, "Give a similarity between 0 and 1.")
        if self.kernel_size not in (3, 5, 7):
            raise InputError("loss.kernel_size", self.kernel_size, "Give 3, 5 or 7.")
        for name in ("dilation", "max_positives"):
            if getattr(self, name) < 1:
                raise InputError(f"loss.{name}", getattr(self, name), "Give at least 1.")
        if not 0 <= self.fill_range[0] < self.fill_range[1] <= 1:
            raise InputError("loss.fill_range", self.fill_range, "Give 0 ≤ least < most ≤ 1.")
        if not 0 < self.theta < math.inf:
            raise InputError("loss.theta", self.theta, "Give a positive number.")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a training image, in this order: contrast stretch, resize, crop, flips."""

    short_sides: tuple[int, ...] = ()
    """Multi-scale training: the shorter side is resized to one of these, drawn at random. Empty keeps the size."""
    max_side: int = 1333
    """Upper bound of the longer side when resizing."""
    crop: int = 0
    """Side of a square cut out at random, in pixels after resizing; a side that is shorter stays whole. 0 for no
    crop. Crops make dense images cheap and batches even; objects cut by the border train no mask."""
    hflip: bool = True
    """Mirror left and right, half of the time."""
    vflip: bool = False
    """Mirror up and down, half of the time. For images without an upright direction, such as microscopy."""
    contrast_stretch: tuple[float, float] | None = None
    """Percentiles of the whole image that become 0 and 255, for example 0.5 and 99.8; None leaves it as it is. Must
    equal the model's own setting, which training sees to."""

    def __post_init__(self) -> None:
        if any(side < 1 for side in self.short_sides):
            raise InputError("augment.short_sides", self.short_sides, "Give sides of at least 1 pixel.")
        if self.max_side < 1:
            raise InputError("augment.max_side", self.max_side, "Give at least 1 pixel.")
        if self.crop < 0:
            raise InputError("augment.crop", self.crop, "Give a side in pixels, or 0 for no crop.")
        if self.contrast_stretch is not None and not 0 <= self.contrast_stretch[0] < self.contrast_stretch[1] <= 100:
            raise InputError("augment.contrast_stretch", self.contrast_stretch, "Give 0 ≤ low < high ≤ 100.")
