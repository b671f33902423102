"""Masks to FiftyOne's form and back, and what becomes of a label."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from boxinst.errors import InputError
from pipelines.verdicts import VERDICTS, check_info, crop, digest, outcome, paste, pixels, relative, strictest


@pytest.mark.parametrize("seed", range(20))
def test_crop_and_paste_are_inverse_whatever_spills(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2)
    x, y = rng.uniform(0, width - 0.5), rng.uniform(0, height - 0.5)
    box = [x, y, rng.uniform(x + 0.2, width), rng.uniform(y + 0.2, height)]
    mask = rng.random((height, width)) < rng.choice([0.0, 0.05, 0.6])
    shown, inside = crop(mask, box)
    assert inside.sum() == mask.sum()
    assert shown[0] <= box[0]
    assert shown[2] >= box[2]
    assert inside.shape == (shown[3] - shown[1], shown[2] - shown[0])
    assert np.array_equal(paste(inside, relative(shown, width, height), width, height), mask)


@pytest.mark.parametrize("scale", [1.7, 6.843, 25.0])
def test_a_mask_at_screen_resolution_comes_back_in_the_pixels_of_the_image(scale: float) -> None:
    mask = np.zeros((40, 50), dtype=bool)
    mask[7:31, 12:40] = np.hypot(*(np.mgrid[:24, :28] - np.array([12, 14])[:, None, None])) < 12
    shown, inside = crop(mask, [12, 7, 40, 31])
    size = round((shown[2] - shown[0]) * scale), round((shown[3] - shown[1]) * scale)
    screen = np.asarray(Image.fromarray(inside.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    assert np.array_equal(paste(screen, relative(shown, 50, 40), 50, 40), mask)


def test_paste_leaves_out_what_lies_beyond_the_image() -> None:
    pasted = paste(np.ones((10, 10)), [-0.5, -0.5, 1.0, 1.0], 20, 10)
    assert pasted.sum() == 10 * 5
    assert pasted[:5, :10].all()
    assert not paste(np.ones((0, 4)), [0, 0, 1, 1], 4, 4).any()
    assert not paste(np.ones((4, 4)), [0.5, 0.5, 0, 0.2], 4, 4).any()


def test_relative_and_pixels_are_inverse_inside_the_image() -> None:
    box = [1.25, 3.5, 60.0, 47.75]
    assert pixels(relative(box, 64, 48), 64, 48) == pytest.approx(box)
    assert pixels([-0.1, 0.5, 2.0, 0.25], 64, 48) == pytest.approx([0, 24, 64, 36])


def test_digest_names_pixels_and_not_types() -> None:
    mask = np.eye(5, dtype=bool)
    assert digest(mask) == digest(mask.astype(np.uint8)) == digest(255 * mask.astype(np.uint8))
    assert len({digest(mask), digest(~mask), digest(np.zeros((5, 5))), digest(np.zeros((25, 1))), digest(None)}) == 5


def test_the_strictest_verdict_counts() -> None:
    for tags in itertools.permutations(["accept", "fix", "reject", "other"]):
        assert strictest(tags) == "reject"
    assert strictest(["accept", "fix"]) == "fix"
    assert strictest(["other", "accept"]) == "accept"
    assert strictest(["other"]) is None
    assert strictest(None) is None


@pytest.mark.parametrize(
    ("verdict", "edited", "moved", "masked", "expected"),
    [
        ("accept", False, False, True, "accepted"),
        ("accept", False, True, True, "accepted"),
        ("accept", True, False, True, "edited"),
        ("accept", False, False, False, "no mask"),
        ("reject", False, False, True, "rejected"),
        ("reject", True, False, True, "rejected"),
        ("fix", False, False, True, "fix"),
        ("fix", True, False, True, "edited"),
        (None, True, False, True, "edited"),
        (None, True, False, False, "no mask"),
        (None, False, True, True, "moved"),
        (None, False, False, True, "unreviewed"),
        (None, False, False, False, "unreviewed"),
    ],
)
def test_outcome(verdict: str | None, edited: bool, moved: bool, masked: bool, expected: str) -> None:
    assert outcome(verdict, edited=edited, moved=moved, masked=masked) == expected  # type: ignore[arg-type]


def test_only_a_mask_with_pixels_becomes_a_label() -> None:
    for verdict, edited, moved in itertools.product([None, *VERDICTS], [False, True], [False, True]):
        assert outcome(verdict, edited=edited, moved=moved, masked=False) not in ("accepted", "edited")


@pytest.mark.parametrize(("info", "value"), [(None, "not made by"), ({}, "not made by"), ({"version": 99}, "newer")])
def test_other_datasets_are_refused(info: object, value: str) -> None:
    with pytest.raises(InputError, match=value) as error:
        check_info(info, "mine")
    assert error.value.item == "--dataset"
    assert "'mine'" in error.value.value  # type: ignore[operator]
    assert error.value.remedy
