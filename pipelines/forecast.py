"""What a command is expected to take, kept until it has run, then set beside what it took. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from boxinst.errors import InputError
from pipelines import settings


@dataclass(frozen=True)
class PlanConfig:
    """How much to try out, and what a worker costs."""

    images: int = 16
    """Images of the sample. More where images differ much in size or number of boxes."""
    seconds: float = 30
    """Time for trying the network, about; at least two batches are tried, whatever they take."""
    price: float = 0
    """Of one worker for an hour, in any currency; 0 plans no money."""

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("seconds", 0), ("price", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"--{name}", getattr(self, name), f"Give {least} or more.")


@dataclass(frozen=True)
class Trial:
    """What was measured on a sample in one worker. Seconds are per image, of one worker or one process of data."""

    read_seconds: float
    """Reading from the store, at the pace of one reader."""
    decode_seconds: float
    """Decoding, and in training augmenting, on one core."""
    network_seconds: float
    """The network with all that belongs to it: a training step, or masks and their run lengths."""
    memory_bytes: int
    """Most that the worker's process held, libraries included."""
    gpu_bytes: int
    """Most that it held on its GPU."""
    start_seconds: float
    """Until the worker could begin: Ray, libraries, network."""
    validation_seconds: float = 0
    """Validating one image."""
    output_bytes: float = 0
    """Segment: of one mask row. Train: of one checkpoint."""


@dataclass(frozen=True)
class Work:
    """All that the command is asked to do, known without trying it."""

    images: int
    """To handle, each as often as it comes."""
    boxes: int
    """Of these images."""
    workers: int
    threads: int
    """CPU threads of a worker's network."""
    data_processes: int
    """Processes that read (segment) or read, decode and augment (train) beside the workers."""
    decodes_in_worker: bool
    """Whether decoding is the worker's own work."""
    shares_cores: bool
    """Whether data processes and network run on the same cores."""
    requests: int
    """To the store."""
    bytes: int
    """From the store."""
    validation_images: int = 0
    """To validate, each as often as it comes."""
    outputs: int = 0
    """Mask rows, or checkpoints kept at a time."""


