"""Weights on disk: a model's own folder (safetensors and JSON), and published checkpoints imported as models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from boxinst import published
from boxinst.condinst import CondInst
from boxinst.errors import InputError
from boxinst.tensors import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE, check_tensors, load_strict, read_tensors

Source = str | Path | Mapping[str, Tensor]
"""A checkpoint's file, or its state dict."""


def save(model: CondInst, path: str | Path) -> None:
    """Writes a model's folder: ``model.safetensors`` and ``config.json``."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    text = json.dumps({"format": FORMAT_VERSION, "config": asdict(model.config)}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def from_adelaidet(source: Source, classes: Sequence[str] | None = None) -> CondInst:
    """BoxInst or CondInst as AdelaiDet publishes it, with ResNet and FPN, ready to detect in RGB images.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or a state dict of AdelaiDet's names.
        classes: names in label order; COCO's 80 when None.

    Returns:
        A model in evaluation mode, without the prompt head, which no published checkpoint has.

    Raises:
        InputError: not such a checkpoint, another network, or another number of classes.
    """
    return import_checkpoint("adelaidet", source, classes)[0]


def from_mmdetection(source: Source, classes: Sequence[str] | None = None) -> CondInst:
    """BoxInst or CondInst as MMDetection 3 publishes it, with ResNet and FPN, ready to detect in RGB images.

    Its network differs in sizes alone (BoxInst's dynamic head has 16 channels) and in the place of the backbone's
    stride. What it does after the network differs: MMDetection compares the class score alone with the threshold and
    reports class × centre-ness; here, as in AdelaiDet, the product is compared and its root is reported.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or a state dict of MMDetection's names.
        classes: names in label order; the file's own, else COCO's 80, when None.

    Raises:
        InputError: not such a checkpoint, another network, another number of classes, or a file whose config departs
            from the published one in a way that this network cannot express.
    """
    return import_checkpoint("mmdet", source, classes)[0]


def import_checkpoint(
    layout: published.Layout, source: Source, classes: Sequence[str] | None = None
) -> tuple[CondInst, list[str]]:
    """``from_adelaidet`` or ``from_mmdetection``, and notes on what of the checkpoint was left out and why."""
    content: Any = None
    if isinstance(source, Mapping):
        name, state = "state dict", check_tensors(source, "state dict")
    else:
        name = str(source)
        state, content = read_tensors(source)
    found = published.translate(layout, state, classes, source=name, content=content)
    model = CondInst(found.config, pretrained=False)
    load_strict(model, found.state, name, names=found.names, missing=found.missing)
    return model.eval(), found.notes


def with_classes(model: CondInst, classes: Sequence[str]) -> CondInst:
    """The same network for other classes: its classifier starts anew, everything else is kept.

    Args:
        model: with the FCOS head or without.
        classes: names in label order.

    Raises:
        InputError: no class is given.
    """
    if not classes:
        raise InputError("classes", "none given", "Give the names of the classes.")
    fresh = CondInst(replace(model.config, classes=tuple(classes)), pretrained=False)
    start = fresh.state_dict()
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("dense_head.class_logits.")}
    fresh.load_state_dict(start | kept)
    return fresh.train(model.training)
