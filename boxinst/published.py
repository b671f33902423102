"""Published checkpoints of BoxInst and CondInst under this network's names: AdelaiDet's and MMDetection's.

Both hold the network of ``condinst.py`` without its prompt head. They differ in names, in the order of the input's
channels and their scale, in the place of the backbone's stride, and in sizes, which are read off the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from boxinst.config import BACKBONES, ModelConfig
from boxinst.dynamic import HeadShape
from boxinst.errors import InputError
from boxinst.fcos import DETECT_LEVELS, SIZES_OF_INTEREST
from boxinst.tensors import from_detectron2_backbone

Layout = Literal["adelaidet", "mmdet"]

COCO_CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors"),
    *("teddy bear", "hair drier", "toothbrush"),
)
"""The classes of COCO in label order."""

_HEAD_LAYERS = 3
"""Layers of the dynamic head in every published checkpoint."""

_ADELAIDET = (
    (r"backbone\.fpn_(lateral|output)([3-5])\.(\w+)", r"fpn.\1.\2.\3"),
    (r"backbone\.top_block\.(p[67])\.(\w+)", r"fpn.\1.\2"),
    (r"proposal_generator\.fcos_head\.cls_tower\.(.+)", r"dense_head.class_tower.\1"),
    (r"proposal_generator\.fcos_head\.bbox_tower\.(.+)", r"dense_head.box_tower.\1"),
    (r"proposal_generator\.fcos_head\.cls_logits\.(.+)", r"dense_head.class_logits.\1"),
    (r"proposal_generator\.fcos_head\.bbox_pred\.(.+)", r"dense_head.distances.\1"),
    (r"proposal_generator\.fcos_head\.ctrness\.(.+)", r"dense_head.centerness.\1"),
    (r"proposal_generator\.fcos_head\.scales\.(\d)\.scale", r"dense_head.scales.\1"),
    (r"controller\.(\w+)", r"dense_head.controller.\1"),
)
"""AdelaiDet's names and this network's; ``mask_branch`` has the same ones, the backbone is Detectron2's."""

_MMDET_LEVEL = {
    "lateral": ("lateral.3", "lateral.4", "lateral.5"),
    "fpn": ("output.3", "output.4", "output.5", "p6", "p7"),
}
"""What the positions in MMDetection's two lists of the pyramid's convolutions are here."""

_MMDET_UNLIKE = (
    (r"style\s*=\s*['\"]caffe['\"]", "a backbone of Caffe's kind (style='caffe'), whose input is another"),
    (r"norm_on_bbox\s*=\s*False", "box sides as exponentials (norm_on_bbox=False)"),
    (r"centerness_on_reg\s*=\s*False", "centre-ness read off the class tower (centerness_on_reg=False)"),
    (r"add_extra_convs\s*=\s*(?!['\"]on_output['\"])['\"\w]+", "P6 made from something else than P5"),
    (r"relu_before_extra_convs\s*=\s*False", "P7 without a ReLU before it"),
    (r"size_of_interest\s*=\s*(?!8\b)\d+", "relative coordinates in another unit (size_of_interest)"),
    (r"dcn_on_last_conv\s*=\s*True", "deformable convolutions (dcn_on_last_conv=True)"),
)
"""Settings of MMDetection that leave no trace in names and shapes, and that this network cannot follow."""


