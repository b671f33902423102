"""Files of tensors: read without running code, loaded strictly; and pretrained backbones from such files.

A ResNet comes in two layouts. torchvision's has the names of this package's own backbone, takes RGB divided by its
deviation, and halves the resolution in the 3×3 convolution of a bottleneck. Detectron2's (the ResNets of Caffe) has
other names, its own or Caffe2's, takes BGR in 0..255 less its mean, and halves it in the first 1×1 convolution.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from boxinst.config import ModelConfig
from boxinst.errors import InputError

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

_NORM_EPS = 1e-5
"""What the frozen normalisation of torchvision and of Detectron2 adds to the variance."""

Names = Sequence[tuple[str, str]]
"""Pairs of names, elsewhere and here: {a} and {b} stand for one number each, {z} for a last word."""

_PLACEHOLDERS = {"a": r"\d+", "b": r"\d+", "z": r"\w+"}

DETECTRON2_BACKBONE: Names = (
    ("stem.conv1.norm.{z}", "bn1.{z}"),
    ("stem.conv1.{z}", "conv1.{z}"),
    *(
        (f"res{k + 1}.{{a}}.{there}.{{z}}", f"layer{k}.{{a}}.{here}.{{z}}")
        for k in (1, 2, 3, 4)
        for there, here in (
            ("shortcut.norm", "downsample.1"),
            ("shortcut", "downsample.0"),
            ("conv{b}.norm", "bn{b}"),
            ("conv{b}", "conv{b}"),
        )
    ),
)
"""A ResNet's names in Detectron2 and in torchvision."""

CAFFE2_BACKBONE: Names = (
    ("conv1_w", "conv1.weight"),
    ("res_conv1_bn_s", "bn1.weight"),
    ("res_conv1_bn_b", "bn1.bias"),
    *(
        (f"res{k + 1}_{{a}}_{there}_{end}", f"layer{k}.{{a}}.{part}.{name}")
        for k in (1, 2, 3, 4)
        for there, conv, norm in (
            ("branch1", "downsample.0", "downsample.1"),
            *((f"branch2{letter}", f"conv{n}", f"bn{n}") for n, letter in enumerate("abc", start=1)),
        )
        for end, part, name in (("w", conv, "weight"), ("bn_s", norm, "weight"), ("bn_b", norm, "bias"))
    ),
)
"""A ResNet's names in Caffe2, as in the ImageNet weights that the published networks start from, and in torchvision."""

_RESIZED_BY = (
    ("dense_head.class_logits.", "model.classes (a new classifier: `boxinst train --init MODEL --init-classes new`)"),
    ("dense_head.controller.", "model.mask_channels, model.head_channels and model.head_layers"),
    ("prompt_head.controller.", "model.mask_channels, model.head_channels and model.head_layers"),
    ("prompt_head.hidden.", "model.prompt_cells and model.fpn_channels"),
    ("mask_branch.refine.", "model.mask_branch_channels and model.fpn_channels"),
    ("mask_branch.tower.", "model.mask_channels, model.mask_branch_channels and model.mask_branch_layers"),
    ("backbone.", "model.backbone and model.width"),
    ("fpn.", "model.fpn_channels"),
    ("dense_head.", "model.fpn_channels and model.dense_layers"),
)
"""Which options decide the size of a tensor, by the start of its name; the first that fits counts."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a checkpoint by name, and what else the file holds.

    Args:
        path: ``.safetensors``, or a file of ``torch.save``, which is read with ``weights_only=True``. The tensors may
            stand under ``model`` or ``state_dict``.

    Returns:
        The state dict, with its ``_metadata`` where it has one, and the whole content of the file.

    Raises:
        InputError: no such file, a pickle, or something that is not a state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError("checkpoint", str(file), "No such file: give a .pth or .safetensors file.")
    if file.suffix in (".pkl", ".pickle"):
        remedy = (
            "A pickle can run code, so it is not read. Where you trust it, load it there and write its arrays anew, "
            "under the names they have: torch.save({name: torch.from_numpy(array) for ...}, 'weights.pth')."
        )
        raise InputError("checkpoint", str(file), remedy)
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            "checkpoint", f"{file} cannot be read ({error})".replace("\n", " "), "Download it again."
        ) from error
    except Exception as error:  # torch raises pickle.UnpicklingError for what is not a tensor
        with file.open("rb") as opened:
            start = opened.read(2)
        if start != b"PK" and start[:1] != b"\x80":  # the marks of torch.save's archives, and of pickles
            raise InputError("checkpoint", f"{file} is no checkpoint", "Give a .pth or .safetensors file.") from error
        remedy = "Where you trust the file, load it there and save its state dict alone with torch.save."
        reason = " ".join(str(error).split())[:200]
        raise InputError("checkpoint", f"{file} holds more than tensors ({reason})", remedy) from error
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state = content[key]
            break
    return check_tensors(state, str(file)), content


def check_tensors(state: Any, source: str) -> dict[str, Tensor]:
    """``state`` itself, if it is a state dict.

    Raises:
        InputError: it is not, naming the first entry that is no tensor.
    """
    if not isinstance(state, Mapping) or not state:
        raise InputError(source, f"a {type(state).__name__} without tensors", "Give a state dict: tensors by name.")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(source, f"{name} is a {type(value).__name__}", "Give a state dict: tensors by name.")
    return state  # type: ignore[return-value]


def renamed(name: str, names: Names) -> str:
    """A name from elsewhere as it is here; itself where no pair fits."""
    for there, here in names:
        if found := _pattern(there).fullmatch(name):
            return here.format(**found.groupdict())
    return name


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", template)  # text, placeholder, text, ...
    for n, part in enumerate(parts):
        parts[n] = re.escape(part) if n % 2 == 0 else f"(?P<{part}>{_PLACEHOLDERS[part]})"
    return re.compile("".join(parts))


def load_strict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    prefix: str = "",
    names: Names = (),
    missing: Sequence[str] = (),
) -> None:
    """Loads ``state`` into ``model``; every key and shape must match.

    Args:
        model: the module.
        state: tensors by name.
        source: what the error names.
        prefix: where the module stands in the network, such as ``backbone.``; it picks the options that an error names.
        names: by which the tensors were renamed; an error then has their names elsewhere.
        missing: names elsewhere that were already found missing.

    Raises:
        InputError: lists the missing and unexpected keys and the shapes that differ, with the options that decide them.
    """
    back = [(here, there) for there, here in names]
    own = model.state_dict()
    problems = [f"missing {name}" for name in missing]
    problems += [f"missing {renamed(k, back)}" for k in own if k not in state]
    problems += [f"unexpected {renamed(k, back)}" for k in state if k not in own]
    differing = [k for k in own if k in state and state[k].shape != own[k].shape]
    problems += [f"{renamed(k, back)} is {list(state[k].shape)}, the model has {list(own[k].shape)}" for k in differing]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        found = (next((o for start, o in _RESIZED_BY if (prefix + k).startswith(start)), "") for k in differing)
        options = list(dict.fromkeys(o for o in found if o))
        remedy = "Use weights of the same architecture and class list as the config."
        if options:
            remedy += f" These sizes are set by {'; '.join(options)}."
        raise InputError(source, shown, remedy)
    model.load_state_dict(state)


def is_detectron2_backbone(state: Mapping[str, Tensor]) -> bool:
    """Whether a backbone has Detectron2's names, or Caffe2's."""
    return "stem.conv1.weight" in state or "conv1_w" in state


def from_detectron2_backbone(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """A ResNet of Detectron2's or Caffe2's names under torchvision's, for RGB input instead of BGR.

    Names that it does not know are kept, so that strict loading reports them.

    Args:
        state: tensors by name, such as ``stem.conv1.weight`` and ``res2.0.conv1.norm.weight``, or ``conv1_w`` and
            ``res2_0_branch2a_bn_s``.
        metadata: versions of the modules by name, as torch keeps them beside a state dict.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".norm.running_var") and 0 < _version(metadata, name.removesuffix(".running_var")) < 3:
            tensor = tensor - _NORM_EPS  # such old files hold the variance with ε already added
        out[renamed(name, (*DETECTRON2_BACKBONE, *CAFFE2_BACKBONE))] = tensor
    if not any(".running_" in name for name in out):
        # A Caffe model has its statistics merged into weight and bias: all of them, or a tensor is missing.
        for name in [n for n in out if re.fullmatch(r"(.+\.)?(bn\d|downsample\.1)\.weight", n)]:
            prefix = name.removesuffix("weight")
            out[f"{prefix}running_mean"] = torch.zeros_like(out[name])
            out[f"{prefix}running_var"] = torch.full_like(out[name], 1 - _NORM_EPS)
    if "conv1.weight" in out:
        out["conv1.weight"] = out["conv1.weight"].flip(1)
    return out


