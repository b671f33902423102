"""What can go wrong in a training, told by its figures and put into words that name the option to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from boxinst.errors import InputError
from pipelines.config import TrainConfig

# ------------------------------------------------------------------------------------------- a loss that is not finite


@dataclass(frozen=True)
class Share:
    """What one rank had in a step."""

    rank: int
    image_ids: Sequence[int]
    terms: Mapping[str, float]
    """Loss terms, ``loss`` and ``grad_norm``, by name."""

    @property
    def broken(self) -> dict[str, float]:
        """The terms that are not finite; the gradient's length, which all ranks share, is none of one rank's."""
        return {k: v for k, v in self.terms.items() if not math.isfinite(v) and k != "grad_norm"}


def not_finite(
    step: int, shares: Sequence[Share], checkpoints: Sequence[tuple[int, str]], config: TrainConfig
) -> InputError:
    """The error of a step whose loss or gradient is not finite.

    Args:
        step: counted from 1.
        shares: of all ranks.
        checkpoints: (steps done, path) of those that are kept, oldest first.
        config: of the run.
    """
    guilty = [s for s in shares if s.broken]
    said = []
    for share in guilty or shares:  # a gradient alone may come from any rank
        where = f"on rank {share.rank} " if len(shares) > 1 else ""
        terms = share.broken | {"grad_norm": share.terms["grad_norm"]}
        ids = ", ".join(map(str, share.image_ids))
        said.append(f"{where}{', '.join(f'{k} {v}' for k, v in terms.items())} with the images {ids}")
    value = f"not finite in step {step}: {'; '.join(said)}"
    return InputError("loss" if guilty else "gradient", value, _way_on(step, checkpoints, config))


def _way_on(step: int, checkpoints: Sequence[tuple[int, str]], config: TrainConfig) -> str:
    """Where to go on from, and with what."""
    options = f"--learning-rate {config.learning_rate / 2:g} or --grad-clip {(config.grad_clip or 20) / 2:g}"
    # A checkpoint that the very step before has left holds the weights that the loss was computed with: with the same
    # images it would come out the same.
    good = [path for done, path in checkpoints if done < step - 1]
    stale = [path for done, path in checkpoints if done >= step - 1]
    says = ["Look at these images and their boxes."]
    says.append(f"The last good checkpoint is {good[-1]}." if good else "There is no good checkpoint yet.")
    same = f"the same command with {options}, or other lower values, goes on from there."
    if not good:
        same = f"the same command with {options}, or other lower values, starts anew."
    if stale:
        same = f"Remove {stale[-1]}, which leads straight to this step; then {same}"
    return " ".join([*says, same[0].upper() + same[1:]])


# ------------------------------------------------------------------------------------------------- masks that collapse

MASKS = FULL, HOLLOW = "full masks", "empty masks"
"""Kinds of warnings about masks."""

FULL_SHARE, HOLLOW_SHARE = 0.5, 0.25
"""Shares of masks that fill their box, or leave it empty, above which something is wrong. Some objects are rectangles,
so more than half of the masks must be; hardly any object leaves its box empty."""

ANEW = "Stop, and start with that under another --name: a run that goes on keeps its losses."
"""What every such warning ends with."""


def collapsed_masks(metrics: Mapping[str, float], step: int, config: TrainConfig) -> dict[str, str]:
    """Warnings about the masks of a validation, by kind; before the end of the warm-up they are rough by design.

    Args:
        metrics: of ``Validation.merge``.
        step: optimiser steps done.
        config: of the run.
    """
    found: dict[str, str] = {}
    if step < min(config.loss.warmup_steps, config.steps):
        return found
    if (share := metrics.get("fill_over_95", 0.0)) > FULL_SHARE:
        found[FULL] = f"At step {step:,} {share:.0%} of the masks fill their whole box. {_against_full(config)}"
    if (share := metrics.get("fill_under_05", 0.0)) > HOLLOW_SHARE:
        found[HOLLOW] = f"At step {step:,} {share:.0%} of the masks are empty or nearly so. {_against_hollow(config)}"
    return {kind: f"{text} {ANEW}" for kind, text in found.items()}


def _against_full(config: TrainConfig) -> str:
    loss = config.loss
    if not loss.pairwise_weight:
        return "Nothing draws them to the objects: set --loss.pairwise-weight (now 0) to 1."
    if 3 * loss.warmup_steps > config.steps:
        better = max(config.steps // 10, 1)
        return f"The colour term comes too late: lower --loss.warmup-steps (now {loss.warmup_steps}) to {better}."
    return (
        "The colour term is too weak to cut the corners off: raise --loss.pairwise-weight (now "
        f"{loss.pairwise_weight:g}) to {2 * loss.pairwise_weight:g}; for round objects set --loss.fill-range 0.5 0.785."
    )


def _against_hollow(config: TrainConfig) -> str:
    loss = config.loss
    return (
        f"The colour term came too early or weighs too much: raise --loss.warmup-steps (now {loss.warmup_steps}) to "
        f"{max(2 * loss.warmup_steps, config.steps // 5)}, or lower --loss.pairwise-weight (now "
        f"{loss.pairwise_weight:g}) to {loss.pairwise_weight / 2:g}."
    )


# ------------------------------------------------------------------------------------------ a pairwise loss that rises

PAIRWISE = "rising pairwise loss"
"""Kind of the warning about it."""

RISE = 1.5
"""How much higher than at its lowest the pairwise loss must be to have risen. An entry's noise is some 20 %."""
WINDOW, LONGEST_WINDOW = 12, 100
"""Entries of the journal that are compared at a time: a quarter of all, within these bounds."""


def rise(entries: Sequence[float]) -> float | None:
    """How many times higher a sequence is at its end than at its lowest, where it has risen for sure; else None.

    Medians over windows are compared, so that a few outliers count nothing, and the middle halves of the two windows
    must lie apart.
    """
    values = np.asarray(entries, dtype=np.float64)
    length = min(max(WINDOW, len(values) // 4), LONGEST_WINDOW)
    if len(values) < 2 * length:
        return None
    starts = np.arange(0, len(values) - 2 * length + 1, length // 2)
    median, upper = np.quantile(values[starts[:, None] + np.arange(length)], (0.5, 0.75), axis=1)
    lowest = median.argmin()
    lower_now, median_now = np.quantile(values[-length:], (0.25, 0.5))
    if median_now <= RISE * median[lowest] or lower_now <= upper[lowest]:
        return None
    return float(median_now / max(median[lowest], 1e-9))


def rising_pairwise(entries: Sequence[float], step: int, config: TrainConfig) -> dict[str, str]:
    """The warning about the pairwise loss, by its kind.

    Args:
        entries: means of the term since the end of the warm-up, which raises it by design.
        step: optimiser steps done.
        config: of the run.
    """
    times = rise(entries)
    if times is None:
        return {}
    rate, threshold = config.learning_rate, config.loss.color_threshold
    text = (
        f"At step {step:,} the pairwise loss is {times:.1f} times what it was at its lowest: more and more masks end "
        f"within an even colour. Lower --learning-rate (now {rate:g}) to {rate / 2:g}; where that does not help, raise "
        f"--loss.color-threshold (now {threshold:g}) to {(1 + threshold) / 2:.2g}."
    )
    return {PAIRWISE: text}
