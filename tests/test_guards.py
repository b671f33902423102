"""pipelines.guards: what is wrong is told with an option and a value; healthy noise is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from boxinst.config import LossConfig
from pipelines import guards
from pipelines.config import TrainConfig
from pipelines.guards import Share, collapsed_masks, not_finite, rise, rising_pairwise

CONFIG = TrainConfig(shards="s", steps=1000, loss=LossConfig(warmup_steps=100))
NAN, INF = float("nan"), float("inf")


# A loss that is not finite.


def test_a_broken_step_names_terms_images_checkpoint_and_options() -> None:
    share = Share(0, [5, 9], {"loss": NAN, "projection": 0.5, "pairwise": INF, "grad_norm": NAN})
    error = not_finite(41, [share], [(20, "runs/x/checkpoint_20"), (30, "runs/x/checkpoint_30")], CONFIG)
    assert error.item == "loss"
    assert error.value == "not finite in step 41: loss nan, pairwise inf, grad_norm nan with the images 5, 9"
    assert "The last good checkpoint is runs/x/checkpoint_30." in error.remedy
    assert "--learning-rate 0.0005 or --grad-clip 5, or other lower values, goes on from there." in error.remedy
    assert "Remove" not in error.remedy


def test_the_ranks_to_blame_are_named() -> None:
    shares = [Share(r, [r], {"loss": NAN if r == 1 else 1.0, "grad_norm": NAN}) for r in range(3)]
    error = not_finite(1, shares, [], CONFIG)
    assert error.value == "not finite in step 1: on rank 1 loss nan, grad_norm nan with the images 1"
    assert "no good checkpoint yet" in error.remedy
    assert "starts anew" in error.remedy


def test_a_gradient_alone_may_come_from_any_rank() -> None:
    shares = [Share(r, [10 + r], {"loss": 1.0, "grad_norm": INF}) for r in range(2)]
    error = not_finite(8, shares, [], replace(CONFIG, grad_clip=0))
    assert error.item == "gradient"
    assert "images 10" in str(error.value)
    assert "images 11" in str(error.value)
    assert "--grad-clip 10," in error.remedy  # there was no limit


def test_a_checkpoint_that_leads_straight_to_the_step_is_not_a_good_one() -> None:
    share = Share(0, [1], {"loss": NAN, "grad_norm": NAN})
    error = not_finite(31, [share], [(20, "a"), (30, "b")], CONFIG)
    assert "The last good checkpoint is a. Remove b, which leads straight to this step; then the same" in error.remedy
    error = not_finite(31, [share], [(30, "b")], CONFIG)
    assert "no good checkpoint yet. Remove b" in error.remedy
    assert "starts anew" in error.remedy


# Masks that collapse.


def masks(full: float = 0.0, hollow: float = 0.0) -> dict[str, float]:
    return {"fill_over_95": full, "fill_under_05": hollow, "fill": 0.7}


def test_healthy_masks_some_of_them_rectangles_give_no_warning() -> None:
    assert collapsed_masks(masks(0.5, 0.25), 500, CONFIG) == {}
    assert collapsed_masks({"instances": 0.0}, 500, CONFIG) == {}  # no mask at all, as of an early detector


def test_masks_are_rough_before_the_end_of_the_warm_up() -> None:
    assert collapsed_masks(masks(1, 0), 99, CONFIG) == {}
    assert set(collapsed_masks(masks(1, 0), 100, CONFIG)) == {guards.FULL}
    endless = replace(CONFIG, loss=LossConfig())  # 10,000 steps of warm-up in a run of 1,000
    assert collapsed_masks(masks(1, 0), 999, endless) == {}
    assert set(collapsed_masks(masks(1, 0), 1000, endless)) == {guards.FULL}


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            LossConfig(warmup_steps=100),
            "raise --loss.pairwise-weight (now 1) to 2; for round objects set --loss.fill-range 0.5 0.785.",
        ),
        (LossConfig(warmup_steps=100, pairwise_weight=0), "set --loss.pairwise-weight (now 0) to 1."),
        (LossConfig(), "lower --loss.warmup-steps (now 10000) to 100."),
    ],
)
def test_full_masks_name_the_option_that_fits_the_run(loss: LossConfig, said: str) -> None:
    found = collapsed_masks(masks(0.72), 1000, replace(CONFIG, loss=loss))
    assert found[guards.FULL].startswith("At step 1,000 72% of the masks fill their whole box.")
    assert found[guards.FULL].endswith(f"{said} {guards.ANEW}")


def test_empty_masks_name_warm_up_and_weight() -> None:
    found = collapsed_masks(masks(0, 0.3), 400, CONFIG)
    assert "30% of the masks are empty" in found[guards.HOLLOW]
    assert "raise --loss.warmup-steps (now 100) to 200" in found[guards.HOLLOW]
    assert "lower --loss.pairwise-weight (now 1) to 0.5" in found[guards.HOLLOW]


# A pairwise loss that rises.


def noisy(trend: np.ndarray, seed: int, spread: float = 0.2) -> list[float]:
    """A trend with the noise of real entries, which is some 20 % of their value, and an outlier now and then."""
    rng = np.random.default_rng(seed)
    values = trend * np.exp(rng.normal(0, spread, len(trend)))
    return list(np.where(rng.random(len(trend)) < 0.03, 3 * values, values))


def raised(entries: list[float]) -> bool:
    """Whether it is found at any time of the run."""
    return any(rise(entries[:count]) is not None for count in range(1, len(entries) + 1, max(1, len(entries) // 25)))


@pytest.mark.parametrize("length", [30, 200, 1000])
def test_neither_noise_nor_a_fall_is_a_rise(length: int) -> None:
    t = np.arange(length) / length
    for trend in (np.full(length, 0.05), 0.04 + 0.12 * np.exp(-8 * t), 0.1 - 0.06 * t):
        assert sum(raised(noisy(trend, seed)) for seed in range(20)) == 0


@pytest.mark.parametrize("length", [100, 400])
def test_twice_the_usual_noise_is_rarely_a_rise(length: int) -> None:
    assert sum(raised(noisy(np.full(length, 0.05), seed, spread=0.4)) for seed in range(40)) <= 3


@pytest.mark.parametrize("length", [48, 200, 1000])
def test_a_rise_is_found(length: int) -> None:
    t = np.arange(length) / length
    falls_and_rises = np.where(t < 0.4, 0.1 - 0.15 * t, 0.04 + 0.15 * (t - 0.4))
    for trend in (np.where(t < 0.6, 0.04, 0.09), 0.04 + 0.08 * t, falls_and_rises):
        assert sum(raised(noisy(trend, seed)) for seed in range(20)) >= 18


def test_a_run_of_nuclei_is_healthy() -> None:
    """The entries of a run of the recipe `nuclei` after its warm-up, as MLflow has them."""
    entries = (
        "126 90 91 84 68 78 72 79 67 66 59 62 68 65 59 64 61 54 55 62 64 53 59 55 49 49 53 49 57 54 51 57 51 45 52 51 "
        "53 54 48 39 56"
    )
    values = [int(e) / 1000 for e in entries.split()]
    assert not raised(values)
    assert raised([*values, *(2 * value for value in values[-20:])])


def test_the_rise_names_rate_and_threshold() -> None:
    entries = [0.04] * 20 + [0.1] * 20
    (kind, text), *_ = rising_pairwise(entries, 700, CONFIG).items()
    assert kind == guards.PAIRWISE
    assert "2.5 times" in text
    assert "--learning-rate (now 0.001) to 0.0005" in text
    assert "--loss.color-threshold (now 0.3) to 0.65" in text
    assert rising_pairwise([0.0] * 40, 700, CONFIG) == {}  # every instance has a mask
