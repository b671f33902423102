"""Targets, Instances and Batch: defaults, selection and validation."""

from __future__ import annotations

import pytest
import torch

from boxinst.errors import InputError
from boxinst.structures import Batch, Instances, Targets


def targets(masks: bool = True) -> Targets:
    return Targets(
        boxes=torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3], [2, 0, 4, 2]]),
        labels=torch.tensor([2, 0, 1]),
        masks=torch.eye(3, 16).bool().view(3, 4, 4) if masks else None,
    )


def test_defaults_follow_from_what_is_given() -> None:
    with_masks, without = targets(), targets(masks=False)
    assert with_masks.has_mask.all()
    assert not without.has_mask.any()
    for t in (with_masks, without):
        assert len(t) == 3
        assert t.tight.all()
        assert not t.crowd.any()
        assert t.ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_selection_takes_whole_rows(index: torch.Tensor) -> None:
    picked = targets()[index]
    for name in ("boxes", "labels", "masks", "has_mask", "tight", "ids", "crowd"):
        assert torch.equal(getattr(picked, name), getattr(targets(), name)[index])
    assert targets(masks=False)[index].masks is None
    assert len(targets()[torch.zeros(0, dtype=torch.int64)]) == 0


def test_moving_keeps_everything() -> None:
    for t in (targets(), targets(masks=False)):
        moved = Batch(torch.zeros(1, 3, 4, 4), torch.ones(1, 4, 4) > 0, [t], [5]).to("cpu")
        assert moved.image_ids == [5]
        assert torch.equal(moved.targets[0].boxes, t.boxes)
        assert (moved.targets[0].masks is None) == (t.masks is None)


@pytest.mark.parametrize(
    ("change", "item", "value", "remedy"),
    [
        ({"boxes": torch.zeros(3, 5)}, "Targets.boxes", "(3, 5)", "[n, 4]"),
        ({"boxes": torch.zeros(4)}, "Targets.boxes", "(4,)", "[n, 4]"),
        ({"labels": torch.zeros(2)}, "Targets.labels", "2 rows", "There are 3 boxes"),
        ({"masks": torch.zeros(4, 2, 2).bool()}, "Targets.masks", "4 rows", "There are 3 boxes"),
        ({"has_mask": torch.ones(3).bool()}, "Targets.has_mask", "without masks", "Give the masks"),
    ],
)
def test_rows_that_do_not_match_are_refused(change: dict, item: str, value: str, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        Targets(**{"boxes": torch.zeros(3, 4), "labels": torch.zeros(3), **change})
    for part in (item, value, remedy):
        assert part in str(error.value)


def test_the_length_of_instances_is_their_number() -> None:
    empty = Instances(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.bool)
    )
    assert len(empty) == 0