@dataclass
class Translation:
    """A published checkpoint in this network's terms."""

    config: ModelConfig
    """The network that it is for."""
    state: dict[str, Tensor]
    """Its tensors by this network's names; a name without a counterpart is kept, for strict loading to report."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""


def translate(
    layout: Layout,
    state: Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
    *,
    source: str = "checkpoint",
    content: Any = None,
) -> Translation:
    """A published checkpoint in this network's terms.

    Args:
        layout: whose names it has.
        state: its tensors.
        classes: names in label order; the file's own, else COCO's, when None.
        source: what an error names.
        content: the whole file, for what it says beside the tensors.

    Raises:
        InputError: a tensor is missing without which nothing can be read off, the network is another one, or the number
            of classes is.
    """
    if layout == "adelaidet":
        named, notes = _from_adelaidet(state, source)
        own_input = {"stride_in_1x1": True, "pixel_std": (1.0, 1.0, 1.0)}
    else:
        named, notes = _from_mmdet(state, source, content)
        own_input = {}
        classes = classes or _mmdet_classes(content)
    scales = [f"dense_head.scales.{k}" for k in range(len(DETECT_LEVELS))]
    if all(name in named for name in scales):
        named["dense_head.scales"] = torch.stack([named.pop(name).reshape(()) for name in scales])
    return Translation(_config(named, classes, source, own_input), named, notes)


def _from_adelaidet(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    notes, named, bottom_up = [], {}, {}
    prefix = "backbone.bottom_up."
    auxiliary = [name for name in state if re.match(r"mask_branch\.(seg_head|logits)\.", name)]
    if auxiliary:
        notes.append(f"{len(auxiliary)} tensors of the semantic branch are left out: it only serves training.")
    for name, tensor in state.items():
        if name == "mask_head.sizes_of_interest":
            if tensor.tolist() != list(SIZES_OF_INTEREST):
                remedy = f"This network has {[int(s) for s in SIZES_OF_INTEREST]}: it cannot be imported."
                raise InputError(f"{source}, {name}", tensor.tolist(), remedy)
        elif name == "mask_head._iter":
            notes.append("The warm-up's counter is left out: here the warm-up follows the step of the training.")
        elif name.startswith(prefix):
            bottom_up[name.removeprefix(prefix)] = tensor
        elif name not in auxiliary:
            named[_renamed(name, _ADELAIDET)] = tensor
    metadata = {k.removeprefix(prefix): v for k, v in getattr(state, "_metadata", {}).items()}
    backbone = from_detectron2_backbone(bottom_up, metadata)
    return named | {f"backbone.{name}": tensor for name, tensor in backbone.items()}, notes


def _from_mmdet(state: Mapping[str, Tensor], source: str, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    meta = content.get("meta") if isinstance(content, Mapping) else None
    settings = str(meta.get("cfg", "")) if isinstance(meta, Mapping) else ""
    for pattern, what in _MMDET_UNLIKE:
        if re.search(pattern, settings):
            raise InputError(
                source, f"its config asks for {what}", "Give a checkpoint of the published BoxInst or CondInst."
            )
    count = sum(bool(re.fullmatch(r"mask_head\.mask_feature_head\.conv_branch\.\d+\.conv\.weight", n)) for n in state)
    names = (
        (r"backbone\.(.+)", r"backbone.\1"),
        *(
            (rf"neck\.{part}_convs\.{k}\.conv\.(\w+)", rf"fpn.{name}.\1")
            for part, levels in _MMDET_LEVEL.items()
            for k, name in enumerate(levels)
        ),
        (r"bbox_head\.conv_cls\.(\w+)", r"dense_head.class_logits.\1"),
        (r"bbox_head\.conv_reg\.(\w+)", r"dense_head.distances.\1"),
        (r"bbox_head\.conv_centerness\.(\w+)", r"dense_head.centerness.\1"),
        (r"bbox_head\.controller\.(\w+)", r"dense_head.controller.\1"),
        (r"bbox_head\.scales\.(\d)\.scale", r"dense_head.scales.\1"),
        (r"mask_head\.mask_feature_head\.convs_all_levels\.(\d)\.conv\1\.conv\.(\w+)", r"mask_branch.refine.\1.0.\2"),
        (r"mask_head\.mask_feature_head\.convs_all_levels\.(\d)\.conv\1\.bn\.(\w+)", r"mask_branch.refine.\1.1.\2"),
        (r"mask_head\.mask_feature_head\.conv_branch\.(\d+)\.conv\.(\w+)", r"mask_branch.tower.\1.0.\2"),
        (r"mask_head\.mask_feature_head\.conv_branch\.(\d+)\.bn\.(\w+)", r"mask_branch.tower.\1.1.\2"),
        (r"mask_head\.mask_feature_head\.conv_pred\.(\w+)", rf"mask_branch.tower.{count}.\1"),
    )
    named = {}
    for name, tensor in state.items():
        if name.startswith("backbone.") and name.endswith("num_batches_tracked"):
            continue  # a counter that fixed statistics do not need
        if found := re.fullmatch(r"bbox_head\.(cls|reg)_convs\.(\d+)\.(conv|gn)\.(\w+)", name):
            tower = "class_tower" if found[1] == "cls" else "box_tower"
            # A tower here is one sequence: convolution, normalisation, ReLU, convolution, ...
            named[f"dense_head.{tower}.{3 * int(found[2]) + (found[3] == 'gn')}.{found[4]}"] = tensor
        else:
            named[_renamed(name, names)] = tensor
    return named, []


def _mmdet_classes(content: Any) -> Sequence[str] | None:
    """The classes that an MMDetection file names, if it does."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    data = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    if not isinstance(data, Mapping):
        return None
    return data.get("classes") or data.get("CLASSES")


