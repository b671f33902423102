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
from boxinst.tensors import DETECTRON2_BACKBONE, Names, from_detectron2_backbone, renamed

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

_TOWERS = 32
"""Most convolutions of a tower whose names are known: far more than anybody publishes."""

_SCALES = "dense_head.scales.{a}"
_SIZES_OF_INTEREST = "mask_head.sizes_of_interest"

ADELAIDET: Names = (
    *((f"backbone.bottom_up.{there}", f"backbone.{here}") for there, here in DETECTRON2_BACKBONE),
    ("backbone.fpn_lateral{a}.{z}", "fpn.lateral.{a}.{z}"),
    ("backbone.fpn_output{a}.{z}", "fpn.output.{a}.{z}"),
    ("backbone.top_block.p{a}.{z}", "fpn.p{a}.{z}"),
    ("proposal_generator.fcos_head.cls_tower.{a}.{z}", "dense_head.class_tower.{a}.{z}"),
    ("proposal_generator.fcos_head.bbox_tower.{a}.{z}", "dense_head.box_tower.{a}.{z}"),
    ("proposal_generator.fcos_head.cls_logits.{z}", "dense_head.class_logits.{z}"),
    ("proposal_generator.fcos_head.bbox_pred.{z}", "dense_head.distances.{z}"),
    ("proposal_generator.fcos_head.ctrness.{z}", "dense_head.centerness.{z}"),
    ("proposal_generator.fcos_head.scales.{a}.scale", _SCALES),
    ("controller.{z}", "dense_head.controller.{z}"),
)
"""AdelaiDet's names and this network's. The mask branch has the same ones."""


def mmdet_names(mask_layers: int) -> Names:
    """MMDetection's names and this network's. The backbone has the same ones.

    Args:
        mask_layers: convolutions of the mask branch after the levels are added up.
    """
    mask = "mask_head.mask_feature_head"
    pyramid = {
        "lateral": ("lateral.3", "lateral.4", "lateral.5"),
        "fpn": ("output.3", "output.4", "output.5", "p6", "p7"),
    }
    return (
        *(
            (f"neck.{part}_convs.{k}.conv.{{z}}", f"fpn.{name}.{{z}}")
            for part, levels in pyramid.items()
            for k, name in enumerate(levels)
        ),
        *(  # a tower here is one sequence: convolution, normalisation, ReLU, convolution, ...
            (f"bbox_head.{there}_convs.{k}.{part}.{{z}}", f"dense_head.{here}_tower.{3 * k + offset}.{{z}}")
            for there, here in (("cls", "class"), ("reg", "box"))
            for k in range(_TOWERS)
            for offset, part in enumerate(("conv", "gn"))
        ),
        ("bbox_head.conv_cls.{z}", "dense_head.class_logits.{z}"),
        ("bbox_head.conv_reg.{z}", "dense_head.distances.{z}"),
        ("bbox_head.conv_centerness.{z}", "dense_head.centerness.{z}"),
        ("bbox_head.controller.{z}", "dense_head.controller.{z}"),
        ("bbox_head.scales.{a}.scale", _SCALES),
        *(
            (f"{mask}.convs_all_levels.{k}.conv{k}.{part}.{{z}}", f"mask_branch.refine.{k}.{n}.{{z}}")
            for k in range(3)
            for n, part in enumerate(("conv", "bn"))
        ),
        (f"{mask}.conv_branch.{{a}}.conv.{{z}}", "mask_branch.tower.{a}.0.{z}"),
        (f"{mask}.conv_branch.{{a}}.bn.{{z}}", "mask_branch.tower.{a}.1.{z}"),
        (f"{mask}.conv_pred.{{z}}", f"mask_branch.tower.{mask_layers}.{{z}}"),
    )


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
    names: Names
    """Pairs of names, elsewhere and here."""
    missing: list[str]
    """Names elsewhere of tensors that are not there and have no counterpart of their own here."""
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
        InputError: the network is another one, or the number of classes is.
    """
    missing: list[str] = []
    if layout == "adelaidet":
        names: Names = ADELAIDET
        own_input = {"stride_in_1x1": True, "pixel_std": (1.0, 1.0, 1.0)}
        named, notes = _from_adelaidet(state, source)
        missing += [name for name in (_SIZES_OF_INTEREST,) if name not in state]
    else:
        names = mmdet_names(_count(state, r"mask_head\.mask_feature_head\.conv_branch\.(\d+)\."))
        own_input = {}
        classes = classes or _mmdet_classes(content)
        _check_mmdet(content, source)
        # The counter of the backbone's normalisation is of no use to fixed statistics.
        kept = (k for k in state if not (k.startswith("backbone.") and k.endswith("num_batches_tracked")))
        named, notes = {renamed(name, names): state[name] for name in kept}, []
    back = [(here, there) for there, here in names]
    scales = [_SCALES.format(a=k) for k in range(len(DETECT_LEVELS))]
    missing += [renamed(name, back) for name in scales if name not in named]
    named["dense_head.scales"] = torch.stack([named.pop(name, torch.ones(1)).reshape(()) for name in scales])
    return Translation(_config(_Sizes(named), classes, own_input, source), named, names, missing, notes)


def _from_adelaidet(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    notes, named, bottom_up = [], {}, {}
    prefix = "backbone.bottom_up."
    auxiliary = [name for name in state if re.match(r"mask_branch\.(seg_head|logits)\.", name)]
    if auxiliary:
        notes.append(f"{len(auxiliary)} tensors of the semantic branch are left out: it only serves training.")
    for name, tensor in state.items():
        if name == _SIZES_OF_INTEREST:
            if tensor.tolist() != list(SIZES_OF_INTEREST):
                remedy = f"This network has {[int(s) for s in SIZES_OF_INTEREST]}: it cannot be imported."
                raise InputError(f"{source}, {name}", tensor.tolist(), remedy)
        elif name == "mask_head._iter":
            notes.append("The warm-up's counter is left out: here the warm-up follows the step of the training.")
        elif name.startswith(prefix):
            bottom_up[name.removeprefix(prefix)] = tensor
        elif name not in auxiliary:
            named[renamed(name, ADELAIDET)] = tensor
    metadata = {k.removeprefix(prefix): v for k, v in getattr(state, "_metadata", {}).items()}
    backbone = from_detectron2_backbone(bottom_up, metadata)
    return named | {f"backbone.{name}": tensor for name, tensor in backbone.items()}, notes


def _check_mmdet(content: Any, source: str) -> None:
    """Refuse a file whose config departs from the published one, as far as it says so."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    settings = str(meta.get("cfg", "")) if isinstance(meta, Mapping) else ""
    for pattern, what in _MMDET_UNLIKE:
        if re.search(pattern, settings):
            remedy = "Give a checkpoint of the published BoxInst or CondInst."
            raise InputError(source, f"its config asks for {what}", remedy)


