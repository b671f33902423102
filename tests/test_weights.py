"""Models and backbones on disk: round trips, and errors that list what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

import boxinst
from boxinst import CondInst, InputError, ModelConfig

TINY = {"backbone": "resnet18", "width": 8, "fpn_channels": 16}
TINY |= {"mask_branch_channels": 8, "mask_branch_layers": 1, "dense_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    boxinst.save(CondInst(ModelConfig(classes=("a", "b"), contrast_stretch=(0.5, 99.8), **TINY)), path)
    return path


def test_round_trip(folder, tmp_path):
    model = boxinst.load(folder)
    assert not model.training
    assert model.config == ModelConfig(classes=("a", "b"), contrast_stretch=(0.5, 99.8), **TINY)
    boxinst.save(model, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again/config.json").read_bytes() == (folder / "config.json").read_bytes()
    image, boxes = torch.zeros(3, 40, 40, dtype=torch.uint8), torch.tensor([[1.0, 1, 30, 20]])
    a, b = (m.segment([image], [boxes], logits=True)[0] for m in (model, boxinst.load(tmp_path / "again")))
    torch.testing.assert_close(a.mask_logits, b.mask_logits)


def test_not_a_model(tmp_path):
    with pytest.raises(InputError, match=r"model\.safetensors and config\.json"):
        boxinst.load(tmp_path)


def test_newer_format(folder, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(InputError, match="99"):
        boxinst.load(tmp_path)
    data["config"]["wings"] = 2
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="wings"):
        boxinst.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="unreadable"):
        boxinst.load(tmp_path)


def test_weights_of_another_class_list_are_named(folder, tmp_path):
    boxinst.save(CondInst(ModelConfig(classes=("a", "b", "c"), **TINY)), tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"dense_head\.class_logits\.weight is \[3, .* the model has \[2, "):
        boxinst.load(tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbone_from_a_file(tmp_path, suffix):
    torch.manual_seed(3)
    state = resnet18().state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    config = ModelConfig(**{**TINY, "width": 64, "backbone_weights": str(path)})
    model = CondInst(config)
    torch.testing.assert_close(model.backbone.layer3[0].conv1.weight, state["layer3.0.conv1.weight"])
    torch.testing.assert_close(model.backbone.bn1.running_mean, state["bn1.running_mean"])


def test_backbone_errors(tmp_path):
    with pytest.raises(InputError, match="IMAGENET1K_V1"):
        CondInst(ModelConfig(**{**TINY, "width": 64, "backbone_weights": "imagenet21k"}))
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7), "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"missing bn1\.weight"):
        CondInst(ModelConfig(**{**TINY, "width": 64, "backbone_weights": str(tmp_path / "w.safetensors")}))
