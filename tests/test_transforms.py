"""Images and targets move together, exactly, and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from boxinst import rle, transforms
from boxinst.config import AugmentConfig
from boxinst.errors import InputError
from boxinst.structures import Instances, Targets


def sample(height: int = 40, width: int = 56, count: int = 6, seed: int = 0) -> tuple[torch.Tensor, Targets]:
    """An image whose instances are filled boxes, in which the pixels tell where they came from."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = int(torch.randint(height - 9, (1,), generator=rng)), int(torch.randint(width - 9, (1,), generator=rng))
        mask[y : y + 3 + int(torch.randint(6, (1,), generator=rng)), x : x + 8] = True
    boxes = rle.extent(rle.encode(masks), height, width)
    return image, Targets(boxes, torch.arange(count), masks, ids=torch.arange(count) + 100)


def extent(masks: torch.Tensor) -> torch.Tensor:
    return rle.extent(rle.encode(masks), *masks.shape[1:])


def assert_same(a: tuple[torch.Tensor, Targets], b: tuple[torch.Tensor, Targets]) -> None:
    assert torch.equal(a[0], b[0])
    for name in ("boxes", "labels", "has_mask", "tight", "ids", "crowd"):
        assert torch.equal(getattr(a[1], name), getattr(b[1], name)), name
    assert (a[1].masks is None) == (b[1].masks is None)
    if a[1].masks is not None:
        assert torch.equal(a[1].masks, b[1].masks)


@pytest.mark.parametrize("flip", [transforms.hflip, transforms.vflip])
def test_a_flip_moves_pixels_masks_and_boxes_alike_and_undoes_itself(flip) -> None:
    image, targets = sample()
    flipped, moved = flip(image, targets)
    assert not torch.equal(flipped, image)
    assert torch.equal(extent(moved.masks), moved.boxes)
    for before, after in zip(targets.masks, moved.masks, strict=True):
        assert torch.equal(image[:, before].sort().values, flipped[:, after].sort().values)
    assert_same(flip(flipped, moved), (image, targets))
    assert flip(image, replace(targets, masks=None, has_mask=None))[1].masks is None


def test_a_crop_shifts_by_its_corner_and_marks_what_it_cuts() -> None:
    image, targets = sample(count=30)
    part, kept = transforms.crop(image, targets, (10, 5, 42, 29))
    assert torch.equal(part, image[:, 5:29, 10:42])
    assert 0 < len(kept) < 30
    assert (~kept.tight).any()
    assert kept.tight.any()
    origin = torch.tensor([10.0, 5, 10, 5])
    for box, tight, mask, row in zip(kept.boxes, kept.tight, kept.masks, kept.ids - 100, strict=True):
        whole = targets.boxes[row]
        assert torch.equal(mask, targets.masks[row, 5:29, 10:42])
        assert bool(tight) == bool((whole >= origin).all() and whole[2] <= 42 and whole[3] <= 29)
        assert torch.equal(extent(mask[None])[0], box)
        if tight:
            assert torch.equal(box + origin, whole)
    dropped = sorted(set(range(30)) - set((kept.ids - 100).tolist()))
    assert not targets.masks[dropped, 5:29, 10:42].any()


def test_a_crop_drops_slivers_and_labels_without_a_pixel_but_no_small_whole_box() -> None:
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    boxes = torch.tensor(
        [
            [2.0, 2, 2.5, 2.5],  # tiny and whole: kept
            [9.5, 2, 15, 8],  # half a pixel wide after the cut: dropped
            [8, 2, 15, 8],  # cut, with a mask that starts beyond the cut: dropped
            [8, 2, 15, 8],  # the same with no mask label: kept
            [12, 12, 18, 18],  # outside: dropped
        ]
    )
    masks = torch.zeros(5, 20, 20, dtype=torch.bool)
    masks[2, 2:8, 11:15] = True
    targets = Targets(boxes, torch.zeros(5), masks, has_mask=torch.tensor([False, False, True, False, False]))
    _, kept = transforms.crop(image, targets, (0, 0, 10, 10))
    assert kept.ids.tolist() == [0, 3]
    assert kept.tight.tolist() == [True, False]
    again = transforms.crop(image, replace(kept, masks=None, has_mask=None), (0, 0, 10, 10))[1]
    assert again.tight.tolist() == [True, False]  # once cut, never tight again


