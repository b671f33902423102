"""boxinst.priors: the losses that are ours, against their definitions."""

from __future__ import annotations

import pytest
import torch

from boxinst import losses, priors


@pytest.mark.parametrize(
    ("level", "expected"), [(-9.0, 0.3), (0.0, 0.0), (9.0, 0.4), (torch.logit(torch.tensor(0.7)), 0.1)]
)
def test_fill_is_penalised_beyond_its_range_only(level: float, expected: float) -> None:
    boxes = torch.zeros(1, 8, 8, dtype=torch.bool)
    boxes[:, 2:6, 1:7] = True
    logits = torch.full((1, 8, 8), float(level)).where(boxes, torch.tensor(9.0))  # outside the box nothing counts
    logits.requires_grad_()
    terms = priors.fill_terms(logits, boxes, (0.3, 0.6))
    assert float(terms[0].detach()) == pytest.approx(expected, abs=1e-3)
    terms.sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad[~boxes] == 0).all())
    assert bool((logits.grad[boxes] != 0).all()) == (expected > 0)


def test_imitation_is_the_dice_on_the_teachers_masks_weighted_by_its_confidence() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(3, 7, 6, generator=rng) * 2, torch.randn(3, 7, 6, generator=rng) * 2
    teacher[2] = -5  # no mask at all
    boxes = torch.zeros(3, 7, 6, dtype=torch.bool)
    boxes[:, 1:6, 1:5] = True
    got = priors.imitation_terms(logits, teacher, boxes)
    for n in range(3):
        p, q = logits[n].double().sigmoid(), teacher[n].double().sigmoid()
        taken = boxes[n] & (q > 0.5)
        sure = float(q[taken].mean()) if bool(taken.any()) else 0.0
        dice = 1 - 2 * p[taken].sum() / (p.square().sum() + taken.sum() + losses.DICE_EPS)
        assert float(got[n]) == pytest.approx(float(dice) * sure, abs=1e-5)
