"""Models and backbones on disk: round trips, and errors that list what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18, resnet50

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


def test_weights_of_another_class_list_name_both_sizes_and_the_option(folder, tmp_path):
    boxinst.save(CondInst(ModelConfig(classes=("a", "b", "c"), **TINY)), tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"dense_head\.class_logits\.weight is \[3, .* the model has \[2, ") as caught:
        boxinst.load(tmp_path)
    assert "model.classes (a new classifier: `boxinst train --init MODEL --init-classes new`)" in caught.value.remedy


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


def detectron2_names(state):
    """A torchvision ResNet-50 under Detectron2's names, for BGR."""
    out = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "fc" or parts[-1] == "num_batches_tracked":
            continue
        if parts[0] == "conv1":
            out["stem.conv1.weight"] = tensor.flip(1)
        elif parts[0] == "bn1":
            out[f"stem.conv1.norm.{parts[-1]}"] = tensor
        else:
            at, kind = f"res{int(parts[0][-1]) + 1}.{parts[1]}.", parts[2]
            if kind == "downsample":
                out[at + ("shortcut." if parts[3] == "0" else "shortcut.norm.") + parts[-1]] = tensor
            else:
                out[at + kind.replace("bn", "conv") + (".norm." if kind[:2] == "bn" else ".") + parts[-1]] = tensor
    return out


def test_backbone_of_detectron2(tmp_path):
    """The weights see pixels that are not divided by a deviation, and merged statistics are filled in."""
    torch.manual_seed(4)
    source = {k: v.float() for k, v in resnet50().state_dict().items()}
    state = {k: v for k, v in detectron2_names(source).items() if "running" not in k}
    torch.save({"model": {**state, "stem.fc.weight": torch.zeros(1)}}, tmp_path / "R-50.pth")
    fields = {**TINY, "backbone": "resnet50", "width": 64, "backbone_weights": str(tmp_path / "R-50.pth")}
    with pytest.raises(InputError, match=r"model\.stride_in_1x1: False\. Switch it on"):
        CondInst(ModelConfig(**fields))
    model = CondInst(ModelConfig(**fields, stride_in_1x1=True))
    torch.testing.assert_close(model.backbone.layer3[1].conv2.weight, source["layer3.1.conv2.weight"])
    norm = model.backbone.layer2[0].downsample[1]
    x = torch.randn(1, 512, 2, 2)
    torch.testing.assert_close(norm(x), x * norm.weight[:, None, None] + norm.bias[:, None, None])
    image = torch.rand(1, 3, 32, 32) * 255
    seen = model.backbone.conv1(model.normalize(image, [(32, 32)]))
    mean = torch.tensor(model.config.pixel_mean)[:, None, None]
    raw = torch.nn.functional.conv2d((image - mean).flip(1), state["stem.conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(seen, raw, rtol=1e-4, atol=1e-3)


CAFFE2_CONVOLUTIONS = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


def caffe2_names(state):
    """A ResNet of Detectron2's names under Caffe2's."""
    out = {}
    for name, tensor in state.items():
        parts = name.split(".")
        end = {"weight": "s", "bias": "b"}[parts[-1]] if parts[-2] == "norm" else "w"
        if parts[0] == "stem":
            out["conv1_w" if end == "w" else f"res_conv1_bn_{end}"] = tensor
        else:
            at = f"{parts[0]}_{parts[1]}_{CAFFE2_CONVOLUTIONS[parts[2]]}_"
            out[at + (end if end == "w" else f"bn_{end}")] = tensor
    return out


def test_backbone_of_caffe2_is_that_of_detectron2(tmp_path):
    torch.manual_seed(5)
    state = {k: v for k, v in detectron2_names(resnet50().state_dict()).items() if "running" not in k}
    other = caffe2_names(state)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_w", "res5_2_branch2c_bn_b"} <= set(other)
    unused = ("fc1000_w", "fc1000_b", "conv1_b", "conv1_w_momentum")
    torch.save(state, tmp_path / "a.pth")
    torch.save({**other, **{name: torch.zeros(1) for name in unused}}, tmp_path / "b.pth")
    fields = {**TINY, "backbone": "resnet50", "width": 64, "stride_in_1x1": True}
    a, b = (CondInst(ModelConfig(**fields, backbone_weights=str(tmp_path / f"{x}.pth"))).backbone for x in "ab")
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor, rtol=0, atol=0)
    torch.save({**other, "res2_0_branch2d_w": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="unexpected res2_0_branch2d_w"):
        CondInst(ModelConfig(**fields, backbone_weights=str(tmp_path / "c.pth")))


def test_the_stride_moves_and_frozen_stages_do_not_train():
    fields = {**TINY, "backbone": "resnet50"}
    plain, moved = (CondInst(ModelConfig(**fields, stride_in_1x1=x, frozen_stages=2)).backbone for x in (False, True))
    strides = [(s[0].conv1.stride[0], s[0].conv2.stride[0]) for b in (plain, moved) for s in (b.layer1, b.layer2)]
    assert strides == [(1, 1), (1, 2), (1, 1), (2, 1)]
    moved.load_state_dict(plain.state_dict())
    a, b = (n.eval()(torch.rand(1, 3, 64, 64)) for n in (plain, moved))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert {n.split(".")[0] for n, p in plain.named_parameters() if not p.requires_grad} == {"conv1", "bn1", "layer1"}
    with pytest.raises(InputError, match=r"model\.frozen_stages"):
        ModelConfig(frozen_stages=6)
    with pytest.raises(InputError, match=r"model\.head_groups: 3.*fpn_channels \(256\)"):
        ModelConfig(head_groups=3)


def test_torchvision_weights_want_the_stride_in_the_3x3():
    with pytest.raises(InputError, match=r"model\.stride_in_1x1: True\. Switch it off"):
        CondInst(ModelConfig(backbone_weights="imagenet", stride_in_1x1=True))


def test_sizes_that_differ_name_the_options(folder, tmp_path):
    boxinst.save(
        CondInst(ModelConfig(classes=("a", "b"), contrast_stretch=(0.5, 99.8), mask_channels=8, **TINY)), tmp_path
    )
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"is \[8, .*the model has \[16, .*set by .*model\.mask_channels"):
        boxinst.load(tmp_path)


def test_backbone_errors(tmp_path):
    with pytest.raises(InputError, match="IMAGENET1K_V1"):
        CondInst(ModelConfig(**{**TINY, "width": 64, "backbone_weights": "imagenet21k"}))
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7), "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"missing bn1\.weight"):
        CondInst(ModelConfig(**{**TINY, "width": 64, "backbone_weights": str(tmp_path / "w.safetensors")}))
