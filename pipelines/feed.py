"""The endless stream of training samples: which image stands where in it, and how it is read from the shards.

The stream is the shuffled corpus of epoch 0, then of epoch 1, and so on. A step of the training takes the next
``batch_size`` samples of it. What stands at a position, and how it is augmented, is a function of (seed, epoch, image)
alone, so any step can be repeated, on any number of machines, and a resumed run goes on in the middle of an epoch.

Nothing here imports torch: several processes of Ray plan and pass on the stream without touching an image, and each
would wait seconds for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import storage
from pipelines.s3 import patiently
from pipelines.schema import SHARD_SCHEMA, Manifest

READ_ROWS = 512
"""Rows read and shuffled together, at most: few enough to hold in memory, many enough to mix the corpus."""
READ_BYTES = 128 * 2**20
"""Bytes read together, about."""

REQUESTS = 3
"""To a store, for a row group: the size of its file, the directory at the end of that, and the columns together."""

EPOCH = pa.field("epoch", pa.int64())
STREAM_SCHEMA = SHARD_SCHEMA.append(EPOCH)
"""A row of the stream: of the shards, with the epoch it is seen in."""


@dataclass
class Tally:
    """What has been read of a store, counted where it is asked for: again, where a request was made again."""

    requests: int = 0
    bytes: int = 0
    """Of the columns."""


@dataclass(frozen=True)
class ShardIndex:
    """Where each row of a shard set lies, so that any rows can be read: files in row groups."""

    fs: pafs.FileSystem
    manifest: Manifest
    groups: tuple[tuple[str, int], ...]
    """(path, number within the file) of every row group, in the order of the corpus."""
    starts: NDArray[np.int64]
    """Row at which each group starts, and at the end the number of rows."""

    @classmethod
    def open(cls, uri: str) -> ShardIndex:
        """Read the manifest of the shards at ``uri`` and the directory at the end of each file.

        Raises:
            InputError: no shards, unfinished, damaged, or of a newer version.
        """
        manifest = storage.read_manifest(uri, "shards")
        fs = storage.filesystem(uri)

        def rows_per_group(path: str) -> list[int]:
            about = patiently(lambda: pq.read_metadata(path, filesystem=fs))
            return [about.row_group(k).num_rows for k in range(about.num_row_groups)]

        paths = storage.shard_files(uri, manifest)
        with storage.explained(uri), ThreadPoolExecutor(16) as pool:
            rows = list(pool.map(rows_per_group, paths))
        groups = tuple((path, k) for path, of_file in zip(paths, rows, strict=True) for k in range(len(of_file)))
        return cls(fs, manifest, groups, np.cumsum([0, *(n for of_file in rows for n in of_file)]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def rows_at_once(self) -> int:
        """Rows to read and shuffle together: ``READ_ROWS``, or fewer where images are large."""
        bytes_per_row = sum(f.bytes for f in self.manifest.files) / max(len(self), 1)
        return int(np.clip(READ_BYTES / max(bytes_per_row, 1), 1, READ_ROWS))

    def spread(self, limit: int) -> NDArray[np.int64]:
        """At most ``limit`` rows (0 for all), evenly over the corpus, in order: a sample that is always the same."""
        count = min(len(self), limit) if limit else len(self)
        return np.linspace(0, len(self), count, endpoint=False).astype(np.int64)

    def read(self, rows: NDArray[np.int64], tally: Tally | None = None) -> pa.Table:
        """The given rows, in the order given; a row may be asked for twice. Each row group is read once.

        Args:
            rows: by their numbers in the corpus.
            tally: to which the reading is added.
        """
        if not len(rows):
            return SHARD_SCHEMA.empty_table()
        of_row = np.searchsorted(self.starts, rows, side="right") - 1
        tables, places = [], []
        for group in np.unique(of_row):
            path, number = self.groups[group]
            mine = np.flatnonzero(of_row == group)
            table = patiently(functools.partial(_row_group, self.fs, path, number, tally or Tally()))
            tables.append(table.take(rows[mine] - self.starts[group]))
            places.append(mine)
        return pa.concat_tables(tables).take(np.argsort(np.concatenate(places)))


def _row_group(fs: pafs.FileSystem, path: str, number: int, tally: Tally) -> pa.Table:
    tally.requests += REQUESTS
    file = storage.open_parquet(fs, path)
    group = file.metadata.row_group(number)
    tally.bytes += sum(group.column(k).total_compressed_size for k in range(group.num_columns))
    return file.read_row_group(number, columns=SHARD_SCHEMA.names)


def read_lot(lot: pa.Table, *, index: ShardIndex) -> pa.Table:
    """The rows whose numbers are in the column "row". A task of Ray Data."""
    return index.read(lot["row"].to_numpy())


def epoch_order(starts: NDArray[np.int64], rows_at_once: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Every row once, in the order of this epoch.

    Row groups are shuffled, then the rows within each stretch of ``rows_at_once``, so that such a stretch can be read
    from few row groups.
    """
    rng = np.random.default_rng([seed, epoch])
    groups = rng.permutation(len(starts) - 1)
    order = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups])
    for start in range(0, len(order), rows_at_once):
        rng.shuffle(order[start : start + rows_at_once])
    return order


@dataclass(frozen=True)
class Stream:
    """The stream of one training run; see the module."""

    index: ShardIndex
    seed: int

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(epoch, rows) for the positions from ``start`` up to ``stop``."""
        size = len(self.index)
        for epoch in range(start // size, -(-stop // size)):
            order = epoch_order(self.index.starts, self.index.rows_at_once, self.seed, epoch)
            yield epoch, order[max(start - epoch * size, 0) : stop - epoch * size]

    def read(self, start: int, stop: int, tally: Tally | None = None) -> pa.Table:
        """The samples at these positions, as ``STREAM_SCHEMA``; none when ``stop`` is not beyond ``start``.

        The reading is added to ``tally``.
        """
        tables = [STREAM_SCHEMA.empty_table()]
        for epoch, rows in self.rows(start, stop):
            table = self.index.read(rows, tally)
            tables.append(table.append_column(EPOCH, pa.array(np.full(len(table), epoch))).cast(STREAM_SCHEMA))
        return pa.concat_tables(tables)


@dataclass(frozen=True)
class Augment:
    """The task that decodes and augments rows of the stream: ``augmentation.augment_table`` with its arguments."""

    config: dict[str, Any]
    """Fields of an AugmentConfig."""
    options: dict[str, Any]
    """The other arguments."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """``STREAM_SCHEMA`` → ``augmentation.SAMPLE_SCHEMA``."""
        # Here, because only the processes that run it need torch.
        from boxinst.config import AugmentConfig  # noqa: PLC0415
        from pipelines.augmentation import augment_table  # noqa: PLC0415

        return augment_table(table, config=AugmentConfig(**self.config), **self.options)