def _version(metadata: Mapping[str, Any] | None, module: str) -> int:
    return (metadata or {}).get(module, {}).get("version") or 0


def _read_backbone(config: ModelConfig) -> dict[str, Tensor]:
    backbone, weights = config.backbone, config.backbone_weights
    options = get_model_weights(backbone)
    names = {w.name: w for w in options}
    if weights == "imagenet" or weights in names:
        if config.stride_in_1x1:
            remedy = "Switch it off: torchvision's weights want the stride in the 3×3 convolution."
            raise InputError("model.stride_in_1x1", True, remedy)
        return (options.DEFAULT if weights == "imagenet" else names[weights]).get_state_dict(
            progress=True, check_hash=True
        )
    if not Path(weights).is_file():
        raise InputError(
            "model.backbone_weights",
            weights,
            f"Give `imagenet`, one of {', '.join(names)}, or an existing file of weights for {backbone}.",
        )
    state, _ = read_tensors(weights)
    state = {name.removeprefix("backbone.bottom_up."): tensor for name, tensor in state.items()}
    if not is_detectron2_backbone(state):
        return state
    if not config.stride_in_1x1 and config.backbone in ("resnet50", "resnet101"):
        remedy = f"Switch it on: {weights} has Detectron2's or Caffe2's names: its stride is in the 1×1 convolution."
        raise InputError("model.stride_in_1x1", False, remedy)
    state = from_detectron2_backbone(state)
    # Those weights want pixels that are not divided by a deviation; what the network divides is made good here.
    state["conv1.weight"] = state["conv1.weight"] * torch.tensor(config.pixel_std).view(1, 3, 1, 1)
    return state


def load_backbone(module: nn.Module, config: ModelConfig) -> None:
    """Loads the pretrained weights that ``config.backbone_weights`` names into a backbone with frozen normalisation.

    Args:
        module: the backbone.
        config: the network. The weights are ``imagenet``, the name of a torchvision weight, or a local file in
            torchvision's, Detectron2's or Caffe2's layout.

    Raises:
        InputError: unknown name, a file that cannot be read, a layout that disagrees with ``config.stride_in_1x1``, or
            keys that do not fit.
    """
    state = _read_backbone(config)
    # The classifier, what only training needs, and the bias that Caffe's normalisation takes out again are not part of
    # a frozen backbone.
    dropped, trained = ("fc.", "stem.fc.", "linear.", "fc1000_", "conv1_b"), ("num_batches_tracked", "_momentum")
    state = {k: v for k, v in state.items() if not k.startswith(dropped) and not k.endswith(trained)}
    load_strict(module, state, f"backbone weights {config.backbone_weights}", prefix="backbone.")
