"""boxinst.outlines: a mask reaches its box, and its score knows the colours beside its outline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from boxinst import outlines
from boxinst.losses import color_similarity
from boxinst.outlines import outline_contrast, reaching

WHOLE = torch.zeros(1, 2, dtype=torch.long)


def contrast_of(mask: Tensor, image: Tensor, dilation: int = 2) -> float:
    """Written from the definition, pixel by pixel, on a mask of the whole image."""
    similarity = color_similarity(image[None], stride=1, dilation=dilation)[0].double()
    height, width = mask.shape
    steps = [(dy, dx) for dy in (-dilation, 0, dilation) for dx in (-dilation, 0, dilation) if (dy, dx) != (0, 0)]
    changes = [
        1 - float(similarity[k, y, x])
        for y in range(height)
        for x in range(width)
        for k, (dy, dx) in enumerate(steps)
        if mask[y, x] and 0 <= y + dy < height and 0 <= x + dx < width and not mask[y + dy, x + dx]
    ]
    return sum(changes) / len(changes) if changes else 1.0


@pytest.fixture
def picture() -> Tensor:
    return torch.randint(0, 256, (3, 12, 15), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) // 16


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_contrast_is_the_mean_change_over_the_outline(picture: Tensor, dilation: int) -> None:
    masks = torch.rand(6, 12, 15, generator=torch.Generator().manual_seed(1)) > 0.5
    masks[4], masks[5] = True, False
    similarity = color_similarity(picture[None], stride=1, dilation=dilation)[0]
    got = outline_contrast(masks, similarity, WHOLE.expand(6, 2), (12, 15), dilation=dilation)
    want = torch.tensor([contrast_of(mask, picture, dilation) for mask in masks])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[4:].tolist() == [1, 1], "without an outline in the image nothing speaks against the mask"


def test_windows_and_padding_change_nothing(picture: Tensor) -> None:
    mask = torch.zeros(12, 15, dtype=torch.bool)
    mask[5:9, 6:12] = True
    mask[7, 9] = False
    padded = torch.nn.functional.pad(picture, (0, 17, 0, 20))
    similarity = color_similarity(padded[None], stride=1)[0]
    window = outline_contrast(mask[None, 3:11, 4:14], similarity, torch.tensor([[4, 3]]), (12, 15))
    assert float(window) == pytest.approx(contrast_of(mask, picture), abs=1e-6)


def test_an_outline_on_the_objects_border_scores_best() -> None:
    image = torch.full((3, 20, 20), 40, dtype=torch.uint8)
    image[:, 6:14, 6:14] = 200
    similarity = color_similarity(image[None], stride=1)[0]
    right, large, small = (torch.zeros(20, 20, dtype=torch.bool) for _ in range(3))
    right[6:14, 6:14] = large[3:17, 3:17] = small[9:11, 9:11] = True
    got = outline_contrast(torch.stack([right, large, small]), similarity, WHOLE.expand(3, 2), (20, 20))
    assert float(got[0]) > 0.99
    assert float(got[1]) < 0.01
    assert float(got[2]) < 0.01


def least_of(probability: Tensor, box: tuple[int, int, int, int]) -> float:
    """``reaching`` from its definition: lower and lower, until the mask touches all sides."""
    x0, y0, x1, y1 = box
    part = probability[y0:y1, x0:x1].double()
    for least in torch.arange(outlines.CERTAIN, outlines.DOUBTFUL, -0.001, dtype=torch.float64).tolist():
        mask = part >= least
        if bool(mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()):
            break
    return min(least, float(part.max()) / 2)


def test_a_mask_is_as_sure_as_it_can_be_while_it_touches_all_sides_of_its_box() -> None:
    g = torch.Generator().manual_seed(0)
    probability, inside = torch.rand(40, 9, 11, generator=g) ** 3, torch.zeros(40, 9, 11, dtype=torch.bool)
    probability[30:] *= 0.3  # doubtful
    boxes = []
    for k in range(40):
        (x0, x1), (y0, y1) = (torch.randperm(size, generator=g)[:2].sort().values.tolist() for size in (11, 9))
        boxes.append((x0, y0, x1 + 1, y1 + 1))
        inside[k, y0 : y1 + 1, x0 : x1 + 1] = True
    got = reaching(probability * inside, inside)
    want = torch.tensor([least_of(p, box) for p, box in zip(probability, boxes, strict=True)])
    torch.testing.assert_close(got, want, atol=0.0011, rtol=0)
    assert len(got.unique()) > 20


def test_a_box_that_is_too_large_does_not_blow_its_mask_up() -> None:
    probability, inside = torch.zeros(1, 20, 20), torch.ones(1, 20, 20, dtype=torch.bool)
    probability[:, 5:15, 5:15], probability[:, 4, 5:15] = 0.9, 0.05
    assert float(reaching(probability, inside)) == pytest.approx(outlines.DOUBTFUL)
    probability[:] = 0.04
    assert float(reaching(probability, inside)) == pytest.approx(0.02), "something rather than nothing"
    nothing = torch.zeros_like(inside)
    assert reaching(probability * nothing, nothing).isfinite().all(), "a box that has no pixel"
