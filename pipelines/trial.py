"""A stage's work tried on a few images in one process: reading, decoding, the network. Starts nothing of Ray's."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from boxinst.condinst import CondInst
from boxinst.criterion import Criterion
from pipelines import checkpoint, inference
from pipelines.augmentation import augment_table, batch_from_table
from pipelines.config import Resolution, TrainConfig
from pipelines.feed import EPOCH, STREAM_SCHEMA, ShardIndex
from pipelines.learner import Learner, take_step
from pipelines.optimization import make_autocast, make_average, make_optimizer, make_schedule
from pipelines.samples import sample_from_row
from pipelines.segmenter import Segmenter
from pipelines.validation import Validation

MOST_GROUPS = 4
"""Row groups that are read for a sample, spread evenly over the shards."""

MOST_STEPS = 20
"""Batches that are timed; more tell little more."""


@dataclass(frozen=True)
class Reading:
    """What reading a sample has cost."""

    table: pa.Table
    """The sample: rows of the shards."""
    seconds: float
    """Per row that was read."""
    opening: float
    """Requests to open a file and read its directory, which is once asking for its size and the reads after that."""
    group: float
    """Requests to read a row group."""
    group_bytes: float
    """Of a row group."""


def read(index: ShardIndex, count: int, columns: Sequence[str]) -> Reading:
    """Read about ``count`` rows, spread over the shards, and count the requests that a store would get.

    Args:
        index: of the shards.
        count: of rows.
        columns: that the stage reads.
    """
    chosen = np.unique(np.linspace(0, len(index.groups) - 1, min(MOST_GROUPS, len(index.groups))).astype(int))
    tables, opening, reads, size, rows, seconds = [], 0, 0, 0, 0, 0.0
    for k in chosen:
        path, number = index.groups[k]
        began = time.monotonic()
        with index.fs.open_input_file(path) as plain:
            counted = _Counted(plain)
            file = pq.ParquetFile(pa.PythonFile(counted, mode="r"))
            opening += 1 + counted.reads
            before = counted.reads, counted.bytes
            table = file.read_row_group(number, columns=list(columns))
            reads += counted.reads - before[0]
            size += counted.bytes - before[1]
        seconds += time.monotonic() - began
        rows += len(table)
        share = min(len(table), -(-count // len(chosen)))
        tables.append(table.take(np.linspace(0, len(table) - 1, share).astype(int)))
    n = len(chosen)
    return Reading(pa.concat_tables(tables), seconds / max(rows, 1), opening / n, reads / n, size / n)


class _Counted:
    """A file that counts what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.reads, self.bytes = file, 0, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.reads, self.bytes = self.reads + 1, self.bytes + len(data)
        return data

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:  # whoever opened it closes it
        pass

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


def segmenting(
    table: pa.Table,
    load: Callable[[], CondInst],
    resolution: Resolution,
    exif: Literal["stored", "applied"],
    *,
    batch_size: int,
    seconds: float,
) -> dict[str, float]:
    """Fields of ``forecast.Trial`` for a worker of ``boxinst segment``, and ``ready``: when it could begin."""
    worker = Segmenter(load, resolution, exif)
    ready = time.time()
    began = time.monotonic()
    for row in table.to_pylist():
        sample_from_row(row, exif=exif, with_masks=False)
    decode = (time.monotonic() - began) / len(table)
    batches = [table.slice(k, batch_size) for k in range(0, len(table), batch_size)]
    results = [worker(batches[-1])]  # the first one is slow, and not timed
    took, images = _timed(lambda k: results.append(worker(batches[k % len(batches)])), batches, seconds)
    masks = pa.concat_tables(results[:1] + results[1 : len(batches)])
    return {
        "ready": ready,
        "decode_seconds": decode,
        "network_seconds": max(took / images - decode, 0.0),
        "output_bytes": _stored(masks) / max(sum(map(len, masks["status"].to_pylist())), 1),
        **_memory(),
    }


def training(
    table: pa.Table,
    config: TrainConfig,
    init: Mapping[str, bytes] | None,
    exif: Literal["stored", "applied"],
    val: ShardIndex | None,
    *,
    workers_here: int,
    seconds: float,
) -> dict[str, float]:
    """Fields of ``forecast.Trial`` for a worker of ``boxinst train``, and ``ready`` and ``threads``.

    Args:
        table: rows of the shards.
        config: complete.
        init: the packed model to start from.
        exif: of the shards.
        val: validation shards, of which a few images are scored.
        workers_here: workers that share the machine.
        seconds: to spend on steps, about.
    """
    threads = config.cpus_per_worker or max(1, len(os.sched_getaffinity(0)) // workers_here)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if config.gpu else "cpu")
    model = inference.unpack(lambda: init) if init is not None else CondInst(config.model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = model.to(device)
    optimizer = make_optimizer(model.train(), config)
    learner = Learner(model, make_average(model, config.ema_decay), optimizer, make_schedule(optimizer, config))
    criterion, autocast = Criterion(config.model, config.loss), make_autocast(config, device)
    ready = time.time()

    began = time.monotonic()
    stream = table.append_column(EPOCH, pa.array([0] * len(table))).cast(STREAM_SCHEMA)
    samples = augment_table(
        stream,
        config=config.augment,
        seed=config.seed,
        exif=exif,
        with_masks=config.mask_labels == "use",
        bottom_pixels=config.loss.bottom_pixels,
    )
    decode = (time.monotonic() - began) / len(table)

    share = config.batch_size // config.workers
    enough = pa.concat_tables([samples] * -(-share // len(samples)))
    batches = [batch_from_table(enough.slice(k, share)) for k in range(0, len(enough) - share + 1, share)]

    def step(k: int) -> None:
        take_step(learner, criterion, batches[k % len(batches)].to(device), config, autocast)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(0)  # the first one is slow, and not timed
    took, images = _timed(step, [range(share)] * len(batches), seconds)
    return {
        "ready": ready,
        "threads": threads,
        "decode_seconds": decode,
        "network_seconds": took / images,
        "validation_seconds": _validating(learner, config, val) if val is not None else 0.0,
        "output_bytes": _checkpoint_bytes(learner),
        **_memory(),
    }


def _timed(do: Callable[[int], object], batches: Sequence[Any], seconds: float) -> tuple[float, int]:
    """Seconds and images of doing batch after batch, at least two."""
    images, began = 0, time.monotonic()
    for k in range(MOST_STEPS):
        if k >= 2 and time.monotonic() - began >= seconds:
            break
        do(k)
        images += len(batches[k % len(batches)])
    return time.monotonic() - began, images


def _validating(learner: Learner, config: TrainConfig, val: ShardIndex) -> float:
    """Seconds per image."""
    sides = {"short_side": max(config.augment.short_sides, default=0), "max_side": config.augment.max_side}
    validation = Validation.open(val, max_images=4, rank=0, ranks=1, **sides)
    began = time.monotonic()
    validation.score(learner.average.module)  # type: ignore[arg-type]
    return (time.monotonic() - began) / len(validation.rows)


def _checkpoint_bytes(learner: Learner) -> int:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(folder, {"learner": learner.state()})
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def _stored(table: pa.Table) -> int:
    """Bytes of the rows in a Parquet file, without its directory."""

    def size(rows: pa.Table) -> int:
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", use_dictionary=False)
        return len(sink.getvalue())

    return size(table) - size(table.slice(0, 0))


def _memory() -> dict[str, float]:
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "gpu_bytes": on_gpu}
