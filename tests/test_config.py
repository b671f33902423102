"""pipelines.config: every mistake in the options is named."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from boxinst.config import AugmentConfig, LossConfig, ModelConfig
from boxinst.errors import InputError
from pipelines.config import MAY_CHANGE, TrainConfig

GOOD = TrainConfig(shards="s", steps=10)


@pytest.mark.parametrize(
    ("item", "changes"),
    [
        ("--name", {"name": "a/b"}),
        ("--name", {"name": "-x"}),
        ("--learning-rate", {"learning_rate": 0}),
        ("--workers", {"workers": 0}),
        ("--seed", {"seed": -1}),
        ("--minutes", {"minutes": -1}),
        ("--ema-decay", {"ema_decay": 1}),
        ("--steps", {"epochs": 1}),
        ("--steps", {"steps": 0}),
        ("--batch-size", {"workers": 3}),
        ("--batch-size", {"workers": 4, "workers_min": 2}),  # 3 do not share 4 images
        ("--workers-min", {"workers": 1, "workers_min": 2}),
        ("--milestones", {"schedule": "step"}),
        ("--milestones", {"milestones": (5,)}),
        ("--milestones", {"schedule": "step", "milestones": (8, 5)}),
        ("--loss.bottom-pixels", {"loss": LossConfig(bottom_pixels=10), "augment": AugmentConfig(crop=64)}),
        ("--augment.contrast-stretch", {"augment": AugmentConfig(contrast_stretch=(1, 99))}),
    ],
)
def test_a_mistake_is_named(item: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        replace(GOOD, **changes)
    assert caught.value.item == item
    assert str(caught.value.value)
    assert caught.value.remedy.endswith(".")


def test_any_number_of_workers_shares_a_batch() -> None:
    assert replace(GOOD, workers=2).batch_parts == 2
    assert replace(GOOD, workers=4, workers_min=2, batch_size=24).batch_parts == 12


def test_the_models_contrast_stretch_is_accepted_in_both_places() -> None:
    replace(GOOD, model=ModelConfig(contrast_stretch=(1, 99)), augment=AugmentConfig(contrast_stretch=(1, 99)))


def test_what_a_resumed_run_may_change_exists() -> None:
    assert set(MAY_CHANGE) < {f.name for f in fields(TrainConfig)}
