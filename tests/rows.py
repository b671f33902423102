"""Rows of shards and of masks, as tests compare them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage


def rows_of(shards: str) -> pa.Table:
    manifest = storage.read_manifest(shards, "shards")
    return pa.concat_tables(pq.read_table(path) for path in storage.shard_files(shards, manifest))


def masks_of(out: str) -> list[dict[str, Any]]:
    manifest = storage.read_manifest(out, "masks")
    return [row for table in storage.row_groups(out, manifest) for row in table.to_pylist()]
