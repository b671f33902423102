"""boxinst.predict: many boxes at once, mirrored views, and the score of a mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from boxinst import prompts
from boxinst.condinst import CondInst
from boxinst.config import ModelConfig
from boxinst.predict import MIRRORS, mirror_boxes, segment

SLIM = {"backbone": "resnet18", "width": 8, "fpn_channels": 16, "mask_branch_channels": 8, "mask_branch_layers": 1}


@pytest.mark.parametrize("axes", [(2,), (1,), (1, 2)])
def test_four_views_see_a_mirrored_image_alike(axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = CondInst(ModelConfig(classes=("a",), detect=False, mask_stride=4, views=4, **SLIM)).eval()
    images = [
        torch.randint(0, 256, (3, 45, 70), dtype=torch.uint8),
        torch.randint(0, 256, (3, 33, 51), dtype=torch.uint8),
    ]
    # Inside, at the borders, beyond them, outside, and smaller than a pixel.
    given = torch.tensor(
        [[3.5, 4, 30.2, 40], [40, 0, 70, 20.7], [-5, 20, 12, 60], [80, 5, 90, 9], [20.2, 9.1, 20.4, 9.3]]
    )
    boxes = [given, given[:0]]
    plain = segment(model, images, boxes)[0]
    turned_boxes = [mirror_boxes(b, axes, (i.shape[1], i.shape[2])) for b, i in zip(boxes, images, strict=True)]
    turned = segment(model, [image.flip(axes) for image in images], turned_boxes)[0]
    known = torch.tensor([0, 1, 2, 4])  # the one outside has no mask
    assert float(plain.scores[3]) == 0
    torch.testing.assert_close(turned.scores[known], plain.scores[known], rtol=1e-4, atol=1e-5)
    same = (turned.masks.flip(axes) == plain.masks)[known].float().mean()
    assert float(same) > 0.9999, "but for probabilities at the threshold itself"
    single = CondInst(replace(model.config, views=1)).eval()
    single.load_state_dict(model.state_dict())
    assert not torch.equal(segment(single, images, boxes)[0].scores, plain.scores)
    mean = torch.zeros(45, 70)
    for view in MIRRORS:
        seen = segment(single, [images[0].flip(view)], [mirror_boxes(given, view, (45, 70))], logits=True)[0]
        assert seen.mask_logits is not None
        mean += seen.mask_logits[0].sigmoid().flip([axis - 1 for axis in view]) / 4
    got = segment(model, images[:1], [given[:1]], logits=True)[0]
    assert got.mask_logits is not None
    inside = torch.zeros(45, 70, dtype=torch.bool)
    inside[4:40, 4:30] = True
    torch.testing.assert_close(got.mask_logits[0].sigmoid()[inside], mean[inside], rtol=1e-4, atol=1e-5)
    assert torch.is_grad_enabled()
    model.train()
    segment(model, images, boxes)
    assert model.training


@pytest.fixture(scope="module")
def model() -> CondInst:
    torch.manual_seed(0)
    return CondInst(ModelConfig(mask_stride=4, detect=False, **SLIM)).eval()


def many_boxes(count: int) -> Tensor:
    """Of many sizes, anywhere in an image of 96×128 pixels."""
    g = torch.Generator().manual_seed(0)
    sides = torch.rand(count, 2, generator=g) ** 3 * 60 + 2
    corner = torch.rand(count, 2, generator=g) * (torch.tensor([128, 96]) - sides)
    return torch.cat([corner, corner + sides], 1)


@pytest.mark.parametrize("at_once", [1, 3 * 32 * 32])
def test_boxes_some_at_a_time_give_what_all_at_once_give(
    model: CondInst, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = many_boxes(40)
    (all_at_once,) = model.segment([image], [boxes], logits=True)
    monkeypatch.setattr(prompts, "CELLS_AT_ONCE", at_once)
    (some,) = model.segment([image], [boxes], logits=True)
    torch.testing.assert_close(some.mask_logits, all_at_once.mask_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some.scores, all_at_once.scores, rtol=1e-4, atol=1e-5)
    for mask, (x0, y0, x1, y1) in zip(some.masks, boxes.tolist(), strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert y0 - 1 <= int(rows[0]) <= int(rows[-1]) <= y1
        assert x0 - 1 <= int(columns[0]) <= int(columns[-1]) <= x1


def test_the_score_is_the_iou_that_the_probabilities_promise(model: CondInst, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "outline_contrast", lambda masks, *_: torch.ones(len(masks)))
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[8.0, 8, 40, 50], [60, 20, 90, 30]])
    (found,) = model.segment([image], [boxes], logits=True)
    assert found.mask_logits is not None
    for k, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        probability = found.mask_logits[k, y0:y1, x0:x1].double().sigmoid()
        mask = found.masks[k, y0:y1, x0:x1].double()
        promised = (probability * mask).sum() / (probability + mask - probability * mask).sum()
        assert float(found.scores[k]) == pytest.approx(float(promised), rel=1e-4)
        assert 0 < mask.sum() == found.masks[k].sum()


def test_given_boxes_leave_the_dense_head_out() -> None:
    both = CondInst(ModelConfig(classes=("a",), mask_stride=4, dense_layers=1, **SLIM)).eval()
    seen: list[object] = []
    assert both.dense_head is not None
    both.dense_head.register_forward_hook(lambda *_: seen.append(1))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    both.segment([image], [many_boxes(2).clamp(max=60)])
    assert not seen
    both.detect([image])
    assert seen
