"""pipelines.journal: entries are means, a broken step is found and told, warnings come and go with their reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from boxinst.config import LossConfig
from pipelines import guards
from pipelines.config import TrainConfig
from pipelines.journal import Journal

CONFIG = TrainConfig(shards="s", steps=1000, loss=LossConfig(warmup_steps=4))


class Recorder:
    """Stands for an MLflow run, and for the Control actor."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[str, float]] = {}
        self.tags: list[str] = []
        self.warned: list[dict[str, str]] = []
        self.told: list[dict[str, float]] = []
        self.show, self.warn = Remote(lambda *_: None), Remote(self.warned.append)
        self.use = Remote(lambda _, used: self.told.append(used))

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.entries[step] = values

    def tag(self, tags: dict[str, str]) -> None:
        self.tags.append(tags["warnings"])


class Remote:
    """A method of an actor."""

    def __init__(self, method: Any) -> None:
        self.remote = method


def journal(config: TrainConfig = CONFIG) -> tuple[Journal, Recorder]:
    recorder = Recorder()
    return Journal(config, recorder, recorder, None), recorder  # type: ignore[arg-type]


def step(book: Journal, number: int, loss: float, norm: float = 3.0, **terms: float) -> None:
    figures = {name: torch.tensor(value) for name, value in {"loss": loss, **terms}.items()}
    book.add(number, figures, torch.tensor(norm), [10 * number, 10 * number + 1])


def test_entries_are_means_since_the_last_one() -> None:
    book, recorder = journal()
    for number, loss in enumerate((1.0, 2.0, 6.0), 1):
        with book.waiting():
            pass
        step(book, number, loss)
        if number > 1:
            book.write(number, 0.5)
    assert recorder.entries[2]["train/loss"] == 1.5
    assert recorder.entries[3]["train/loss"] == 6
    assert recorder.entries[3]["train/grad_norm"] == 3
    assert recorder.entries[3]["train/learning_rate"] == 0.5
    assert recorder.entries[3]["train/images_per_second"] > 0
    assert 0 <= recorder.entries[2]["train/data_wait"] < 1
    waits = [entry["train/data_wait"] for entry in recorder.entries.values()]
    assert min(waits) <= recorder.told[-1]["data_wait"] <= max(waits), "of the whole run"
    assert recorder.told[-1]["memory"] == pytest.approx(recorder.entries[3]["train/memory"], rel=0.1)


def test_the_first_broken_step_is_found_with_its_images() -> None:
    book, _ = journal()
    step(book, 1, 1.0, cls=2.0, box=1.0)
    assert book.broken_step() is None
    step(book, 2, 1.0, cls=2.0, box=1.0)
    step(book, 3, float("nan"), norm=float("nan"), cls=2.0, box=float("inf"))
    step(book, 4, float("nan"), norm=float("nan"), cls=2.0, box=1.0)
    found = book.broken_step()
    assert found is not None
    number, (share,) = found
    assert (number, list(share.image_ids), set(share.broken)) == (3, [30, 31], {"loss", "box"})


def test_the_pairwise_term_counts_from_the_end_of_its_warm_up() -> None:
    book, recorder = journal()
    for number in range(1, 61):
        step(book, number, 1.0, pairwise=0.1 if number < 31 else 0.3, detect_pairwise=0.1)
        if number % 2 == 0:
            book.write(number, 0.5)
    assert len(book.pairwise) == 28  # the first entry that is wholly at full weight is of steps 5 and 6
    assert book.pairwise[0] == torch.tensor([0.2]).item()
    assert list(book.warnings) == [guards.PAIRWISE]
    assert recorder.tags[-1] == book.warnings[guards.PAIRWISE]
    again, _ = journal()
    again.restore(book.state())
    assert (again.pairwise, again.warnings) == (book.pairwise, book.warnings)


def test_a_warning_holds_as_long_as_its_reason() -> None:
    book, recorder = journal()
    book.warnings = {guards.PAIRWISE: "rises"}
    book.validated(100, {"fill_over_95": 0.9, "fill_under_05": 0.0})
    assert list(book.warnings) == [guards.PAIRWISE, guards.FULL]
    assert recorder.warned == [book.warnings]
    assert recorder.tags == ["rises\n" + book.warnings[guards.FULL]]
    book.validated(200, {"fill_over_95": 0.1, "fill_under_05": 0.0})
    book.validated(300, {"fill_over_95": 0.1, "fill_under_05": 0.0})
    assert book.warnings == {guards.PAIRWISE: "rises"}
    assert recorder.tags[1:] == ["rises"]
    assert recorder.entries[300] == {"val/fill_over_95": 0.1, "val/fill_under_05": 0.0}


def test_other_ranks_write_nothing() -> None:
    recorder = Recorder()
    book = Journal(replace(CONFIG, log_every=1), None, recorder, None)
    step(book, 10, 1.0, pairwise=0.1)
    book.write(10, 0.5)
    book.validated(10, {"fill_over_95": 0.9})
    assert (book.warnings, len(book.pairwise)) == ({}, 1)
    assert (recorder.entries, recorder.tags, recorder.warned) == ({}, [], [])
    assert len(recorder.told) == 1, "what it has used counts too"
