"""Mask rows: gathered image by image in any order, published box by box in the shards' order, or as COCO results."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch

from boxinst import rle
from pipelines import storage
from pipelines.s3 import patiently
from pipelines.schema import BOX, MASK_SCHEMA, File, Manifest

PARTS, DONE = "parts", "checkpoint"
"""Folders of an unfinished output: Parquet files of PART_SCHEMA, and Ray Data's record of the images in them."""

_PER_BOX = {
    "annotation_id": pa.int64(),
    "label": pa.int32(),
    "box": BOX,
    "mask": pa.binary(),
    "score": pa.float32(),
    "box_iou": pa.float32(),
    "spill": pa.float32(),
    "fill": pa.float32(),
    "status": pa.string(),
}
_PER_IMAGE = ("image_id", "file_name", "width", "height")

PART_SCHEMA = pa.schema(
    [MASK_SCHEMA.field(name) for name in _PER_IMAGE] + [(name, pa.list_(kind)) for name, kind in _PER_BOX.items()]
)
"""One row per image: the columns of MASK_SCHEMA that concern a box are lists, equally long."""

FILE_BYTES = 128 << 20
"""Size of a finished file in memory, about."""
_IMAGES_AT_ONCE = 256
_IMAGES_AHEAD = 1024
"""Images whose parts are being read: S3 answers late, but many at once."""
_PARTS_IN_MEMORY = 32
_READERS = 16


@dataclass(frozen=True)
class BoxMask:
    """What is said of one box; see ``schema.MASK_SCHEMA``."""

    mask: bytes | None
    score: float | None
    box_iou: float | None
    spill: float | None
    fill: float | None
    status: str


def part_row(shard_row: Mapping[str, Any], masks: list[BoxMask]) -> dict[str, Any]:
    """A row of PART_SCHEMA from the shards' row of an image and the masks of its boxes, in their order."""
    row = {name: shard_row[name] for name in _PER_IMAGE}
    row |= {"annotation_id": shard_row["annotation_ids"], "label": shard_row["labels"], "box": shard_row["boxes"]}
    return row | {
        name: [getattr(mask, name) for mask in masks]
        for name in ("mask", "score", "box_iou", "spill", "fill", "status")
    }


def unfinished(out: str, shards_uri: str, shards: Manifest) -> list[str]:
    """Paths of the shards in which an image has no part yet: a run that goes on need not read the others.

    Args:
        out: folder that may hold PARTS and DONE.
        shards_uri: folder of the shards.
        shards: their manifest.
    """
    paths = storage.shard_files(shards_uri, shards)
    fs, root = storage.fs_path(out)
    if not len(ids := done(root, fs)):
        return paths
    of_shards = _ids(paths, storage.filesystem(shards_uri))
    return [path for path, own in zip(paths, of_shards, strict=True) if not np.isin(own, ids).all()]


def done(root: str, fs: pafs.FileSystem) -> np.ndarray:
    """Ids of the images that are in a complete part, in the folder ``root`` of an output: int64, sorted, each once.

    The parts are asked, not the records: an image whose part was lost is done again.
    """
    parts = [f"{root}/{PARTS}/{name}" for name in _committed(root, fs)]
    return np.unique(np.concatenate([np.empty(0, np.int64), *_ids(parts, fs)]))


