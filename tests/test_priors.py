"""boxinst.priors: the losses that are ours, against their definitions."""

from __future__ import annotations

import pytest
import torch

from boxinst import Batch, Targets, losses, priors
from boxinst.colors import root_colors
from boxinst.dynamic import box_masks


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


def reference_region(logits: torch.Tensor, colors: torch.Tensor, weights: torch.Tensor) -> float:
    """The equation, cell by cell in double precision, for one instance."""
    p, c, w = logits.double().sigmoid(), colors.double(), weights.double()
    cells = [(y, x) for y in range(p.shape[0]) for x in range(p.shape[1])]

    def mean(share: torch.Tensor) -> torch.Tensor:
        return sum(share[y, x] * c[:, y, x] for y, x in cells) / sum(share[y, x] for y, x in cells)

    inner, outer, all_over = mean(p * w), mean((1 - p) * w), mean(w)
    left = total = 0.0
    for y, x in cells:
        distances = [float((c[:, y, x] - m).square().sum()) for m in (inner, outer, all_over)]
        left += float(w[y, x]) * (float(p[y, x]) * distances[0] + (1 - float(p[y, x])) * distances[1])
        total += float(w[y, x]) * distances[2]
    return left / total


def test_the_region_energy_equals_the_reference() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, 6, generator=rng, dtype=torch.float64) * 2
    colors = torch.rand(4, 3, 7, 6, generator=rng, dtype=torch.float64) * 100
    weights = torch.rand(4, 7, 6, generator=rng) > 0.3
    got = priors.region_terms(logits, colors, weights)
    for n in range(4):
        assert float(got[n]) == pytest.approx(reference_region(logits[n], colors[n], weights[n]), rel=1e-4)
    # The unit is the variance: neither brightness nor contrast matters, and which of the two regions is the mask.
    torch.testing.assert_close(priors.region_terms(logits, colors * 0.1 + 40, weights), got, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(priors.region_terms(-logits, colors, weights), got, rtol=1e-4, atol=1e-5)


def test_the_region_energy_is_least_on_the_object() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    distance = (y - 12).square() + (x - 12).square()
    colors = torch.where(distance < 49, 80.0, 20.0).expand(1, 3, 24, 24)
    sizes = (4, 6, 7, 8, 10)
    masks = torch.stack([torch.where(distance < r * r, 9.0, -9.0) for r in sizes])
    energies = priors.region_terms(masks, colors.expand(5, -1, -1, -1), torch.ones(5, 24, 24))
    assert sizes[int(energies.argmin())] == 7
    assert float(energies[2]) < 0.01
    assert bool((energies[[0, 1, 3, 4]] > 0.1).all())


@pytest.mark.parametrize("weights", [torch.zeros(1, 5, 5), torch.ones(1, 5, 5)])
def test_without_colours_there_is_nothing_to_learn(weights: torch.Tensor) -> None:
    logits = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    energy = priors.region_terms(logits, torch.full((1, 3, 5, 5), 40.0), weights)
    assert float(energy.detach()) == pytest.approx(1, abs=1e-4)
    energy.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-4
    assert priors.region_terms(logits[:0], torch.zeros(0, 3, 5, 5), weights[:0]).shape == (0,)


def test_a_cell_counts_near_its_box_where_no_other_box_is() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8, generator=rng)
    valid = torch.ones(2, 32, 64, dtype=torch.bool)
    valid[0, :, 52:] = False
    boxes = torch.tensor([[8.0, 6, 28, 22], [24, 10, 44, 30], [44, 2, 64, 10]])
    other = torch.tensor([[0.0, 0, 64, 32]])
    data = Batch(images, valid, [Targets(b, torch.zeros(len(b), dtype=torch.long)) for b in (boxes, other)], [0, 1])
    origins, size = torch.tensor([[2, 0], [8, 2], [16, 0]]), (12, 16)
    windows = box_masks(boxes, size, 2, origins)
    colors, weights = priors.Surroundings(data, 2).of(boxes, windows, torch.zeros(3, dtype=torch.long), origins)
    held = box_masks(boxes, (16, 32), 2)
    for n, (left, top) in enumerate(origins.tolist()):
        window = (slice(top, top + size[0]), slice(left, left + size[1]))
        torch.testing.assert_close(colors[n], root_colors(images, 2)[0][(slice(None), *window)])
        x0, y0, x1, y1 = boxes[n].tolist()
        margin = priors.REGION_MARGIN * max(x1 - x0, y1 - y0)
        for y in range(size[0]):
            for x in range(size[1]):
                row, column = y + top, x + left
                px, py = column * 2 + 1, row * 2 + 1
                near = x0 - margin <= px <= x1 + margin and y0 - margin <= py <= y1 + margin
                taken = any(bool(held[k, row, column]) for k in range(3) if k != n)
                assert bool(weights[n, y, x]) == (near and not taken and px < 52), (n, y, x)


def test_root_colours_are_the_roots_of_the_mean_values() -> None:
    images = torch.randint(0, 256, (1, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = root_colors(images, 2)
    assert got.shape == (1, 3, 2, 3)
    assert float(got[0, 1, 1, 2]) == pytest.approx((float(images[0, 1, 2:4, 4:6].double().mean()) + 4) ** 0.5)
    torch.testing.assert_close(root_colors(images, 1), (images.float() + 4).sqrt())