def test_resize_scales_each_axis_by_its_own_ratio() -> None:
    image, targets = sample(40, 60)
    bigger, moved = transforms.resize(image, targets, (80, 180))
    assert bigger.shape == (3, 80, 180)
    assert bigger.dtype == torch.uint8
    assert torch.equal(moved.boxes, targets.boxes * torch.tensor([3.0, 2, 3, 2]))
    assert torch.equal(extent(moved.masks), moved.boxes)  # whole factors: each pixel becomes 2 × 3
    back, restored = transforms.resize(bigger, moved, (40, 60))
    assert torch.equal(restored.masks, targets.masks)
    torch.testing.assert_close(restored.boxes, targets.boxes)
    assert (back.float() - image.float()).abs().mean() < 45
    assert_same(transforms.resize(image, targets, (40, 60)), (image, targets))


def test_resizing_smooths_before_it_samples() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    small, _ = transforms.resize(stripes, Targets(torch.zeros(0, 4), torch.zeros(0)), (16, 16))
    assert (small.float() - 100).abs().max() <= 8


@pytest.mark.parametrize(("low", "high"), [(0.5, 99.8), (0.0, 100.0), (25.0, 60.0)])
def test_contrast_stretch_equals_numpys_percentiles(low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(60, 20, (3, 21, 34)).clip(0, 255).astype(np.uint8)
    image[1] //= 2
    dark, bright = np.percentile(image, (low, high))
    expected = ((image - dark) / (bright - dark)).clip(0, 1) * 255
    got = transforms.contrast_stretch(torch.from_numpy(image), low, high)
    assert got.dtype == torch.uint8
    assert np.abs(got.numpy() - expected).max() <= 0.501
    assert got.min() == 0
    assert got.max() == 255


def test_a_constant_image_is_not_stretched() -> None:
    image = torch.full((3, 8, 8), 7, dtype=torch.uint8)
    assert torch.equal(transforms.contrast_stretch(image, 0.5, 99.8), image)
    image[0, 0, 0] = 200  # beyond the percentiles
    assert torch.equal(transforms.contrast_stretch(image, 2.0, 98.0), image)


CONFIG = AugmentConfig(short_sides=(24, 32, 48), max_side=60, crop=24, vflip=True, contrast_stretch=(1.0, 99.0))


def test_augment_is_a_function_of_its_generator() -> None:
    image, targets = sample()
    before = image.clone()
    views = [transforms.augment(image, targets, CONFIG, np.random.default_rng([3, index])) for index in range(12)]
    for index, view in enumerate(views):
        assert_same(view, transforms.augment(image, targets, CONFIG, np.random.default_rng([3, index])))
    assert len({view[0].numpy().tobytes() for view in views}) > 8
    assert torch.equal(image, before)


def test_augment_keeps_boxes_and_masks_together() -> None:
    image, targets = sample(count=20)
    for index in range(20):
        config = replace(CONFIG, short_sides=(40, 80), max_side=1000)
        view, moved = transforms.augment(image, targets, config, np.random.default_rng(index))
        assert view.shape == (3, 24, 24)
        assert torch.equal(extent(moved.masks), moved.boxes)


def test_a_crop_larger_than_the_image_takes_the_whole_image() -> None:
    image, targets = sample()
    config = AugmentConfig(crop=48, hflip=False)
    view, _ = transforms.augment(image, targets, config, np.random.default_rng(0))
    assert view.shape == (3, 40, 48)
    config = AugmentConfig(crop=500, hflip=False)
    assert_same(transforms.augment(image, targets, config, np.random.default_rng(0)), (image, targets))


def test_each_flip_happens_about_half_of_the_time() -> None:
    image, targets = sample()
    flips = {"hflip": transforms.hflip, "vflip": transforms.vflip}
    for name, flip in flips.items():
        config = AugmentConfig(**{"hflip": False, "vflip": False, name: True})
        rng = np.random.default_rng(0)
        times = sum(
            torch.equal(transforms.augment(image, targets, config, rng)[0], flip(image, targets)[0]) for _ in range(200)
        )
        assert 70 < times < 130


@pytest.mark.parametrize(
    ("change", "item", "value", "remedy"),
    [
        ({"short_sides": (0, 640)}, "augment.short_sides", "(0, 640)", "at least 1"),
        ({"max_side": 0}, "augment.max_side", "0", "at least 1"),
        ({"crop": -1}, "augment.crop", "-1", "or 0 for no crop"),
        ({"contrast_stretch": (99.0, 1.0)}, "augment.contrast_stretch", "(99.0, 1.0)", "low < high"),
    ],
)
def test_bad_settings_are_refused(change: dict, item: str, value: str, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        AugmentConfig(**change)
    for part in (item, value, remedy):
        assert part in str(error.value)


def test_collate_pads_at_right_and_bottom_and_marks_the_padding() -> None:
    (first, a), (second, b) = sample(40, 56), sample(33, 30, count=2, seed=1)
    b = replace(b, masks=None, has_mask=None)
    batch = transforms.collate([first, second], [a, b], [7, 9], ignore_bottom=[10, 0])
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[0, :, :40, :56], first)
    assert batch.images[0].sum() == first.sum()
    assert batch.images[1].sum() == second.sum()
    expected = torch.zeros(2, 64, 64, dtype=torch.bool)
    expected[0, :30, :56] = expected[1, :33, :30] = True
    assert torch.equal(batch.valid, expected)
    assert batch.image_ids == [7, 9]
    assert torch.equal(batch.targets[0].boxes, a.boxes)
    assert torch.equal(batch.targets[0].masks[:, :40, :56], a.masks)
    assert batch.targets[0].masks.shape == (6, 64, 64)
    assert batch.targets[0].masks.sum() == a.masks.sum()
    assert batch.targets[1].masks is None


def test_collate_needs_no_padding_when_the_size_fits_and_may_ignore_all_rows() -> None:
    image = torch.ones(3, 32, 64, dtype=torch.uint8)
    batch = transforms.collate([image], [Targets(torch.zeros(0, 4), torch.zeros(0))], [1], ignore_bottom=[40])
    assert batch.images.shape == (1, 3, 32, 64)
    assert not batch.valid.any()


@pytest.mark.parametrize(
    ("short_side", "max_side", "size"),
    [(80, 1333, (80, 112)), (80, 56, (40, 56)), (10, 1333, (10, 14)), (0, 9, (40, 56))],
)
def test_eval_resize_bounds_both_sides(short_side: int, max_side: int, size: tuple[int, int]) -> None:
    image, _ = sample()
    resized, scale = transforms.eval_resize(image, short_side, max_side)
    assert resized.shape[1:] == size
    torch.testing.assert_close(scale, torch.tensor([size[1] / 56, size[0] / 40] * 2))


def test_resize_rounds_as_the_published_program() -> None:
    """105 · (800 / 105) · (1333 / (310 · 800 / 105)) is a hair under 451.5, and 105 · (1333 / 310) is one above."""
    resized, _ = transforms.eval_resize(torch.zeros(3, 105, 310, dtype=torch.uint8), 800, 1333)
    assert resized.shape[1:] == (451, 1333)


@pytest.mark.parametrize("with_logits", [False, True])
def test_restore_is_the_way_back(with_logits: bool) -> None:
    image, targets = sample()
    resized, scale = transforms.eval_resize(image, 120)
    _, moved = transforms.resize(image, targets, (resized.shape[1], resized.shape[2]))
    torch.testing.assert_close(moved.boxes, targets.boxes * scale)
    logits = (moved.masks.float() - 0.5) * 8 if with_logits else None
    found = Instances(moved.boxes, torch.ones(6), targets.labels, moved.masks, logits)
    back = transforms.restore(found, 40, 56)
    torch.testing.assert_close(back.boxes, targets.boxes)
    assert torch.equal(back.masks, targets.masks)
    if with_logits:
        assert back.mask_logits.shape == (6, 40, 56)
        assert torch.equal(back.mask_logits > 0, targets.masks)
    else:
        assert back.mask_logits is None
    assert transforms.restore(found, 120, 168) is found
