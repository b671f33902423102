"""Imported checkpoints against the published network, written out in float64: boxes, scores, masks and losses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import published_reference as ref
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import boxinst
from boxinst import Batch, CondInst, InputError, Targets, transforms, weights
from boxinst.config import LossConfig
from boxinst.criterion import Criterion

UP = "backbone.bottom_up."
FCOS = "proposal_generator.fcos_head."
CLASSES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return ref.random_state()


@pytest.fixture(scope="module")
def model(state: dict[str, Tensor]) -> CondInst:
    return weights.from_adelaidet(state, CLASSES)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth image, so that there are alike neighbours and others."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 12 + 2, width // 12 + 2, generator=g) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)


@pytest.mark.parametrize("size", [None, (61, 131)])
def test_detections_are_the_published_ones(model: CondInst, state: dict[str, Tensor], size: Any) -> None:
    image = picture(75, 101)  # padded to 96 × 128
    wanted = ref.Reference(state).detect(image, size)
    (found,) = model.detect([image], logits=True, sizes=None if size is None else [size])
    assert len(found) == len(wanted["boxes"]) > 10
    assert len(set(found.labels.tolist())) > 1
    torch.testing.assert_close(found.labels, wanted["labels"])
    torch.testing.assert_close(found.scores.double(), wanted["scores"], rtol=1e-3, atol=0)
    torch.testing.assert_close(found.boxes.double(), wanted["boxes"].double(), rtol=1e-3, atol=1e-3)
    probabilities = wanted["probabilities"]
    assert found.mask_logits is not None
    torch.testing.assert_close(
        found.mask_logits.double(), probabilities.log() - (1 - probabilities).log(), rtol=0, atol=1e-2
    )
    certain = (probabilities - 0.5).abs() > 1e-4
    assert bool((found.masks == (probabilities > 0.5))[certain].all())
    assert 0.02 < float(found.masks.float().mean()) < 0.98
    if size is None:
        # Where a cell of stride 4 lies on a pixel, the logits of the image are those of the cell.
        cells = wanted["logits"][:, :18, :25]
        torch.testing.assert_close(found.mask_logits[:, 2::4, 2::4][:, :18, :25].double(), cells, rtol=0, atol=1e-2)


def batch(images: list[Tensor], boxes: list[Any], labels: list[Any], masks: list[Tensor] | None, bottom: int) -> Batch:
    targets = [
        Targets(torch.tensor(b).reshape(-1, 4), torch.tensor(c), None if masks is None else masks[n].bool())
        for n, (b, c) in enumerate(zip(boxes, labels, strict=True))
    ]
    ids = list(range(len(images)))
    return transforms.collate(images, targets, ids, ignore_bottom=[bottom] * len(images))


BOXES = [
    [[0.0, 3.4, 50.6, 40.2], [20.3, 20.7, 99.9, 74.1], [70.2, 5.0, 95.7, 30.9]],
    [[10.8, 9.3, 61.5, 63.9], [64.4, 30.0, 100.5, 60.8], [5.0, 60.0, 30.0, 90.0], [60.1, 62.3, 68.2, 70.4]],
]
LABELS = [[0, 3, 3], [4, 1, 2, 0]]


CROWDED = [
    [[32.0 * j + 0.6, 32.0 * i + 0.4, 32.0 * j + 30.2, 32.0 * i + 31.7] for i in range(3) for j in range(4)],
    [[40.3, 30.1, 80.9, 70.6], *([16.0 * j + 2.2, 3.0 + j, 16.0 * j + 14.1, 15.0 + j] for j in range(7))],
]
"""Twelve objects of 9 locations each, that get 5; and eight of fewer than 64 in all, one of which has more than 8."""


def test_the_share_of_an_object_is_the_published_one(model: CondInst, state: dict[str, Tensor]) -> None:
    images = [picture(96, 128, 3), picture(93, 127, 4)]
    labels = [[k % 5 for k in range(len(boxes))] for boxes in CROWDED]
    for pick in ([0], [1], [0, 1]):
        given = [images[k] for k in pick], [CROWDED[k] for k in pick], [labels[k] for k in pick]
        wanted = ref.losses(ref.Reference(state), *given, None)
        data = batch(*given, None, 0)
        with torch.no_grad():
            terms = Criterion(model.config, LossConfig(warmup_steps=0))(model(data.images, None, data.sizes), data, 0)
        for name in ("projection", "pairwise"):
            assert float(terms[f"detect_{name}"]) == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.parametrize(("bottom", "step"), [(0, 20_000), (10, 2499)])
def test_losses_from_boxes_are_the_published_ones(
    model: CondInst, state: dict[str, Tensor], bottom: int, step: int
) -> None:
    images = [picture(75, 101, 1), picture(90, 110, 2)]
    wanted = ref.losses(ref.Reference(state), images, BOXES, LABELS, None, bottom=bottom, iteration=step + 1)
    data = batch(images, BOXES, LABELS, None, bottom)
    with torch.no_grad():
        terms = Criterion(model.config, LossConfig())(model(data.images, None, data.sizes), data, step)
    assert all(wanted[name] > 0 for name in wanted)
    for name in ("cls", "box", "centerness"):
        assert float(terms[name]) == pytest.approx(wanted[name], rel=1e-4)
    for name in ("projection", "pairwise"):
        assert float(terms[f"detect_{name}"]) == pytest.approx(wanted[name], rel=1e-4)
    assert float(terms["detect_dice"]) == 0


def test_losses_from_masks_are_the_published_ones(model: CondInst, state: dict[str, Tensor]) -> None:
    images = [picture(75, 101, 1), picture(90, 110, 2)]
    masks = []
    for n, image in enumerate(images):  # lopsided: the lower left half of each box
        y, x = torch.meshgrid(torch.arange(image.shape[1]) + 0.5, torch.arange(image.shape[2]) + 0.5, indexing="ij")
        parts = [
            (x >= x0) & (x <= x1) & (y <= y1) & (y - y0 >= (x - x0) * (y1 - y0) / (x1 - x0))
            for x0, y0, x1, y1 in BOXES[n]
        ]
        masks.append(torch.stack(parts))
    wanted = ref.losses(ref.Reference(state), images, BOXES, LABELS, masks)
    data = batch(images, BOXES, LABELS, masks, 0)
    with torch.no_grad():
        outputs = model(data.images, None, data.sizes)
        terms = Criterion(model.config, LossConfig())(outputs, data, 0)
        drawn = Criterion(model.config, LossConfig(max_positives_in_all=3))(outputs, data, 0)
        again = Criterion(model.config, LossConfig(max_positives_in_all=3))(outputs, data, 0)
        everything = Criterion(model.config, LossConfig(max_positives_in_all=10_000))(outputs, data, 0)
    for name in ("cls", "box", "centerness"):
        assert float(terms[name]) == pytest.approx(wanted[name], rel=1e-4)
    assert float(terms["detect_dice"]) == pytest.approx(wanted["dice"], rel=1e-4)
    assert float(terms["detect_projection"]) == float(terms["detect_pairwise"]) == 0
    assert float(drawn["detect_dice"]) == float(again["detect_dice"]) != float(everything["detect_dice"])


def test_a_box_at_column_0_and_a_tiny_one_train_their_masks(model: CondInst) -> None:
    images = [picture(64, 64)]
    boxes = [[[0.0, 8.0, 0.9, 60.0], [0.0, 0.0, 40.0, 40.0], [20.1, 20.1, 20.9, 20.9]]]
    data = batch(images, boxes, [[0, 1, 2]], None, 0)
    terms = Criterion(model.config, LossConfig())(model(data.images, None, data.sizes), data, 0)
    assert all(bool(v.isfinite()) for v in terms.values())
    assert 0 < float(terms["detect_projection"]) < 2
    empty = batch(images, [[]], [torch.zeros(0, dtype=torch.int64).tolist()], None, 0)
    empty.targets[0].labels = empty.targets[0].labels.long()
    terms = Criterion(model.config, LossConfig())(model(empty.images, None, empty.sizes), empty, 0)
    assert float(terms["detect_projection"]) == float(terms["box"]) == 0
    assert float(terms["cls"]) > 0


# The importer.


def test_the_published_list_of_tensors_is_imported_whole() -> None:
    """Sizes as published: 372 tensors."""
    state = ref.random_state(width=64, fpn=256, branch=128, classes=80)
    assert len(state) == 372
    assert state["controller.weight"].shape[0] == 233
    model = weights.from_adelaidet(state)
    config = model.config
    assert (config.backbone, config.width, config.fpn_channels, config.head_groups) == ("resnet50", 64, 256, 0)
    assert (config.mask_branch_channels, config.mask_branch_layers, config.mask_channels) == (128, 4, 16)
    assert (config.stride_in_1x1, config.frozen_norm, config.frozen_stages) == (True, True, 2)
    assert (len(config.classes), config.classes[0], config.classes[-1]) == (80, "person", "toothbrush")
    assert len(set(config.classes)) == 80
    own = model.state_dict()
    flipped = state["backbone.bottom_up.stem.conv1.weight"].flip(1)
    torch.testing.assert_close(own["backbone.conv1.weight"], flipped, rtol=0, atol=0)
    # Nothing but the two tensors that say nothing here is lost; five scales are one tensor here.
    assert len(own) == 372 - 2 - 4
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def test_sizes_are_read_off_the_tensors() -> None:
    state = ref.random_state(backbone="resnet101", channels=8, classes=2, towers=2)
    assert state["controller.weight"].shape[0] == 169
    config = weights.from_adelaidet(state, ["x", "y"]).config
    assert (config.backbone, config.mask_channels, config.head_channels) == ("resnet101", 8, 8)
    assert (config.classes, config.dense_layers, config.head_groups) == (("x", "y"), 2, 32)


@pytest.mark.parametrize("under", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(state: dict[str, Tensor], model: CondInst, tmp_path: Path, suffix: str, under: str | None) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if under is None else {under: state, "iteration": 3}, path)
    boxinst.save(weights.from_adelaidet(path, CLASSES), tmp_path / "model")
    loaded = boxinst.load(tmp_path / "model")
    assert loaded.config == model.config
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)


def test_the_semantic_branch_is_left_out_and_said(state: dict[str, Tensor]) -> None:
    more = {**state, "mask_branch.seg_head.0.0.weight": torch.zeros(8, 64, 3, 3)}
    more["mask_branch.logits.weight"] = torch.zeros(5, 8, 1, 1)
    _, notes = weights.import_checkpoint("adelaidet", more, CLASSES)
    assert any("2 tensors of the semantic branch" in note for note in notes)
    assert any("warm-up" in note for note in notes)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != name}


SOME = (
    *("backbone.fpn_lateral3.weight", "backbone.top_block.p6.weight", "backbone.fpn_output4.bias"),
    *(f"{UP}stem.conv1.weight", f"{FCOS}cls_logits.weight", f"{FCOS}scales.0.scale", "controller.weight"),
    *("mask_branch.refine.0.0.weight", "mask_branch.tower.4.weight"),
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: without(s, "controller.bias"), ["missing", "controller.bias"]),
        (lambda s: without(s, "controller.weight"), ["missing controller.weight"]),
        (lambda s: without(s, "mask_head.sizes_of_interest"), ["missing mask_head.sizes_of_interest"]),
        (lambda s: without(s, f"{UP}res2.0.conv1.norm.running_mean"), [f"missing {UP}res2.0.conv1.norm.running_mean"]),
        (lambda s: without(s, f"{UP}res5.2.conv3.norm.running_var"), [f"missing {UP}res5.2.conv3.norm.running_var"]),
        (
            # Those that sizes are read off, and others: all are named at once.
            lambda s: {k: v for k, v in s.items() if k not in SOME} | {"foo.weight": torch.zeros(1)},
            [*(f"missing {name}" for name in SOME), "unexpected foo.weight"],
        ),
        (lambda s: {**s, f"{UP}res2.0.conv2_offset.weight": torch.zeros(1)}, ["unexpected", "conv2_offset"]),
        (lambda s: {**s, "mask_head.sizes_of_interest": torch.tensor([32, 64])}, ["sizes_of_interest", "[32, 64]"]),
        (
            lambda s: {**s, "controller.weight": torch.zeros(217, 64, 3, 3)},
            ["217 parameters", "has 233", "model.head_channels 8", "model.mask_channels 16"],
        ),
        (lambda s: without(s, "backbone.bottom_up.res4.5.conv1.weight") | {}, ["missing", f"{UP}res4.5.conv1.weight"]),
        (lambda s: without(s, f"{FCOS}ctrness.bias"), [f"missing {FCOS}ctrness.bias"]),
        (lambda s: without(s, f"{FCOS}scales.3.scale"), [f"missing {FCOS}scales.3.scale"]),
        (lambda s: without(s, f"{UP}res3.0.shortcut.norm.weight"), [f"missing {UP}res3.0.shortcut.norm.weight"]),
        (lambda s: {**s, f"{FCOS}share_tower.0.weight": torch.zeros(1)}, [f"unexpected {FCOS}share_tower.0.weight"]),
        (lambda s: {**s, f"{FCOS}cls_tower.1.weight": torch.zeros(9)}, [f"{FCOS}cls_tower.1.weight is [9]", "[64]"]),
        (lambda s: {k: v for k, v in s.items() if ".res4.5." not in k}, ["(3, 4, 5, 3)", "resnet50"]),
        (
            lambda s: {k: v for k, v in s.items() if not re.search(r"bbox_tower\.(9|10)", k)},
            ["4 convolutions in the class tower, 3 in the box tower"],
        ),
        (lambda s: {k: v for k, v in s.items() if ".refine.2." not in k}, ["2 levels"]),
        (lambda s: {**s, "iteration": 3}, ["iteration is a int", "state dict"]),
        (lambda s: {}, ["without tensors"]),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused_with_a_reason(state: dict[str, Tensor], change: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        weights.from_adelaidet(change(state), CLASSES)
    for word in words:
        assert word in str(error.value)


def test_class_lists_must_agree_in_number(state: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match=r"--classes: 2 names, but state dict has 5 classes.*--init-classes"):
        weights.from_adelaidet(state, ["a", "b"])
    with pytest.raises(InputError, match=r"5 classes, which are not COCO's 80.*--classes"):
        weights.from_adelaidet(state)


def test_pickles_and_what_is_no_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "R-50.pkl").write_bytes(b"x")
    with pytest.raises(InputError, match=r"A pickle can run code.*torch\.save"):
        weights.from_adelaidet(tmp_path / "R-50.pkl")
    with pytest.raises(InputError, match="No such file"):
        weights.from_adelaidet(tmp_path / "nothing.pth")
    torch.save({"model": {"w": torch.zeros(1)}, "log": Path("x")}, tmp_path / "more.pth")
    with pytest.raises(InputError, match=r"holds more than tensors.*state dict alone"):
        weights.from_adelaidet(tmp_path / "more.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        weights.from_adelaidet(tmp_path / "torn.safetensors")
    (tmp_path / "page.pth").write_text("<html>Not found</html>")
    with pytest.raises(InputError, match=r"page\.pth is no checkpoint"):
        weights.from_adelaidet(tmp_path / "page.pth")


def test_variances_of_old_detectron2_files_are_corrected(state: dict[str, Tensor], tmp_path: Path) -> None:
    from collections import OrderedDict

    old = OrderedDict(state)
    old._metadata = {"backbone.bottom_up.stem.conv1.norm": {"version": 2}, "backbone": {"version": 1}}  # type: ignore[attr-defined]
    torch.save({"model": old}, tmp_path / "old.pth")
    own = weights.from_adelaidet(tmp_path / "old.pth", CLASSES).state_dict()
    name = "backbone.bottom_up.stem.conv1.norm.running_var"
    torch.testing.assert_close(own["backbone.bn1.running_var"], state[name] - 1e-5, rtol=0, atol=0)


# MMDetection.


def mmdet_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under MMDetection's names, for RGB divided by its deviation."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if name.startswith("backbone.bottom_up.stem"):
            new = "backbone." + ("bn1." if "norm" in name else "conv1.") + parts[-1]
            if new == "backbone.conv1.weight":
                tensor = tensor.flip(1) * torch.tensor([58.395, 57.12, 57.375])[:, None, None]
        elif name.startswith("backbone.bottom_up."):
            at, part = f"backbone.layer{int(parts[2][3]) - 1}.{parts[3]}.", parts[4]
            if part == "shortcut":
                new = at + ("downsample.1." if "norm" in name else "downsample.0.") + parts[-1]
            else:
                new = at + (part.replace("conv", "bn") if "norm" in name else part) + "." + parts[-1]
        elif "fpn_lateral" in name:
            new = f"neck.lateral_convs.{int(parts[1][-1]) - 3}.conv.{parts[-1]}"
        elif "fpn_output" in name:
            new = f"neck.fpn_convs.{int(parts[1][-1]) - 3}.conv.{parts[-1]}"
        elif "top_block" in name:
            new = f"neck.fpn_convs.{int(parts[2][1]) - 3}.conv.{parts[-1]}"
        elif "_tower" in name:
            kind = "cls" if parts[2] == "cls_tower" else "reg"
            layer, norm = divmod(int(parts[3]), 3)
            new = f"bbox_head.{kind}_convs.{layer}.{'gn' if norm else 'conv'}.{parts[-1]}"
        elif "scales" in name:
            new, tensor = f"bbox_head.scales.{parts[3]}.scale", tensor.reshape(())
        elif name.startswith("proposal_generator"):
            head = {"cls_logits": "conv_cls", "bbox_pred": "conv_reg", "ctrness": "conv_centerness"}[parts[2]]
            new = f"bbox_head.{head}.{parts[-1]}"
        elif name.startswith("controller"):
            new = f"bbox_head.{name}"
        elif name.startswith("mask_branch.refine"):
            part = "bn" if parts[3] == "1" else "conv"
            new = f"mask_head.mask_feature_head.convs_all_levels.{parts[2]}.conv{parts[2]}.{part}.{parts[-1]}"
        elif name.startswith("mask_branch.tower.4"):
            new = f"mask_head.mask_feature_head.conv_pred.{parts[-1]}"
        elif name.startswith("mask_branch.tower"):
            part = "bn" if parts[3] == "1" else "conv"
            new = f"mask_head.mask_feature_head.conv_branch.{parts[2]}.{part}.{parts[-1]}"
        else:
            continue
        out[new] = tensor
    out["backbone.bn1.num_batches_tracked"] = torch.tensor(3)
    return out


def test_mmdetection_differs_in_names_input_and_stride_alone(state: dict[str, Tensor], model: CondInst) -> None:
    other = weights.from_mmdetection(mmdet_names(state), CLASSES)
    assert not other.config.stride_in_1x1
    assert other.config.pixel_std == (58.395, 57.12, 57.375)
    for stage in (other.backbone.layer2, other.backbone.layer3, other.backbone.layer4):
        assert (stage[0].conv1.stride, stage[0].conv2.stride) == ((1, 1), (2, 2))
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)  # now they must be one network
    for stage in (model.backbone.layer2, model.backbone.layer3, model.backbone.layer4):
        assert (stage[0].conv1.stride, stage[0].conv2.stride) == ((2, 2), (1, 1))
    image = picture(64, 96)
    (a,), (b,) = (m.detect([image], logits=True) for m in (model, other))
    torch.testing.assert_close(b.boxes, a.boxes, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(b.scores, a.scores, rtol=1e-3, atol=0)
    torch.testing.assert_close(b.mask_logits, a.mask_logits, rtol=1e-3, atol=1e-2)


def test_mmdetection_boxinst_has_a_dynamic_head_of_16_channels() -> None:
    state = mmdet_names(ref.random_state(head=16))
    assert state["bbox_head.controller.weight"].shape[0] == 593
    assert weights.from_mmdetection(state, CLASSES).config.head_channels == 16


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("backbone=dict(style='caffe')", "Caffe"),
        ("norm_on_bbox=False", "exponentials"),
        ("centerness_on_reg=False", "class tower"),
        ("add_extra_convs='on_input'", "P6"),
        ("size_of_interest=16", "another unit"),
    ],
)
def test_mmdetection_settings_that_cannot_be_followed(
    state: dict[str, Tensor], tmp_path: Path, text: str, word: str
) -> None:
    published = "style='pytorch', add_extra_convs='on_output', relu_before_extra_convs=True, size_of_interest=8, "
    content = {"state_dict": mmdet_names(state), "meta": {"cfg": published, "dataset_meta": {"classes": CLASSES}}}
    torch.save(content, tmp_path / "good.pth")
    assert weights.from_mmdetection(tmp_path / "good.pth").config.classes == CLASSES
    content["meta"]["cfg"] = text
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match=word):
        weights.from_mmdetection(tmp_path / "other.pth")


def test_what_is_missing_has_its_name_in_mmdetection(state: dict[str, Tensor]) -> None:
    names = mmdet_names(state)
    head = [name for name in names if not name.startswith("backbone.")]
    for name in ["backbone.bn1.bias", "backbone.layer3.0.downsample.1.running_mean", *head[::11], *head[-5:]]:
        with pytest.raises(InputError) as error:
            weights.from_mmdetection(without(names, name), CLASSES)
        assert f"missing {name}" in str(error.value)


def test_other_classes_keep_everything_but_the_classifier(model: CondInst) -> None:
    fresh = weights.with_classes(model, ("x", "y"))
    assert fresh.config.classes == ("x", "y")
    own, before = fresh.state_dict(), model.state_dict()
    assert own["dense_head.class_logits.weight"].shape[0] == 2
    for name, tensor in own.items():
        if "class_logits" not in name:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
