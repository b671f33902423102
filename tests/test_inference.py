"""pipelines.inference: the boxes of an image are seen together, whatever the memory that their masks take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from boxinst.condinst import CondInst
from boxinst.config import ModelConfig
from boxinst.structures import Instances
from pipelines import inference
from pipelines.config import Resolution

BOXES = torch.tensor([[8.0 * k, 6.0 * k, 8.0 * k + 30, 6.0 * k + 24] for k in range(8)])
"""Each overlaps its neighbours."""


class Listening:
    """A network that remembers how many boxes it was given at a time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        slim = {"width": 8, "fpn_channels": 16, "mask_branch_channels": 8, "mask_branch_layers": 1}
        config = ModelConfig(classes=("a",), backbone="resnet18", detect=False, mask_stride=4, exclusive=True, **slim)
        self.network, self.given = CondInst(config).eval(), list[list[int]]()

    def segment(self, images: list[Tensor], boxes: list[Tensor]) -> list[Instances]:
        self.given.append([len(b) for b in boxes])
        return self.network.segment(images, boxes)


def masks(model: Listening, images: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
    found: list[list[Tensor]] = [[] for _ in images]
    for k, which, instances in inference.segment(model, images, boxes, Resolution(0, 1333)):
        assert which.start == sum(map(len, found[k]))
        found[k].append(instances.masks)
    return [torch.cat(pieces) if pieces else torch.zeros(0) for pieces in found]


def test_masks_that_take_much_memory_still_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, 72, 96), dtype=torch.uint8, generator=generator) for _ in range(3)]
    boxes = [BOXES, BOXES[:1], BOXES[:0]]
    model = Listening()
    whole = masks(model, images, boxes)
    assert model.given == [[8, 1, 0]]
    alone = [masks(model, images[:1], [box[None]])[0] for box in BOXES]
    assert int((torch.cat(alone).sum(0) > 1).sum()) > 0, "else there is no pixel to share"

    model.given.clear()
    monkeypatch.setattr(inference, "MASK_PIXELS", 2 * 72 * 96)
    for image, wanted in zip(masks(model, images, boxes), whole, strict=True):
        assert torch.equal(image, wanted)
    assert model.given == [[1, 0], [8]], "what is too much for company goes alone, with all of its boxes"

    model.given.clear()
    monkeypatch.setattr(inference, "MASK_PIXELS_OF_ONE", 3 * 72 * 96)
    assert [len(m) for m in masks(model, images, boxes)] == [8, 1, 0]
    assert model.given == [[1, 0], [3], [3], [2]]
