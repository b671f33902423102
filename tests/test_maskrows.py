"""Mask rows from the parts of the workers: in the order of the shards, each once, none missing; and as COCO results."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rows import masks_of

from boxinst import rle
from pipelines import maskrows, storage
from pipelines.maskrows import BoxMask
from pipelines.schema import MASK_SCHEMA, Category, Manifest


def part(image_id: int, masks: list[BoxMask]) -> dict[str, Any]:
    ids = [image_id * 10 + k for k in range(len(masks))]
    return maskrows.part_row(
        {
            "image_id": image_id,
            "file_name": f"{image_id}.png",
            "width": 4,
            "height": 3,
            "annotation_ids": ids,
            "labels": [k % 2 for k in range(len(masks))],
            "boxes": [[0.0, 0.0, 1.0 + k, 2.0] for k in range(len(masks))],
        },
        masks,
    )


MASK = rle.encode(torch.ones(1, 3, 4, dtype=torch.bool))[0]
OK = BoxMask(MASK, 0.5, 0.6, 0.1, 0.9, "ok")
EMPTY = BoxMask(None, 0.1, 0.0, 0.0, 0.0, "empty")
ERROR = BoxMask(None, None, None, None, None, "error: no luck")


@pytest.fixture
def unfinished(tmp_path: Path) -> tuple[str, str, Manifest]:
    """Shards of images 5, 3, 9, 4 and an output whose parts hold them in another order, one of them twice."""
    shards, out = str(tmp_path / "shards"), str(tmp_path / "out")
    table = pa.table({"image_id": pa.array([5, 3, 9, 4], pa.int64())})
    file = storage.write_parquet(f"{shards}/s.parquet", [table], table.schema)
    counts = {"images": 4, "boxes": 6}
    manifest = Manifest("shards", [Category(11, "a"), Category(7, "b")], [file], counts, {})

    def write(name: str, rows: list[dict[str, Any]], record: str) -> None:
        made = pa.Table.from_pylist(rows, schema=maskrows.PART_SCHEMA)
        storage.write_parquet(f"{out}/parts/{name}.parquet", [made], maskrows.PART_SCHEMA)
        storage.write_bytes(f"{out}/checkpoint/{record}.parquet", b"")

    write("w_1-0", [part(9, [OK, ERROR, EMPTY]), part(5, [OK])], "w_1")
    write("w_2", [part(4, [])], "w_2")
    write("x_1-0", [part(3, [OK, OK]), part(9, [OK, ERROR, EMPTY])], "x_1")
    write("x_2-0", [part(4, [OK])], "x_2.pending")  # not recorded as complete
    return shards, out, manifest


def test_small_parts_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3 * maskrows._PARTS_IN_MEMORY
    shards, out = str(tmp_path / "shards"), str(tmp_path / "out")
    table = pa.table({"image_id": pa.array(range(count), pa.int64())})
    file = storage.write_parquet(f"{shards}/s.parquet", [table], table.schema)
    for k in range(count):
        one = pa.Table.from_pylist([part(k, [OK])], schema=maskrows.PART_SCHEMA)
        storage.write_parquet(f"{out}/parts/{k:04d}.parquet", [one], maskrows.PART_SCHEMA)
        storage.write_bytes(f"{out}/checkpoint/{k:04d}.parquet", b"")
    whole: list[str] = []
    read = pq.read_table

    def counted(path: str, **options: Any) -> pa.Table:
        if "columns" not in options:
            whole.append(path)
        return read(path, **options)

    monkeypatch.setattr(maskrows.pq, "read_table", counted)
    monkeypatch.setattr(maskrows, "_IMAGES_AT_ONCE", 8)
    manifest = Manifest("shards", [Category(1, "a"), Category(2, "b")], [file], {"images": count, "boxes": count}, {})
    assert maskrows.publish(out, shards, manifest, {"model": "m"}).counts["ok"] == count
    assert len(whole) == len(set(whole)) == count


def test_parts_are_published_in_the_order_of_the_shards(
    unfinished: tuple[str, str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out, manifest = unfinished
    monkeypatch.setattr(maskrows, "_IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(maskrows, "FILE_BYTES", 1)
    for left in ("masks-00000.parquet.0a1b.partial", "masks-00007.parquet"):  # by a run that was killed here
        storage.write_bytes(f"{out}/{left}", b"half")
    made = maskrows.publish(out, shards, manifest, {"model": "m/1"})
    assert storage.read_manifest(out, "masks").hash == made.hash
    assert made.counts == {"images": 4, "boxes": 6, "ok": 4, "empty": 1, "errors": 1}
    assert len(made.files) == 2
    assert set(storage.list_files(out)) == {"manifest.json", *(file.path for file in made.files)}
    rows = masks_of(out)
    assert [row["annotation_id"] for row in rows] == [50, 30, 31, 90, 91, 92]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "ok", "error: no luck", "empty"]
    assert {row["model"] for row in rows} == {"m/1"}
    assert rows[5]["box"] == [0.0, 0.0, 3.0, 2.0]
    assert pq.read_schema(f"{out}/{made.files[0].path}").equals(MASK_SCHEMA)


def test_a_missing_image_or_box_is_never_published(unfinished: tuple[str, str, Manifest]) -> None:
    shards, out, manifest = unfinished
    with pytest.raises(RuntimeError, match=r"the shards hold .*'boxes': 7"):
        maskrows.publish(out, shards, replace(manifest, counts={"images": 4, "boxes": 7}), {"model": "m"})
    Path(f"{out}/parts/w_2.parquet").unlink()
    with pytest.raises(RuntimeError, match="1 images have no masks, the first is 4"):
        maskrows.publish(out, shards, manifest, {"model": "m"})
    assert not storage.exists(f"{out}/manifest.json")


def test_only_shards_with_work_left_are_read_again(tmp_path: Path) -> None:
    shards, out, files = str(tmp_path / "shards"), str(tmp_path / "out"), []

    def ids(path: str, *numbers: int) -> None:
        table = pa.table({"image_id": pa.array(numbers, pa.int64())})
        files.append(storage.write_parquet(path, [table], table.schema))

    for name, numbers in {"a": (5, 3), "b": (9,), "c": (4, 8), "d": (6,)}.items():
        ids(f"{shards}/{name}.parquet", *numbers)
    manifest = Manifest("shards", [], files.copy(), {})
    assert maskrows.unfinished(out, shards, manifest) == storage.shard_files(shards, manifest)
    ids(f"{out}/checkpoint/x_0.parquet", 3, 6)  # whose part was lost
    assert maskrows.unfinished(out, shards, manifest) == storage.shard_files(shards, manifest)
    for name, record, numbers in (("w_1-0", "w_1", (9, 5)), ("w_2", "w_2", (8, 4, 9)), ("x_1-0", "x_1.pending", (3,))):
        ids(f"{out}/parts/{name}.parquet", *numbers)
        ids(f"{out}/checkpoint/{record}.parquet", *numbers)
    left = [Path(path).stem for path in maskrows.unfinished(out, shards, manifest)]
    assert left == ["a", "d"]
    ids(f"{out}/parts/x_2-0.parquet", 3, 6)
    ids(f"{out}/checkpoint/x_2.parquet", 3, 6)
    assert maskrows.unfinished(out, shards, manifest) == []


def test_coco_results_have_an_entry_for_every_box(unfinished: tuple[str, str, Manifest], tmp_path: Path) -> None:
    shards, out, manifest = unfinished
    made = maskrows.publish(out, shards, manifest, {"model": "m"})
    path = tmp_path / "deep" / "results.json"
    maskrows.write_coco(str(path), out, made)
    entries = json.loads(path.read_text())
    assert [e["annotation_id"] for e in entries] == [50, 30, 31, 90, 91, 92]
    assert [e["category_id"] for e in entries] == [11, 11, 7, 11, 7, 11]
    assert [e.get("status") for e in entries] == [None, None, None, None, "error: no luck", "empty"]
    assert entries[2]["bbox"] == [0.0, 0.0, 2.0, 2.0]
    sizes = [int(rle.decode([e["segmentation"]["counts"].encode()], 3, 4).sum()) for e in entries]
    assert sizes == [12, 12, 12, 12, 0, 0]
    assert [e["score"] for e in entries] == [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]
    assert os.listdir(path.parent) == ["results.json"]
