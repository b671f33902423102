"""The rules of promotion: what is compared, what is recorded, where a rollback goes. No registry is touched here."""

from __future__ import annotations

import getpass
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from boxinst.errors import InputError

SANE = 1e-6
"""What a metric where more is better must reach when there is no champion: more than nothing."""


def check_name(name: str) -> None:
    """Refuse a model name that MLflow or a models:/ address cannot hold."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise InputError("name", repr(name), "A model's name has letters, digits, '_', '-' and '.' only.")


USUAL = (("mask_iou", "mask_ap"), ("box_iou",), ("box_ap",))
"""What is gated unless told otherwise: masks where the evaluation set has them, else how well masks keep to their
boxes, else the boxes found."""


@dataclass(frozen=True)
class PromoteConfig:
    """Make a registered version the champion if it is no worse than the one there is, or go back one."""

    name: str
    """The registered model."""
    candidate: str = "latest"
    """Version to promote: its number, "latest", or a whole models:/ address of this model."""
    alias: str = "champion"
    """The alias to move; `models:/NAME@champion` is then this version wherever a model is asked for."""
    tolerance: float = 0.005
    """How much worse than the champion a gated metric may be, in the metric's own units."""
    higher: tuple[str, ...] = ()
    """Gated metrics where more is better. Empty (with `lower` empty too): mask_iou and mask_ap where the evaluation
    set has masks; box_iou, or when detecting box_ap, where it has none."""
    lower: tuple[str, ...] = ()
    """Gated metrics where less is better, for example spill."""
    reason: str = ""
    """Why, for the record."""
    rollback: bool = False
    """Give the alias back to the champion before this one; can be repeated."""
    by: str = field(default_factory=getpass.getuser)
    """Who, for the record."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 <= self.tolerance < math.inf:
            raise InputError("tolerance", self.tolerance, "Give a number from 0 up.")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.alias) or re.fullmatch(r"v\d+|latest", self.alias):
            raise InputError("alias", self.alias, "An alias is a word, neither a version number nor 'latest'.")
        if both := set(self.higher) & set(self.lower):
            raise InputError("higher, lower", ", ".join(sorted(both)), "Name each metric in one of them only.")


@dataclass(frozen=True)
class Promotion:
    """One move of the alias, as the version that received it records it (a tag in JSON)."""

    action: str
    """"promote" or "rollback"."""
    version: int
    """The version that became the champion."""
    previous: int | None
    """The champion before."""
    by: str
    at: str
    """UTC, ISO 8601."""
    reason: str
    metrics: dict[str, float]
    """Of this version, on the evaluation set; empty for a rollback."""
    evaluated_on: str
    """The evaluation set, and its hash."""


def replay(moves: Sequence[Promotion]) -> list[int]:
    """The champions that a rollback can go back through, the present one last.

    A promotion puts a version on the pile, a rollback takes the pile down to the version it went back to.
    """
    pile: list[int] = []
    for move in moves:
        if move.action == "rollback":
            while pile and pile[-1] == move.previous:
                pile.pop()
            while move.version in pile and pile[-1] != move.version:
                pile.pop()
        elif move.previous is not None and pile[-1:] != [move.previous]:
            pile.append(move.previous)  # the alias was moved by hand in between
        if pile[-1:] != [move.version]:
            pile.append(move.version)
    return pile


@dataclass(frozen=True)
class Limit:
    """What a candidate must reach (``more_is_better``) or must not pass."""

    metric: str
    value: float
    more_is_better: bool


def limits(
    higher: Sequence[str],
    lower: Sequence[str],
    tolerance: float,
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
) -> list[Limit]:
    """One limit for every gated metric.

    Args:
        higher: gated metrics where more is better.
        lower: gated metrics where less is better. With both empty, the first of ``USUAL`` that were measured.
        tolerance: how much worse than the champion's a value may be.
        candidate: metrics of the candidate.
        champion: metrics of the champion on the same set; None when there is none, and any sane value will do.

    Raises:
        InputError: a gated metric was not measured, or the champion's is not a number.
    """
    gates = [(name, True) for name in higher] + [(name, False) for name in lower]
    if not gates:
        found = (tuple(name for name in group if name in candidate) for group in USUAL)
        gates = [(name, True) for name in next(filter(None, found), USUAL[0])]
    bounds = []
    for name, more in gates:
        if name not in candidate:
            raise InputError(
                "gated metric", name, f"It was not measured; gate on some of: {', '.join(sorted(candidate))}."
            )
        if champion is None:
            value = SANE if more else math.inf
        elif math.isfinite(reference := champion.get(name, math.nan)):
            value = float(reference - tolerance if more else reference + tolerance)
        else:
            raise InputError("champion's metric", f"{name} = {reference}", "Evaluate both models on the same set.")
        bounds.append(Limit(name, value, more))
    return bounds


def table(
    limits: Sequence[Limit],
    failed: Sequence[str],
    candidate: Mapping[str, float],
    champion: Mapping[str, float] | None,
    labels: tuple[str, str],
) -> str:
    """The comparison as text: one line per gated metric.

    Args:
        limits: as ``limits`` made them.
        failed: the metrics that do not keep theirs.
        candidate: metrics of the candidate.
        champion: metrics of the champion, or None.
        labels: names of the candidate and the champion, for the header.
    """
    rows = [("metric", labels[1], labels[0], "change", "limit", "verdict")]
    for limit in limits:
        value = candidate[limit.metric]
        before = f"{champion[limit.metric]:.4f}" if champion else "-"
        change = f"{value - champion[limit.metric]:+.4f}" if champion else "-"
        bound = f"{'>=' if limit.more_is_better else '<='} {limit.value:.4f}"
        rows.append((limit.metric, before, f"{value:.4f}", change, bound, "worse" if limit.metric in failed else "ok"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
