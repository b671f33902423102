"""What is written down of a training, and looked at on the way: means of the losses, broken steps, warnings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines import guards, observe
from pipelines.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.tracking import Run


class Journal:
    """Entries are means since the last one, over all ranks, and written by rank 0.

    A step's figures stay on the device until somebody looks at them, so that no step waits for them.

    Args:
        config: of the run.
        run: where entries go; None on all ranks but the first.
        control: handle of the driver's Control actor.
        group: the ranks' CPU group; None where there is one rank.
    """

    def __init__(self, config: TrainConfig, run: Run | None, control: Any, group: dist.ProcessGroup | None) -> None:
        self.config, self.run, self.control, self.group = config, run, control, group
        self.ranks = 1 if group is None else dist.get_world_size()
        self.pairwise: list[float] = []
        """The entries' pairwise term since the end of its warm-up."""
        self.warnings: dict[str, str] = {}
        """Those that hold at present, by kind."""
        self._waited_in_all = self._trained_in_all = 0.0
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._figures: list[Tensor] = []  # of each step
        self._batches: list[tuple[int, Sequence[int]]] = []  # number and image ids of each step
        self._waited, self._paused, self._since = 0.0, 0.0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"pairwise": self.pairwise, "warnings": self.warnings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        self.pairwise, self.warnings = list(state["pairwise"]), dict(state["warnings"])

    def waiting(self) -> AbstractContextManager[None]:
        """Around the wait for data."""
        return _Stopwatch(self, "_waited")

    def pause(self) -> AbstractContextManager[None]:
        """Around what is no training; it does not count in the speed."""
        return _Stopwatch(self, "_paused")

    def add(self, step: int, terms: Mapping[str, Tensor], norm: Tensor, image_ids: Sequence[int]) -> None:
        """One step: its number from 1, its loss terms, gradient length and images."""
        self._names = [*terms, "grad_norm"]
        self._figures.append(torch.stack([*terms.values(), norm]))
        self._batches.append((step, image_ids))

    def broken_step(self) -> tuple[int, list[guards.Share]] | None:
        """The first step since the last entry whose gradient is not finite, with what each rank had in it.

        As the gradient is shared, all ranks find the same; they must look after the same steps.
        """
        values = torch.stack(self._figures).cpu()
        broken = (~values[:, -1].isfinite()).nonzero()
        if not len(broken):
            return None
        first = int(broken[0])
        step, image_ids = self._batches[first]
        terms = dict(zip(self._names, values[first].tolist(), strict=True))
        if self.group is None:
            return step, [guards.Share(0, image_ids, terms)]
        shares: list[Any] = [None] * self.ranks
        dist.all_gather_object(shares, guards.Share(dist.get_rank(), image_ids, terms), group=self.group)
        return step, shares

    def write(self, step: int, learning_rate: float) -> None:
        """Write the means and start anew."""
        means = torch.stack(self._figures).double().mean(0)
        if self.ranks > 1:
            dist.all_reduce(means)
            means /= self.ranks
        values = dict(zip(self._names, means.tolist(), strict=True))
        seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
        images = sum(len(ids) for _, ids in self._batches)
        values |= {
            "learning_rate": learning_rate,
            "images_per_second": images * self.ranks / seconds,
            "data_wait": self._waited / seconds,
            **observe.memory(),
        }
        self._waited_in_all += self._waited
        self._trained_in_all += seconds
        observe.use(self.control, data_wait=self._waited_in_all / self._trained_in_all)
        if self._batches[0][0] >= self.config.loss.warmup_steps:
            self.pairwise.append(values.get("pairwise", 0) + values.get("detect_pairwise", 0))
        self._reset()
        if self.run is not None:
            self.run.metrics({f"train/{name}": value for name, value in values.items()}, step)
            self.control.show.remote(step, values)
            self._warn((guards.PAIRWISE,), guards.rising_pairwise(self.pairwise, step, self.config))

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a validation, and warn where they show a collapse."""
        if self.run is not None:
            self.run.metrics({f"val/{name}": value for name, value in metrics.items()}, step)
            self._warn(guards.MASKS, guards.collapsed_masks(metrics, step, self.config))

    def _warn(self, kinds: Sequence[str], found: Mapping[str, str]) -> None:
        """Let ``found`` take the place of the warnings of these kinds."""
        now = {kind: text for kind, text in self.warnings.items() if kind not in kinds} | dict(found)
        if now != self.warnings and self.run is not None:
            self.warnings = now
            self.run.tag({"warnings": "\n".join(now.values())})
            self.control.warn.remote(now)


class _Stopwatch(AbstractContextManager[None]):
    """Adds the time spent inside to a field of the journal."""

    def __init__(self, journal: Journal, name: str) -> None:
        self.journal, self.name = journal, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = getattr(self.journal, self.name) + time.monotonic() - self.start
        setattr(self.journal, self.name, spent)
