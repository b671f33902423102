"""pipelines.feed: the stream holds every image once per epoch, in an order anyone can repeat from any position."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from boxinst import rle
from boxinst.config import AugmentConfig
from pipelines import feed, storage
from pipelines.augmentation import augment_table
from pipelines.feed import Augment, ShardIndex, Stream, Tally, epoch_order
from pipelines.schema import SHARD_SCHEMA, Category, Manifest


@pytest.mark.parametrize("sizes", [[5], [3, 4, 1], [7] * 30])
@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(sizes: list[int], at_once: int) -> None:
    starts = np.cumsum([0, *sizes])
    orders = [epoch_order(starts, at_once, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(starts[-1]))
    assert np.array_equal(orders[0], epoch_order(starts, at_once, 0, 0))
    if at_once > 1 and starts[-1] > 7:
        assert not np.array_equal(orders[0], orders[1])
        assert not np.array_equal(orders[0], orders[2])


def test_a_stretch_comes_from_few_row_groups() -> None:
    starts = np.arange(0, 1001, 10)
    order = epoch_order(starts, 50, seed=3, epoch=2)
    for first in range(0, 1000, 50):
        assert len(set(order[first : first + 50] // 10)) == 5


def image_row(image_id: int) -> dict[str, Any]:
    """A noisy image with two instances, of which the first has a mask."""
    rng = np.random.default_rng(image_id)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(buffer, format="png")
    mask = torch.zeros(1, 96, 96, dtype=torch.bool)
    mask[0, 10:40, 20 : 50 + image_id] = True
    return {
        "image_id": image_id - 5,  # ids may be negative
        "file_name": f"{image_id}.png",
        "image": buffer.getvalue(),
        "width": 96,
        "height": 96,
        "annotation_ids": [10 * image_id, 10 * image_id + 1],
        "boxes": [[20, 10, 50 + image_id, 40], [60.5, 50, 90, 80.25]],
        "labels": [0, 1],
        "masks": [rle.encode(mask)[0], None],
        "crowd": [False, False],
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """13 images in 2 files of 2 row groups each."""
    out = str(tmp_path_factory.mktemp("shards") / "s")
    rows = [image_row(k) for k in range(13)]
    files = []
    for name, cuts in (("a.parquet", (0, 4, 6)), ("b.parquet", (6, 12, 13))):
        groups = [pa.Table.from_pylist(rows[i:j], schema=SHARD_SCHEMA) for i, j in pairwise(cuts)]
        files.append(storage.write_parquet(f"{out}/{name}", groups, SHARD_SCHEMA))
    manifest = Manifest("shards", [Category(1, "x"), Category(2, "y")], files, {"images": 13, "boxes": 26})
    storage.write_manifest(out, manifest)
    return ShardIndex.open(out)


def test_the_index_knows_every_row_group(index: ShardIndex) -> None:
    assert len(index) == 13
    assert index.starts.tolist() == [0, 4, 6, 12, 13]
    assert index.read(np.arange(13))["file_name"].to_pylist() == [f"{k}.png" for k in range(13)]


def test_what_is_read_is_counted_and_a_second_attempt_too(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [pq.ParquetFile(path).metadata.row_group(k) for path, k in index.groups]
    sizes = [sum(group.column(k).total_compressed_size for k in range(group.num_columns)) for group in groups]
    tally = Tally()
    index.read(np.array([12, 0, 3]), tally)
    assert (tally.requests, tally.bytes) == (2 * feed.REQUESTS, sizes[3] + sizes[0])
    Stream(index, 0).read(0, 26, tally)
    assert (tally.requests, tally.bytes) == (10 * feed.REQUESTS, sizes[3] + sizes[0] + 2 * sum(sizes))

    opened = iter([OSError("AWS Error NETWORK_CONNECTION"), None])

    def cut_off(*asked: Any) -> pq.ParquetFile:
        if error := next(opened):
            raise error
        return pq.ParquetFile(asked[1])

    monkeypatch.setattr(storage, "open_parquet", cut_off)
    again = Tally()
    index.read(np.array([0]), again)
    assert (again.requests, again.bytes) == (2 * feed.REQUESTS, sizes[0])


def test_any_rows_can_be_read_in_any_order(index: ShardIndex) -> None:
    every = index.read(np.arange(len(index)))["image_id"].to_pylist()
    wanted = [3, 0, 3, len(index) - 1]
    assert index.read(np.array(wanted))["image_id"].to_pylist() == [every[k] for k in wanted]
    assert len(index.read(np.array([], dtype=np.int64))) == 0


def test_the_stream_is_the_same_from_every_position(index: ShardIndex) -> None:
    stream, size = Stream(index, seed=5), len(index)
    whole = stream.read(0, 3 * size).select(["image_id", "epoch"]).to_pylist()
    for epoch in range(3):
        seen = Counter(row["image_id"] for row in whole if row["epoch"] == epoch)
        assert seen == Counter(index.read(np.arange(size))["image_id"].to_pylist())
    for start, stop in ((0, 1), (size - 2, size + 3), (5, 5), (size, 3 * size), (9, 8)):
        assert stream.read(start, stop).select(["image_id", "epoch"]).to_pylist() == whole[start:stop]


def test_large_images_are_read_few_at_a_time(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    assert index.rows_at_once == feed.READ_ROWS
    per_row = sum(f.bytes for f in index.manifest.files) / len(index)
    monkeypatch.setattr(feed, "READ_BYTES", int(3.5 * per_row))
    assert index.rows_at_once == 3


def test_the_task_augments_as_the_function_does(index: ShardIndex) -> None:
    table = Stream(index, 0).read(0, 2)
    config, options = AugmentConfig(crop=32), {"seed": 1, "exif": "stored", "with_masks": True, "bottom_pixels": 0}
    assert Augment(asdict(config), options)(table) == augment_table(table, config=config, **options)


def test_the_stream_does_not_import_torch() -> None:
    code = "import sys, pipelines.feed, pipelines.control; assert not {'torch', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