def publish(out: str, shards_uri: str, shards: Manifest, source: dict[str, Any]) -> Manifest:
    """Turn the parts of a complete run into the finished artefact: write its files and its manifest, drop the parts.

    Rows stand in the order of the shards, so that a run that was killed ends with the rows of one that was not.

    Args:
        out: folder that holds PARTS and DONE.
        shards_uri: folder of the shards.
        shards: their manifest.
        source: of the new manifest; ``source["model"]`` goes into every row.

    Raises:
        RuntimeError: an image or a box of the shards has no row, which is a defect of this program.
    """
    counts: Counter[str] = Counter(images=0, boxes=0, ok=0, empty=0, errors=0)
    storage.clear(out, keep=[storage.CLAIM, PARTS, DONE])  # what a run that was killed here has left
    files: list[File] = []
    rows = _counted(_in_order(out, _image_ids(shards_uri, shards)), source["model"], counts)
    for number, first in enumerate(rows):
        path = storage.join(out, f"masks-{number:05d}.parquet")
        files.append(storage.write_parquet(path, _up_to(FILE_BYTES, first, rows), MASK_SCHEMA))
    expected = {name: shards.counts[name] for name in ("images", "boxes")}
    if {name: counts[name] for name in expected} != expected:
        raise RuntimeError(f"the shards hold {expected}, the masks {dict(counts)}")
    manifest = Manifest("masks", shards.categories, files, dict(counts), source, exif=shards.exif)
    storage.write_manifest(out, manifest)
    drop_parts(out)
    return manifest


def drop_parts(out: str) -> None:
    """Remove what only an unfinished run needs."""
    for folder in (PARTS, DONE):
        storage.remove(storage.join(out, folder))


def write_coco(path: str, out: str, manifest: Manifest) -> None:
    """Write a finished artefact as COCO results: a JSON list with one entry for every box.

    An entry has image_id, category_id (the corpus's own), annotation_id, bbox (as given, xywh), segmentation (RLE
    with the counts as text) and score. A box without a mask has an empty one with score 0, and its ``status``.

    Args:
        path: the JSON file, local or s3://.
        out: the artefact.
        manifest: of the artefact.
    """
    rows = (row for table in storage.row_groups(out, manifest) for row in table.to_pylist())
    entries = (json.dumps(_coco_entry(row, manifest)) for row in rows)
    with storage.writing(path) as stream:
        for k, entry in enumerate(entries):
            stream.write((",\n" if k else "[\n").encode() + entry.encode())
        stream.write(b"\n]\n" if manifest.counts["boxes"] else b"[]\n")


