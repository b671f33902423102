"""boxinst.prompts: pixels that lie in several boxes and may belong to one mask alone."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from boxinst import prompts
from boxinst.condinst import CondInst
from boxinst.config import ModelConfig
from boxinst.dynamic import box_masks
from boxinst.predict import segment

SIZE = (45, 70)
BOXES = torch.tensor(
    [
        [3.5, 4, 30.2, 40],
        [20, 10, 55, 44],  # overlaps its neighbours
        [40, 0, 70, 20.7],
        [24, 14, 29, 19],  # inside two others
        [-5, 20, 12, 60],  # beyond the image
        [80, 5, 90, 9],  # outside
        [3.5, 4, 30.2, 40],  # the first one again
    ]
)


def network(views: int, *, exclusive: bool) -> CondInst:
    torch.manual_seed(1)
    slim = {"width": 8, "fpn_channels": 16, "mask_branch_channels": 8, "mask_branch_layers": 1}
    config = ModelConfig(
        classes=("a",), backbone="resnet18", detect=False, mask_stride=4, views=views, exclusive=exclusive, **slim
    )
    model = CondInst(config).eval()
    with torch.no_grad():
        for name, weight in model.mask_branch.named_parameters():
            if name.endswith("0.weight"):  # else nothing is seen of the features beside the coordinates
                weight.mul_(2)
    return model


def picture() -> Tensor:
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kept", [0, prompts.PIXELS_KEPT])
@pytest.mark.parametrize("views", [1, 4])
def test_a_pixel_belongs_to_the_surest_mask(views: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over all pixels, from masks that may overlap; with all windows in memory, and computed again."""
    monkeypatch.setattr(prompts, "PIXELS_KEPT", kept)
    (shared,) = segment(network(views, exclusive=False), [picture()], [BOXES], logits=True)
    (owned,) = segment(network(views, exclusive=True), [picture()], [BOXES], logits=True)
    assert shared.mask_logits is not None
    wanted = shared.masks.clone()
    own = box_masks(BOXES, SIZE, 1)
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            rivals = [float(shared.mask_logits[k, y, x]) for k in range(len(BOXES)) if own[k, y, x]]
            for k in range(len(BOXES)):
                if wanted[k, y, x] and float(shared.mask_logits[k, y, x]) < max(rivals):
                    wanted[k, y, x] = False
    robbed = shared.masks.any(2).any(1) & ~wanted.any(2).any(1)
    wanted[robbed] = shared.masks[robbed]
    assert torch.equal(owned.masks, wanted)
    assert torch.equal(owned.mask_logits, shared.mask_logits)
    lost = (shared.masks & ~owned.masks).sum((1, 2))
    assert bool(lost.any()), "else there is nothing to see here"
    assert torch.equal(owned.masks[0], owned.masks[6]), "of equal boxes none loses"


def test_the_order_of_boxes_and_the_company_of_images_change_nothing() -> None:
    model = network(1, exclusive=True)
    other = picture().flip(2)
    (alone,) = segment(model, [picture()], [BOXES])
    order = torch.tensor([4, 2, 6, 0, 5, 3, 1])
    first, second = segment(model, [picture(), other], [BOXES[order], BOXES[:0]])
    assert torch.equal(first.masks, alone.masks[order])
    torch.testing.assert_close(first.scores, alone.scores[order])
    assert second.masks.shape == (0, *SIZE)


def test_boxes_apart_are_as_before() -> None:
    apart = BOXES[torch.tensor([0, 2, 5])]
    shared, owned = (segment(network(1, exclusive=e), [picture()], [apart])[0] for e in (False, True))
    assert torch.equal(shared.masks, owned.masks)
    assert torch.equal(shared.scores, owned.scores)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_what_no_mask_writes_to_takes_no_memory_though_it_is_read() -> None:
    before = resident()
    masks = prompts._blank_masks(200, 1024, 1024)
    masks[:, 500:516, 100:116] = True
    assert int(masks.any(2).sum()) == 200 * 16
    assert resident() - before < 60e6, "all of them are 210 MB"


def test_no_mask_is_left_without_a_pixel() -> None:
    """A small box whose pixels another mask is surer of keeps its mask."""
    model = network(1, exclusive=True)
    hidden = torch.tensor([[0.0, 0, 70, 45], *([x, y, x + 3, y + 3] for x in (10, 30, 50) for y in (10, 30))])
    (shared,) = segment(network(1, exclusive=False), [picture()], [hidden], logits=True)
    (owned,) = segment(model, [picture()], [hidden])
    assert bool(owned.masks.any(2).any(1).all())
    assert shared.mask_logits is not None
    surer = [bool((shared.mask_logits[0] > shared.mask_logits[k])[shared.masks[k]].all()) for k in range(1, 7)]
    assert any(surer), "else no mask could have been left without a pixel"
