"""boxinst.predict: the score of a mask, judged by the colours on both sides of its outline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from boxinst.condinst import CondInst
from boxinst.config import ModelConfig
from boxinst.losses import color_similarity
from boxinst.predict import MIRRORS, mirror_boxes, outline_contrast, segment

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


@pytest.mark.parametrize("axes", [(2,), (1,), (1, 2)])
def test_four_views_see_a_mirrored_image_alike(axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tiny = {"backbone": "resnet18", "width": 8, "fpn_channels": 16, "mask_branch_channels": 8, "mask_branch_layers": 1}
    model = CondInst(ModelConfig(classes=("a",), detect=False, mask_stride=4, views=4, **tiny)).eval()
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
    known = torch.tensor([0, 1, 2, 4])  # the one outside has no mask, and its score no meaning
    torch.testing.assert_close(turned.scores[known], plain.scores[known], rtol=1e-4, atol=1e-5)
    same = (turned.masks.flip(axes) == plain.masks)[known].float().mean()
    assert float(same) > 0.9999, "but for probabilities of exactly a half"
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
