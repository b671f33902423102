"""What a run shows while it works: figures for Prometheus, counted in Ray's workers, and lines of progress in a log.

Ray serves the figures on every node and adds ``ray_`` to their names; see docs/operations.md.
"""

from __future__ import annotations

import functools
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from boxinst.structures import Batch

COUNTED = {
    "images": "Images sharded, trained on or segmented.",
    "boxes": "Boxes of these images.",
    "rejects": "Rows of rejects written by shard; boxes that segment could not give a mask.",
    "mask_rows": "Mask rows written.",
    "data_wait_seconds": "Time that training workers waited for data.",
}
"""Counters, each with the tag ``command``."""

HELD = {
    "memory": "Most memory that a worker has held, in GB.",
    "gpu_memory": "Most GPU memory that a worker has held, in GB.",
}
"""Gauges, each with the tag ``command`` and ``_gb`` after its name."""

STEP_BUCKETS = [0.01 * 2**k for k in range(14)]
"""Upper bounds of the histogram of step times in seconds: 10 ms to 82 s."""

PROGRESS_SECONDS = 15
"""Between two lines of progress."""


def count(command: str, **amounts: float) -> None:
    """Add to the counters named; in a worker of ``command``. Costs some microseconds."""
    for name, amount in amounts.items():
        if amount > 0:
            _counter(name).inc(amount, {"command": command})
    for name, gigabytes in memory().items():
        _gauge(name).set(gigabytes, {"command": command})


def steps(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of a training worker, counted, with the time that each step takes and waits for its batch.

    A step's time ends when the next batch is asked for: a validation or checkpoint after it is part of it.
    """
    asked = time.monotonic()
    for batch in batches:
        arrived = time.monotonic()
        boxes = sum(len(targets) for targets in batch.targets)
        count("train", images=len(batch.sizes), boxes=boxes, data_wait_seconds=arrived - asked)
        yield batch
        asked = time.monotonic()
        _step_seconds().observe(asked - arrived)


def memory() -> dict[str, float]:
    """``{"memory": GB, "gpu_memory": GB}``, the most that this process has held; the latter where it uses a GPU."""
    held = {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    torch = sys.modules.get("torch")  # a process that has not loaded it has no use for a GPU
    if torch is not None and torch.cuda.is_initialized():
        held["gpu_memory"] = torch.cuda.max_memory_allocated() / 1e9
    return held


def use(control: Any, **shares: float) -> None:
    """Tell the run's Control actor what this worker has used: its memory, and what is given. Waits for nothing."""
    control.use.remote(f"{socket.gethostname()} {os.getpid()}", memory() | shares)


def used(workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all workers, by the same names: most memory in GB, sum of what a store was asked, mean of the rest."""
    names = {name for worker in workers for name in worker}
    figures = {name: [worker[name] for worker in workers if name in worker] for name in names}
    return {
        k: max(v) if k.endswith("memory") else sum(v) / (1 if k.startswith("store_") else len(v))
        for k, v in figures.items()
    }


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"boxinst_{name}", COUNTED[name], ("command",))


@functools.cache
def _gauge(name: str) -> Gauge:
    return Gauge(f"boxinst_{name}_gb", HELD[name], ("command",))


@functools.cache
def _step_seconds() -> Histogram:
    return Histogram("boxinst_step_seconds", "Time of a training step, without the wait for data.", STEP_BUCKETS)


@contextmanager
def progress(command: str, done: Callable[[], int], total: int, noun: str = "images") -> Iterator[None]:
    """Within, print now and then how far ``command`` has come, where no progress bar is shown.

    Args:
        command: for the line.
        done: how many are done; asked rarely, as it may have to ask a store.
        total: how many there are.
        noun: what is counted.
    """
    if sys.stderr.isatty():  # Ray shows bars of its own there
        yield
        return
    before, began, over = done(), time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(PROGRESS_SECONDS):
            try:
                now = min(done(), total)
            except Exception:  # a store that does not answer for once is no reason to end the run
                continue
            speed = (now - before) / (time.monotonic() - began)
            print(f"{command}: {now:,} of {total:,} {noun}, {speed:.1f} {noun}/s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
