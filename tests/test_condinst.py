"""The network: its config, its forward pass, and the two ways to predict."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

import boxinst
from boxinst import CondInst, InputError, ModelConfig
from boxinst.condinst import SAMPLES, pool_without_waiting
from boxinst.config import LossConfig
from boxinst.dynamic import HeadShape

TINY = {"backbone": "resnet18", "width": 8, "fpn_channels": 16}
TINY |= {"mask_branch_channels": 8, "mask_branch_layers": 1, "dense_layers": 1}


@pytest.fixture(scope="module")
def model() -> CondInst:
    torch.manual_seed(0)
    return CondInst(ModelConfig(classes=("a", "b"), mask_stride=4, **TINY)).eval()


def images(*sizes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=g) for h, w in sizes]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"backbone": "vgg16"}, "model.backbone"),
        ({"mask_stride": 16}, "model.mask_stride"),
        ({"detect": False, "prompt": False}, "model.detect"),
        ({"width": 32, "backbone_weights": "imagenet"}, "model.width"),
        ({"contrast_stretch": (90.0, 10.0)}, "model.contrast_stretch"),
        ({"head_layers": 1}, "model.head_layers"),
        ({"fpn_channels": 0}, "model.fpn_channels"),
        ({"prompt_context": 0.5}, "model.prompt_context"),
        ({"prompt_context": float("nan")}, "model.prompt_context"),
        ({"dense_layers": -1}, "model.dense_layers"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "model.pixel_std"),
        ({"pixel_mean": (1.0, 2.0)}, "model.pixel_mean"),
    ],
)
def test_config_errors_name_the_option(change, name):
    with pytest.raises(InputError, match=name):
        ModelConfig(**change)


@pytest.mark.parametrize(
    "change", [{"kernel_size": 9}, {"kernel_size": 4}, {"theta": float("nan")}, {"pairwise_weight": float("inf")}]
)
def test_loss_config_errors_name_the_option(change):
    with pytest.raises(InputError, match=rf"loss\.{next(iter(change))}"):
        LossConfig(**change)


@pytest.mark.parametrize("channels", [16, 34, 33])
def test_any_number_of_channels_can_be_normalised(channels):
    model = CondInst(ModelConfig(classes=("a",), **{**TINY, "fpn_channels": channels})).eval()
    out = model(torch.zeros(1, 3, 64, 64), [torch.tensor([[1.0, 2, 30, 40]])])
    assert out.prompt is not None
    assert bool(out.prompt.isfinite().all())


def regions(count, seed=0):
    """Boxes of 2 to 2,000 pixels, of which many lie at the bounds between two levels."""
    g = torch.Generator().manual_seed(seed)
    sides = torch.cat([2 + torch.rand(count, 1, generator=g) ** 3 * 2000, torch.tensor([[112.0], [224], [448]])])
    corners = torch.rand(len(sides), 2, generator=g) * 200
    return torch.cat([corners, corners + sides], 1)


def test_pooling_without_waiting_is_torchvisions():
    features = [torch.randn(2, 5, 64 >> k, 96 >> k, requires_grad=True) for k in range(3)]
    boxes = [regions(40), torch.zeros(0, 4)]
    pool = MultiScaleRoIAlign(["3", "4", "5"], 7, sampling_ratio=SAMPLES)
    wanted = pool(dict(zip("345", features, strict=True)), boxes, [(512, 768)] * 2)
    found = pool_without_waiting(features, boxes, (3, 4, 5), 7)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    weights = torch.randn_like(wanted)
    for one, other in zip(*(torch.autograd.grad((x * weights).sum(), features) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)
    assert pool_without_waiting(features, [torch.zeros(0, 4)] * 2, (3, 4, 5), 7).shape == (0, 5, 7, 7)


def test_boxes_keep_their_pixels_in_half_precision():
    """At 1,200 pixels bfloat16 knows every eighth alone."""
    model = CondInst(ModelConfig(classes=("a",), detect=False, **TINY)).eval()
    assert model.prompt_head is not None
    seen = []
    model.prompt_head.pool.register_forward_pre_hook(lambda _, given: seen.append(given[1][0]))
    box = torch.tensor([[1209.0, 99, 1233, 123]])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(torch.zeros(1, 3, 128, 1248), [box])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_forward_shapes(stride):
    model = CondInst(ModelConfig(classes=("a",), mask_stride=stride, **TINY)).eval()
    boxes = [torch.tensor([[1.0, 2, 30, 40]]), torch.zeros(0, 4)]
    out = model(torch.zeros(2, 3, 64, 96), boxes)
    assert out.mask_features.shape == (2, 16, 64 // stride, 96 // stride)
    assert out.prompt is not None
    assert out.prompt.shape == (1, HeadShape.of(model.config).num_parameters)
    assert out.dense is not None
    assert out.dense.class_logits.shape[1] == sum(h * w for h, w in out.dense.grids)


def test_either_head_alone():
    prompt = CondInst(ModelConfig(detect=False, **TINY))
    assert prompt.dense_head is None
    with pytest.raises(InputError, match="no detection head"):
        prompt.detect(images((32, 32)))
    detect = CondInst(ModelConfig(prompt=False, **TINY))
    assert detect.prompt_head is None
    with pytest.raises(InputError, match="no prompt head"):
        detect.segment(images((32, 32)), [torch.zeros(0, 4)])


def test_forward_wants_multiples_of_32(model):
    with pytest.raises(InputError, match=r"50×64.*multiples of 32"):
        model(torch.zeros(1, 3, 50, 64))


def test_one_mask_for_every_box_whatever_its_size(model):
    boxes = torch.tensor(
        [[0.0, 0, 80, 60], [10, 10, 10.2, 10.2], [79.5, 59.5, 80, 60], [3, 4, 20, 9], [0, 0, 0, 0], [5, 5, 6, 50]]
    )
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    (found,) = model.segment(images((60, 80)), [boxes], [labels], logits=True)
    assert found.masks.shape == (6, 60, 80)
    assert bool(found.masks.flatten(1).any(1).all())
    torch.testing.assert_close(found.boxes, boxes)
    torch.testing.assert_close(found.labels, labels)
    assert bool(((found.scores >= 0) & (found.scores <= 1)).all())
    assert found.mask_logits is not None
    assert found.mask_logits.shape == (6, 60, 80)
    # No mask leaves its box.
    ys, xs = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    for box, mask in zip(boxes[[0, 3, 5]], found.masks[[0, 3, 5]], strict=True):
        assert not bool((mask & ~((xs >= box[0]) & (xs <= box[2]) & (ys >= box[1]) & (ys <= box[3]))).any())


def test_permuting_the_boxes_permutes_the_masks(model):
    boxes = torch.tensor([[4.0, 4, 40, 30], [10, 20, 70, 55], [50, 3, 60, 12], [0, 0, 20, 20]])
    order = torch.tensor([2, 0, 3, 1])
    (a,) = model.segment(images((64, 80)), [boxes])
    (b,) = model.segment(images((64, 80)), [boxes[order]])
    torch.testing.assert_close(b.masks, a.masks[order])
    torch.testing.assert_close(b.scores, a.scores[order])


def test_two_different_boxes_never_share_parameters(model):
    boxes = [torch.tensor([[4.0, 4, 40, 30], [4, 4, 40, 31]])]
    with torch.no_grad():
        out = model(images((64, 64))[0][None], boxes)
    assert not torch.equal(out.prompt[0], out.prompt[1])


def test_batched_equals_single(model):
    pictures = images((64, 80), (50, 60), (64, 80), (33, 97))
    boxes = [torch.tensor([[4.0, 4, 40, 30], [10, 10, 50, 45]]), torch.zeros(0, 4)]
    boxes += [torch.tensor([[1.0, 1, 60, 60]]), torch.tensor([[0.0, 0, 97, 33]])]
    together = model.segment(pictures, boxes, logits=True)
    for n, both in enumerate(together):
        (alone,) = model.segment([pictures[n]], [boxes[n]], logits=True)
        torch.testing.assert_close(both.mask_logits, alone.mask_logits, rtol=1e-4, atol=1e-4)
    detected = model.detect(pictures, score_threshold=0.0, max_detections=5)
    for n, both in enumerate(detected):
        (alone,) = model.detect([pictures[n]], score_threshold=0.0, max_detections=5)
        torch.testing.assert_close(both.boxes, alone.boxes, rtol=1e-3, atol=1e-2)


def test_padding_does_not_leak_raw_black(model):
    # Padding is the mean colour, not black: normalised it is exactly 0.
    x = model.normalize(torch.zeros(1, 3, 32, 64), [(20, 40)])
    assert bool((x[0, :, 20:] == 0).all())
    assert bool((x[0, :, :, 40:] == 0).all())
    assert bool((x[0, :, :20, :40] != 0).all())


def test_detect_gives_valid_instances(model):
    found = model.detect(images((64, 96)), score_threshold=0.0, max_detections=20)[0]
    assert 0 < len(found) <= 20  # boxes of no area count among the best, and are dropped after
    assert found.masks.shape == (len(found), 64, 96)
    assert bool((found.scores.diff() <= 0).all())
    assert bool((found.boxes >= 0).all())
    assert bool((found.boxes[:, 2] <= 96).all())
    assert bool((found.boxes[:, 3] <= 64).all())


def test_detections_in_the_pixels_of_another_size(model):
    pictures, sizes = images((64, 96), (50, 60)), [(32, 200), (50, 60)]
    found = model.detect(pictures, score_threshold=0.0, max_detections=9, sizes=sizes, logits=True)
    plain = model.detect(pictures, score_threshold=0.0, max_detections=9, logits=True)
    assert [tuple(f.masks.shape[1:]) for f in found] == sizes
    torch.testing.assert_close(found[0].boxes, plain[0].boxes * torch.tensor([200 / 96, 0.5, 200 / 96, 0.5]))
    torch.testing.assert_close(found[1].mask_logits, plain[1].mask_logits)
    assert torch.equal(found[1].masks, plain[1].masks)
    with pytest.raises(InputError, match=r"sizes: 1 entries.*2 images"):
        model.detect(pictures, sizes=sizes[:1])


def test_prediction_leaves_the_training_mode_as_it_was(model):
    model.train()
    model.segment(images((32, 32)), [torch.zeros(0, 4)])
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("picture", "boxes", "name"),
    [
        (torch.zeros(3, 8, 8), torch.zeros(0, 4), r"images\[0\]"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(0, 4), r"images\[0\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 5), r"boxes\[0\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((1, 4), float("nan")), r"boxes\[0\]"),
    ],
)
def test_bad_input_is_named(model, picture, boxes, name):
    with pytest.raises(InputError, match=name):
        model.segment([picture], [boxes])


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(CondInst(ModelConfig(**TINY)).state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name])


def test_normalisation_is_frozen_only_with_pretrained_weights(tmp_path):
    free = CondInst(ModelConfig(**TINY))
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in free.backbone.modules())
    config = ModelConfig(**{**TINY, "width": 64, "backbone_weights": "imagenet"})
    frozen = CondInst(config, pretrained=False)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.backbone.modules())


def test_lazy_public_names():
    assert boxinst.CondInst is CondInst
    assert boxinst.losses.projection_loss is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = boxinst.nothing_here
