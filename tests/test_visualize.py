"""Pictures: what is drawn where, in which colour, and that they open."""

from __future__ import annotations

import io
import itertools

import numpy as np
import torch
from PIL import Image

from boxinst import visualize


def test_masks_are_blended_with_the_colour_of_their_instance() -> None:
    image = torch.full((3, 20, 30), 100, dtype=torch.uint8)
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 2:8, 2:12] = masks[1, 5:15, 5:9] = True
    drawn = visualize.overlay(image, masks=masks)
    for y, x, owner in ((3, 3, 0), (12, 6, 1), (6, 6, 1)):  # where both are, the later
        expected = (torch.tensor(visualize.color_of(owner)) + 100) / 2
        assert (drawn[:, y, x].float() - expected).abs().max() <= 0.5
    assert torch.equal(drawn[:, ~masks.any(0)], image[:, ~masks.any(0)])
    assert (image == 100).all()
    assert torch.equal(drawn, visualize.overlay(image, masks=masks))


def test_a_box_is_the_outline_of_the_pixels_inside_it() -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    drawn = visualize.overlay(image, torch.tensor([[4.0, 5, 14, 11]]), colors=[(255, 0, 10)])
    outline = torch.zeros(20, 30, dtype=torch.bool)
    outline[5:11, 4:14] = True
    outline[6:10, 5:13] = False
    assert torch.equal(drawn[0] == 255, outline)
    assert torch.equal(drawn[2] == 10, outline)


def test_degenerate_boxes_and_nothing_at_all_can_be_drawn() -> None:
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)
    assert visualize.overlay(image, torch.tensor([[3.0, 3, 3, 3]])).any()
    assert torch.equal(visualize.overlay(image, torch.zeros(0, 4), torch.zeros(0, 9, 9, dtype=torch.bool)), image)
    assert torch.equal(visualize.overlay(image), image)


def test_colours_are_distinct() -> None:
    colors = [visualize.color_of(i) for i in range(24)]
    assert len(set(colors)) == 24
    for a, b in itertools.pairwise(colors):
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 120


def test_side_by_side_keeps_each_picture_below_its_title() -> None:
    left = torch.full((3, 30, 40), 10, dtype=torch.uint8)
    right = torch.full((3, 20, 50), 60, dtype=torch.uint8)
    row = visualize.side_by_side([left, right], ["boxes", "masks"])
    strip = row.shape[1] - 30
    assert 10 <= strip <= 30
    assert (row[:, strip:, :40] == 10).all()
    assert (row[:, strip : strip + 20, -50:] == 60).all()
    assert (row[:, strip + 20 :, -50:] == 255).all()
    assert (row[:, :strip, :40] < 128).any()  # text
    assert not torch.equal(row, visualize.side_by_side([left, right], ["masks", "boxes"]))


def test_png_holds_the_same_pixels() -> None:
    image = torch.randint(0, 256, (3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    opened = np.asarray(Image.open(io.BytesIO(visualize.to_png(image))))
    assert np.array_equal(opened, image.permute(1, 2, 0).numpy())
