"""Weights on disk: a model's own folder (safetensors and JSON), and pretrained backbones."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from boxinst.errors import InputError

if TYPE_CHECKING:
    from boxinst.condinst import CondInst

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save(model: CondInst, path: str | Path) -> None:
    """Writes a model's folder: ``model.safetensors`` and ``config.json``."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    text = json.dumps({"format": FORMAT_VERSION, "config": asdict(model.config)}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def load_strict(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads ``state`` into ``model``; every key and shape must match.

    Raises:
        InputError: lists the missing and unexpected keys and the shapes that differ.
    """
    own = model.state_dict()
    problems = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} is {list(state[k].shape)}, the model has {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise InputError(source, shown, "Use weights of the same architecture and class list as the config.")
    model.load_state_dict(state)


def _read_backbone(backbone: str, weights: str) -> dict[str, Tensor]:
    path = Path(weights)
    if path.suffix == ".safetensors" and path.is_file():
        return load_file(path)
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    options = get_model_weights(backbone)
    names = {w.name: w for w in options}
    if weights == "imagenet":
        return options.DEFAULT.get_state_dict(progress=True, check_hash=True)
    if weights in names:
        return names[weights].get_state_dict(progress=True, check_hash=True)
    raise InputError(
        "model.backbone_weights",
        weights,
        f"Give `imagenet`, one of {', '.join(names)}, or an existing file of torchvision weights for {backbone}.",
    )


def load_backbone(module: nn.Module, backbone: str, weights: str) -> None:
    """Loads pretrained weights in torchvision's layout into a backbone.

    Args:
        module: the backbone.
        backbone: its name in torchvision, for example ``resnet50``.
        weights: ``imagenet``, the name of a torchvision weight, or a local file.

    Raises:
        InputError: unknown name, or keys that do not fit.
    """
    state = _read_backbone(backbone, weights)
    # The classifier, and the counters that only trainable normalisation has, are not part of a frozen backbone.
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    load_strict(module, state, f"backbone weights {weights}")