def _mmdet_classes(content: Any) -> Sequence[str] | None:
    """The classes that an MMDetection file names, if it does."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    data = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    if not isinstance(data, Mapping):
        return None
    return data.get("classes") or data.get("CLASSES")


def _count(state: Mapping[str, Tensor], pattern: str, *, each: int = 1) -> int:
    """How many numbers the names hold where ``pattern`` has its group, ``each`` in a row counting as one."""
    return len({int(found[1]) // each for name in state if (found := re.match(pattern, name))})


@dataclass
class _Sizes:
    """What can be read off a checkpoint's tensors, by this network's names."""

    state: Mapping[str, Tensor]

    def of(self, name: str, published: int) -> int:
        """Length of the first axis of a tensor; as published where it is missing, for strict loading to report with
        whatever else is."""
        tensor = self.state.get(name)
        return tensor.shape[0] if tensor is not None and tensor.ndim else published


def _config(sizes: _Sizes, classes: Sequence[str] | None, own_input: dict[str, Any], source: str) -> ModelConfig:
    """The network that the tensors are for."""
    state = sizes.state
    layers = _count(state, r"mask_branch\.tower\.(\d+)\.[01]\.")
    mask_channels = sizes.of(f"mask_branch.tower.{layers}.weight", 16)
    levels = _count(state, r"mask_branch\.refine\.(\d+)\.")
    towers = [_count(state, rf"dense_head\.{tower}_tower\.(\d+)\.", each=3) for tower in ("class", "box")]
    if levels != 3:
        remedy = "Give a whole BoxInst or CondInst checkpoint, with P3, P4 and P5 there, and --from as its origin."
        raise InputError(source, f"{levels} levels in the mask branch", remedy)
    if towers[0] != towers[1]:
        value = f"{towers[0]} convolutions in the class tower, {towers[1]} in the box tower"
        raise InputError(source, value, "This network has as many in both: it cannot be imported.")
    channels = sizes.of("fpn.lateral.3.weight", 256)
    count = sizes.of("dense_head.class_logits.weight", len(classes or COCO_CLASSES))
    parameters = sizes.of("dense_head.controller.weight", HeadShape(mask_channels).num_parameters)
    return ModelConfig(
        classes=_classes(count, classes, source),
        backbone=_backbone(state, source),
        width=sizes.of("backbone.conv1.weight", 64),
        frozen_norm=True,
        frozen_stages=2,
        fpn_channels=channels,
        prompt=False,
        dense_layers=towers[0],
        head_groups=0 if channels == 256 else 32,
        mask_stride=8,
        mask_branch_channels=sizes.of("mask_branch.refine.0.0.weight", 128),
        mask_branch_layers=layers,
        mask_channels=mask_channels,
        head_channels=_head_channels(parameters, mask_channels, source),
        head_layers=_HEAD_LAYERS,
        **own_input,
    )


def _backbone(state: Mapping[str, Tensor], source: str) -> str:
    kind = "Bottleneck" if "backbone.layer1.0.conv3.weight" in state else "BasicBlock"
    blocks = tuple(_count(state, rf"backbone\.layer{k}\.(\d+)\.") for k in (1, 2, 3, 4))
    for name, shape in BACKBONES.items():
        if shape == (kind, blocks):
            return name
    remedy = f"Give a BoxInst or CondInst checkpoint with one of {', '.join(BACKBONES)}, and --from as its origin."
    raise InputError(source, f"a backbone of {blocks} blocks ({kind})", remedy)


def _head_channels(parameters: int, mask_channels: int, source: str) -> int:
    """Channels of the dynamic head that has so many parameters."""
    sizes = {c: HeadShape(mask_channels, c, _HEAD_LAYERS).num_parameters for c in range(1, 257)}
    nearest = min(sizes, key=lambda channels: abs(sizes[channels] - parameters))
    if sizes[nearest] == parameters:
        return nearest
    value = f"{parameters} parameters of an instance"
    remedy = (
        f"The nearest head that this network can have has {sizes[nearest]} (model.head_channels {nearest}, "
        f"model.mask_channels {mask_channels}, {_HEAD_LAYERS} layers, relative coordinates): it cannot be imported."
    )
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