def _renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _config(
    state: Mapping[str, Tensor], classes: Sequence[str] | None, source: str, own_input: dict[str, Any]
) -> ModelConfig:
    """The network that tensors of this network's names are for."""

    def size(name: str) -> int:
        if name not in state:
            remedy = "Give a BoxInst or CondInst checkpoint with ResNet and FPN, and --from as its origin."
            raise InputError(source, f"no tensor is what is called {name} here", remedy)
        return state[name].shape[0]

    def count(pattern: str) -> int:
        return sum(bool(re.fullmatch(pattern, name)) for name in state)

    layers = count(r"mask_branch\.tower\.\d+\.0\.weight")
    mask_channels = size(f"mask_branch.tower.{layers}.weight")
    levels, towers = count(r"mask_branch\.refine\.\d+\.0\.weight"), _tower_layers(state)
    if levels != 3:
        raise InputError(source, f"{levels} levels in the mask branch", "Give a checkpoint with P3, P4 and P5 there.")
    if towers[0] != towers[1]:
        value = f"{towers[0]} convolutions in the class tower, {towers[1]} in the box tower"
        raise InputError(source, value, "This network has as many in both: it cannot be imported.")
    channels = size("fpn.lateral.3.weight")
    return ModelConfig(
        classes=_classes(size("dense_head.class_logits.weight"), classes, source),
        backbone=_backbone(state, source),
        width=size("backbone.conv1.weight"),
        frozen_norm=True,
        frozen_stages=2,
        fpn_channels=channels,
        prompt=False,
        dense_layers=towers[0],
        head_groups=0 if channels == 256 else 32,
        mask_stride=8,
        mask_branch_channels=size("mask_branch.refine.0.0.weight"),
        mask_branch_layers=layers,
        mask_channels=mask_channels,
        head_channels=_head_channels(size("dense_head.controller.weight"), mask_channels, source),
        head_layers=_HEAD_LAYERS,
        **own_input,
    )


def _tower_layers(state: Mapping[str, Tensor]) -> list[int]:
    """Convolutions in the class tower and in the box tower."""
    return [
        sum(name.startswith(f"dense_head.{tower}_tower.") and tensor.ndim == 4 for name, tensor in state.items())
        for tower in ("class", "box")
    ]


def _backbone(state: Mapping[str, Tensor], source: str) -> str:
    kind = "Bottleneck" if "backbone.layer1.0.conv3.weight" in state else "BasicBlock"
    blocks = tuple(
        len({m[1] for name in state if (m := re.match(rf"backbone\.layer{k}\.(\d+)\.", name))}) for k in (1, 2, 3, 4)
    )
    for name, shape in BACKBONES.items():
        if shape == (kind, blocks):
            return name
    remedy = f"Give a checkpoint with one of {', '.join(BACKBONES)}."
    raise InputError(source, f"a backbone of {blocks} blocks ({kind})", remedy)


def _head_channels(parameters: int, mask_channels: int, source: str) -> int:
    """Channels of the dynamic head that has so many parameters."""
    for channels in range(1, 257):
        if HeadShape(mask_channels, channels, _HEAD_LAYERS).num_parameters == parameters:
            return channels
    value = f"{parameters} parameters of an instance at {mask_channels} mask channels"
    remedy = f"No head of {_HEAD_LAYERS} layers that reads relative coordinates has so many: it cannot be imported."
    raise InputError(source, value, remedy)


def _classes(count: int, names: Sequence[str] | None, source: str) -> tuple[str, ...]:
    if not names and count != len(COCO_CLASSES):
        remedy = "Name them by --classes, in label order (or a file with a name on each line)."
        raise InputError(source, f"{count} classes, which are not COCO's {len(COCO_CLASSES)}", remedy)
    names = tuple(names or COCO_CLASSES)
    if len(names) != count:
        remedy = (
            f"Give {count} names. To train it for other classes, import it with its own, and then "
            "`boxinst train --init FOLDER --init-classes new`."
        )
        raise InputError("--classes", f"{len(names)} names, but {source} has {count} classes", remedy)
    return names