@dataclass(frozen=True)
class Forecast:
    """The expectation: pure arithmetic on a trial and the work."""

    command: str
    work: Work
    trial: Trial
    price: float
    """Of one worker for an hour."""

    @property
    def supply(self) -> float:
        """Images per second that the data processes can hand to one worker."""
        trial, work = self.trial, self.work
        each = trial.read_seconds + (0 if work.decodes_in_worker else trial.decode_seconds)
        return work.data_processes / work.workers / max(each, 1e-9)

    @property
    def demand(self) -> float:
        """Images per second that one worker can take."""
        trial, work = self.trial, self.work
        each = trial.network_seconds
        if work.decodes_in_worker and trial.gpu_bytes:  # another thread decodes while the GPU is at work
            each = max(each, trial.decode_seconds)
        elif work.decodes_in_worker:
            each += trial.decode_seconds
        elif work.shares_cores:  # what the data processes do takes the cores from the network meanwhile
            each += trial.decode_seconds / work.threads
        return 1 / max(each, 1e-9)

    @property
    def rate(self) -> float:
        """Images per second of one worker."""
        return min(self.supply, self.demand)

    @property
    def data_wait(self) -> float:
        """Share of its time that a worker waits for data."""
        return max(0.0, 1 - self.supply / self.demand)

    @property
    def bottleneck(self) -> str:
        """What a run would have to be given more of to be faster."""
        trial = self.trial
        if self.supply < self.demand:
            store = self.work.decodes_in_worker or trial.read_seconds > trial.decode_seconds
            return "store" if store else "decode"
        own_decoding = trial.decode_seconds / (1 if self.work.decodes_in_worker else self.work.threads)
        if (self.work.decodes_in_worker or self.work.shares_cores) and own_decoding > trial.network_seconds:
            return "decode"
        return "GPU" if trial.gpu_bytes else "CPU (the network)"

    @property
    def seconds(self) -> float:
        """Of the work and its validations, without the start."""
        validation = self.work.validation_images * self.trial.validation_seconds / self.work.workers
        return self.work.images / (self.rate * self.work.workers) + validation

    @property
    def hours(self) -> float:
        """See ``seconds``."""
        return self.seconds / 3600

    @property
    def money(self) -> float:
        """Of all workers, from the start on."""
        return self.price * self.work.workers * (self.seconds + self.trial.start_seconds) / 3600

    @property
    def money_per_million_boxes(self) -> float:
        """By the boxes of the images handled, each as often as it comes."""
        return self.money / max(self.work.boxes, 1) * 1e6

    @property
    def output_bytes(self) -> float:
        """Storage that the outputs take."""
        return self.work.outputs * self.trial.output_bytes

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) for a reader."""
        work, trial = self.work, self.trial
        stored = "masks" if self.command == "segment" else "checkpoints"
        each = "a mask row" if self.command == "segment" else "each"
        storage = f"{size(self.output_bytes)} ({work.outputs:,} × {size(trial.output_bytes)} {each})"
        parts = f"read {_ms(trial.read_seconds)}, decode {_ms(trial.decode_seconds)}, "
        rows = [
            ("images", f"{work.images:,} with {work.boxes:,} boxes"),
            ("per image", f"{parts}network {_ms(trial.network_seconds)}"),
            ("images/s per worker", f"{self.rate:.2f}"),
            ("workers", f"{work.workers}"),
            ("hours", f"{self.hours:.2f}, and {trial.start_seconds:.0f} s to start"),
            ("bottleneck", self.bottleneck),
            ("store requests", f"{work.requests:,}, {work.requests / self.seconds:.2f}/s"),
            ("store bytes", f"{size(work.bytes)}, {size(work.bytes / self.seconds)}/s"),
            ("memory per worker", size(trial.memory_bytes)),
            (f"storage of {stored}", storage),
        ]
        if trial.gpu_bytes:
            rows.insert(-1, ("GPU memory per worker", size(trial.gpu_bytes)))
        if self.price:
            per_million = f"{self.money_per_million_boxes:,.2f} per million boxes"
            rows.append(("money", f"{self.money:,.2f}, {per_million}"))
        return rows

    def keep(self, config: Any) -> Path:
        """Write it where the command with this config finds it at its end."""
        path = _place(self.command, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2))
        return path


@dataclass(frozen=True)
class Outcome:
    """What a run that did all of the work came to."""

    seconds: float
    """All of the command, start included."""
    output_bytes: int
    """Of the mask rows, or of the checkpoints kept."""
    used: Mapping[str, float] = field(default_factory=dict)
    """By the workers; see ``observe.used``."""


def find(command: str, config: Any) -> Forecast | None:
    """The forecast of the command with exactly this config, if one was made in this home folder."""
    path = _place(command, config)
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    return Forecast(command, Work(**kept["work"]), Trial(**kept["trial"]), kept["price"])


WAITING = 0.1
"""Share of its time that a training worker waits for data from which on that is its bottleneck."""


def compare(planned: Forecast, outcome: Outcome) -> str:
    """A table: what was planned, what came of it, and the ratio of the two. Only what a run measures is in it."""
    seconds = planned.seconds + planned.trial.start_seconds
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("hours", seconds / 3600, outcome.seconds / 3600, "{:.3f}".format),
        ("images/s", planned.work.images / seconds, planned.work.images / outcome.seconds, "{:.2f}".format),
        ("storage", planned.output_bytes, outcome.output_bytes, size),
    ]
    for name, key, plan in (
        ("memory", "memory", planned.trial.memory_bytes),
        ("GPU memory", "gpu_memory", planned.trial.gpu_bytes),
    ):
        if key in outcome.used:
            rows.append((name, plan, outcome.used[key] * 1e9, size))
    if "data_wait" in outcome.used:
        rows.append(("data wait", planned.data_wait, outcome.used["data_wait"], "{:.0%}".format))
    for name, key, plan, show in (
        ("store requests", "store_requests", planned.work.requests, "{:,.0f}".format),
        ("store bytes", "store_bytes", planned.work.bytes, size),
    ):
        if key in outcome.used:
            rows.append((name, plan, outcome.used[key], show))
    if planned.price:
        ratio = outcome.seconds / seconds
        for name, money in (("money", planned.money), ("per million boxes", planned.money_per_million_boxes)):
            rows.append((name, money, money * ratio, "{:,.2f}".format))
    lines = [("start included", "planned", "came to", "ratio")]
    lines += [(name, show(plan), show(real), _ratio(real, plan)) for name, plan, real, show in rows]
    if "data_wait" in outcome.used:
        lines.append(("bottleneck", planned.bottleneck, _bottleneck(outcome.used), "-"))
    return "\n".join(f"  {name:19}{plan:>18}{real:>18}{ratio:>8}" for name, plan, real, ratio in lines)


def _bottleneck(used: Mapping[str, float]) -> str:
    """Of a training that has run, as far as its wait for data tells: not which part of the data's way took the time."""
    if used["data_wait"] >= WAITING:
        return "store or decode"
    return "GPU" if "gpu_memory" in used else "CPU"


def _ratio(real: float, planned: float) -> str:
    return f"{real / planned:.2f}" if planned else "-"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    return "\n".join(f"  {name:24}{value}" for name, value in rows)


def size(count: float) -> str:
    """Bytes in words: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _place(command: str, config: Any) -> Path:
    words = json.dumps([command, asdict(config)], sort_keys=True)
    return settings.home() / "plans" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.json"