def _coco_entry(row: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    x0, y0, x1, y1 = row["box"]
    counts = row["mask"] if row["mask"] is not None else _empty(row["height"], row["width"])
    entry = {
        "image_id": row["image_id"],
        "category_id": manifest.categories[row["label"]].id,
        "annotation_id": row["annotation_id"],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": {"size": [row["height"], row["width"]], "counts": counts.decode()},
        "score": row["score"] if row["mask"] is not None else 0.0,
    }
    return entry if row["status"] == "ok" else entry | {"status": row["status"]}


@functools.lru_cache(maxsize=64)
def _empty(height: int, width: int) -> bytes:
    return rle.encode(torch.zeros(1, height, width, dtype=torch.bool))[0]


def _image_ids(uri: str, shards: Manifest) -> np.ndarray:
    """Image ids of the shards in their order, int64 [images]."""
    found = _ids(storage.shard_files(uri, shards), storage.filesystem(uri))
    return np.concatenate([np.empty(0, np.int64), *found])


def _ids(paths: Sequence[str], fs: pafs.FileSystem) -> Iterator[np.ndarray]:
    """Image ids of each file, int64 [rows]. Many files at once: S3 answers late, and there may be thousands."""

    def read(path: str) -> np.ndarray:
        return patiently(lambda: pq.read_table(path, columns=["image_id"], filesystem=fs))["image_id"].to_numpy()

    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(read, paths)


def _in_order(out: str, image_ids: np.ndarray) -> Iterator[pa.Table]:
    """The rows of the parts in the order of ``image_ids``, some images at a time.

    Parts are written as workers finish, nearly in that order; so few are needed at a time, and those are kept.
    """
    fs, root = storage.fs_path(out)
    paths = [f"{root}/{PARTS}/{name}" for name in _committed(root, fs)]
    found = list(_ids(paths, fs))
    ids = np.concatenate([np.empty(0, np.int64), *found])
    part = np.repeat(np.arange(len(paths)), [len(f) for f in found])
    within = np.concatenate([np.empty(0, np.int64), *(np.arange(len(f)) for f in found)])
    # An image may be there twice, when a worker outlived its killed driver for a moment: one is as good as the other.
    known, at = np.unique(ids, return_index=True)
    if len(missing := np.setdiff1d(image_ids, known)):
        raise RuntimeError(f"{len(missing)} images have no masks, the first is {missing[0]}")

    def read(k: int) -> pa.Table:
        table = patiently(lambda: pq.read_table(paths[k], filesystem=fs))
        return table.select(PART_SCHEMA.names).cast(PART_SCHEMA)

    rows = at[np.searchsorted(known, image_ids)]
    with ThreadPoolExecutor(_READERS) as pool:
        load = functools.lru_cache(maxsize=_PARTS_IN_MEMORY)(lambda k: pool.submit(read, k))
        for start in range(0, len(image_ids), _IMAGES_AT_ONCE):
            ahead = dict.fromkeys(part[rows[start : start + _IMAGES_AHEAD]].tolist())
            # Not all, where parts are small: they would push each other out of memory, and be read again.
            for k in itertools.islice(ahead, _PARTS_IN_MEMORY // 2):
                load(k)
            wanted = rows[start : start + _IMAGES_AT_ONCE]
            pieces, rank = [], []
            for k in dict.fromkeys(part[wanted].tolist()):
                here = np.flatnonzero(part[wanted] == k)
                pieces.append(load(k).result().take(pa.array(within[wanted[here]])))
                rank.append(here)
            yield pa.concat_tables(pieces).take(pa.array(np.argsort(np.concatenate(rank))))


def _committed(root: str, fs: pafs.FileSystem) -> list[str]:
    """Names of the parts that Ray Data has recorded as complete, in order."""
    recorded = {PurePosixPath(name).stem for name in _names(f"{root}/{DONE}", fs)}
    # A part is named as its record, with a number after it where one record covers several files. Of a record whose
    # part may not be complete, the stem ends in ".pending".
    names = sorted(_names(f"{root}/{PARTS}", fs))
    return [n for n in names if {PurePosixPath(n).stem, PurePosixPath(n).stem.rpartition("-")[0]} & recorded]


def _names(path: str, fs: pafs.FileSystem) -> list[str]:
    found = patiently(lambda: fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)))
    return [info.base_name for info in found if info.type == pafs.FileType.File]


def _counted(images: Iterable[pa.Table], model: str, counts: Counter[str]) -> Iterator[pa.Table]:
    """Per-image rows as per-box rows, adding them up in ``counts`` on their way."""
    for table in images:
        boxes = _per_box(table, model)
        counts["images"] += len(table)
        counts["boxes"] += len(boxes)
        for value in pc.value_counts(boxes["status"]).to_pylist():
            status = value["values"]
            counts[status if status in ("ok", "empty") else "errors"] += value["counts"]
        yield boxes


def _per_box(table: pa.Table, model: str) -> pa.Table:
    """PART_SCHEMA to MASK_SCHEMA."""
    table = table.combine_chunks()
    lengths = pc.list_value_length(table["status"]).to_numpy()
    image = pa.array(np.repeat(np.arange(len(table)), lengths))
    columns = {name: table[name].take(image) for name in _PER_IMAGE}
    columns |= {name: pc.list_flatten(table[name]) for name in _PER_BOX}
    columns["model"] = pa.array([model] * len(image), pa.string())
    return pa.table([columns[name] for name in MASK_SCHEMA.names], schema=MASK_SCHEMA)


def _up_to(size: int, first: pa.Table, more: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """``first``, and of ``more`` until they have ``size`` bytes together."""
    total = 0
    for table in itertools.chain([first], more):
        yield table
        total += table.nbytes
        if total >= size:
            return
