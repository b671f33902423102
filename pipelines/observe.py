"""What a run shows while it works: figures for Prometheus, counted in Ray's workers, and lines of progress in a log.

Ray serves the figures on every node and adds ``ray_`` to their names; see docs/operations.md.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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

STEP_BUCKETS = [0.01 * 2**k for k in range(14)]
"""Upper bounds of the histogram of step times in seconds: 10 ms to 82 s."""

PROGRESS_SECONDS = 15
"""Between two lines of progress."""


def count(command: str, **amounts: float) -> None:
    """Add to the counters named; in a worker of ``command``. Costs some microseconds."""
    for name, amount in amounts.items():
        if amount > 0:
            _counter(name).inc(amount, {"command": command})
    if memory := gpu_memory():
        _gpu_gauge().set(memory["gpu_memory"], {"command": command})


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


def gpu_memory() -> dict[str, float]:
    """``{"gpu_memory": GB}``, the most that this process has held on its GPU; empty where it uses none."""
    torch = sys.modules.get("torch")  # a process that has not loaded it has no use for a GPU
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"gpu_memory": torch.cuda.max_memory_allocated() / 1e9}


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"boxinst_{name}", COUNTED[name], ("command",))


@functools.cache
def _gpu_gauge() -> Gauge:
    return Gauge("boxinst_gpu_memory_gb", "Most GPU memory that a worker has held, in GB.", ("command",))


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
