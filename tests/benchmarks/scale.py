"""What an image, a box and a shard cost each stage outside the network, to plan a large corpus with.

    python tests/benchmarks/scale.py --data ../shared/data

The first table: the most memory that the command's own process takes beyond what it had before, and its seconds on the
CPU, for a corpus small enough to try; what a million boxes more take, from a corpus of a quarter of that; and what
memory that means for a billion. No model runs; 10 boxes in an image. The second: bytes of a box with its mask, for the
true masks of real images: as a mask row, and as what the review's database keeps of it, before it compresses that; and
bytes of a shard in the manifest.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bson
import measure
import numpy as np
import pyarrow as pa
import torch

from boxinst import Instances, Targets, rle
from boxinst.metrics import filled_box
from pipelines import coco, feed, maskrows, pieces, review, selection, shards, storage
from pipelines.config import CutConfig
from pipelines.maskrows import BoxMask
from pipelines.schema import MASK_SCHEMA, SHARD_SCHEMA, Category, File, Manifest
from pipelines.scorecard import Scorecard

BOXES, SIDE = 10, 640
"""Boxes in an image, and its sides."""
CATEGORIES = [Category(1, "thing")]
GIVEN = [[40.0 * k, 30.0 * k, 40.0 * k + 120, 30.0 * k + 90] for k in range(BOXES)]
MASKS = rle.encode(filled_box(torch.tensor(GIVEN), SIDE, SIDE))


def shard_rows(images: int) -> list[dict[str, Any]]:
    """Rows of shards without pixels."""
    row = {"image": b"", "width": SIDE, "height": SIDE, "boxes": GIVEN, "labels": [0] * BOXES}
    row |= {"masks": [None] * BOXES, "crowd": [False] * BOXES}
    return [
        {"image_id": k, "file_name": f"{k:09d}.jpg", "annotation_ids": [k * BOXES + n for n in range(BOXES)], **row}
        for k in range(images)
    ]


def of_cut(root: Path, images: int) -> Callable[[], object]:
    """`cut`: the whole command, into four pieces; the boxes are shuffled among the images."""
    path, boxes = root / "corpus.json", images * BOXES
    owners = np.random.default_rng(0).integers(0, images, boxes)
    with path.open("w") as stream:
        stream.write('{"categories": [{"id": 1, "name": "thing"}], "images": [')
        for k in range(images):
            entry = {"id": k, "file_name": f"{k:09d}.jpg", "width": SIDE, "height": SIDE}
            stream.write(f"{', ' * (k > 0)}{json.dumps(entry)}")
        stream.write('], "annotations": [')
        for k, owner in enumerate(owners.tolist()):
            box = [0.25 * (k % 1000), 30.5, 120.125, 90.0]
            row = {"id": k, "image_id": owner, "category_id": 1, "bbox": box, "area": 10811.25, "iscrowd": 0}
            stream.write(f"{', ' * (k > 0)}{json.dumps(row)}")
        stream.write("]}")
    config = CutConfig(str(path), f"{root}/pieces", images_per_piece=images // 4)
    return lambda: pieces.run(config)


def of_places(root: Path, images: int) -> Callable[[], object]:
    """`cut`, between its readings: the images' ids are sorted, which they were not in the file."""
    ids = np.random.default_rng(0).permutation(images)
    return lambda: pieces.Places(ids, 1_000_000)


def of_shard(root: Path, images: int) -> Callable[[], object]:
    """`shard`, before its tasks: the JSON is read and planned."""
    entries = [coco.from_row(row, CATEGORIES) for row in shard_rows(images)]
    path = root / "corpus.json"
    coco.write(str(path), CATEGORIES, [image for image, _ in entries], [a for _, many in entries for a in many])
    files = {image["file_name"]: _Sized(200_000) for image, _ in entries}

    def work() -> None:
        corpus = coco.parse(path.read_bytes(), "corpus.json")
        shards._plan(corpus, files, 128 << 20)  # type: ignore[arg-type]

    return work


class _Sized:
    """As much of a listed file as the plan looks at."""

    def __init__(self, size: int) -> None:
        self.size = size


def of_publish(root: Path, images: int) -> Callable[[], object]:
    """`segment`, at its end: the parts of a finished run become mask files."""
    masks = [BoxMask(mask, 0.5, 0.5, 0.0, 1.0, "ok") for mask in MASKS]
    out, files = root / "masks", []
    for number, start in enumerate(range(0, images, 64)):
        rows = _slice(start, min(start + 64, images))
        part = pa.Table.from_pylist([maskrows.part_row(row, masks) for row in rows], schema=maskrows.PART_SCHEMA)
        storage.write_parquet(f"{out}/{maskrows.PARTS}/0_{number:06d}-0.parquet", [part], maskrows.PART_SCHEMA)
        ids = part.select(["image_id"])
        storage.write_parquet(f"{out}/{maskrows.DONE}/0_{number:06d}.parquet", [ids], ids.schema)
        shard = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
        files.append(storage.write_parquet(f"{root}/shards/shard-{number:05d}.parquet", [shard], SHARD_SCHEMA))
    manifest = Manifest("shards", CATEGORIES, files, {"images": images, "boxes": images * BOXES})
    return lambda: maskrows.publish(str(out), f"{root}/shards", manifest, {"model": "m/1"})


def _slice(start: int, stop: int) -> list[dict[str, Any]]:
    rows = shard_rows(stop - start)
    for k, row in enumerate(rows, start):
        row |= {"image_id": k, "annotation_ids": [k * BOXES + n for n in range(BOXES)]}
    return rows


def of_select(root: Path, images: int) -> Callable[[], object]:
    """`review`, before the database: its boxes are chosen and their rows read."""
    boxes = images * BOXES
    row = {"file_name": "0.jpg", "width": SIDE, "height": SIDE, "label": 0, "box": GIVEN[0], "mask": MASKS[0]}
    row |= {"score": 0.5, "spill": 0.0, "fill": 1.0, "status": "ok", "model": "m/1", "image_id": 0}
    size = 256 * BOXES
    one = pa.Table.from_pylist([{**row, "annotation_id": 0, "box_iou": 0.0}] * size, schema=MASK_SCHEMA)
    rng = np.random.default_rng(0)

    def tables() -> Any:
        for start in range(0, boxes, size):
            ids = np.arange(start, min(start + size, boxes))
            table = one.slice(0, len(ids))
            for name, values in (("annotation_id", ids), ("image_id", ids // BOXES), ("box_iou", rng.random(len(ids)))):
                place = MASK_SCHEMA.get_field_index(name)
                table = table.set_column(place, name, pa.array(values).cast(MASK_SCHEMA.field(name).type))
            yield table.cast(MASK_SCHEMA)

    file = storage.write_parquet(f"{root}/rows/masks-00000.parquet", tables(), MASK_SCHEMA)
    manifest = Manifest("masks", CATEGORIES, [file], {"boxes": boxes})

    def work() -> None:
        chosen = selection.select(f"{root}/rows", manifest, limit=5000, audit=200, seed=0)
        selection.read_rows(f"{root}/rows", manifest, chosen.ids)

    return work


def of_evaluate(root: Path, images: int) -> Callable[[], object]:
    """`evaluate`: the scorecards of the workers are added up, and the figures computed."""
    boxes = torch.tensor(GIVEN)
    masks = filled_box(boxes, SIDE, SIDE)
    targets = Targets(boxes, torch.zeros(BOXES).long(), masks)
    found = Instances(boxes, torch.ones(BOXES), torch.zeros(BOXES).long(), masks)
    one = Scorecard(["thing"], "prompt", 100, False)
    one.update(0, SIDE, SIDE, found, targets)
    state = json.loads(one.to_json())
    ((_, image),) = state["coco"][""].items()

    def work() -> None:
        card = Scorecard(["thing"], "prompt", 100, False)
        for k in range(images):
            card.merge(json.dumps({**state, "coco": {"": {str(k): image}}}))
        card.compute()

    return work


def of_feedback(root: Path, images: int) -> Callable[[], object]:
    """`feedback`, after the database: the next corpus is gathered and written."""
    rows = pa.Table.from_pylist(shard_rows(images), schema=SHARD_SCHEMA)

    def work() -> None:
        entries = [coco.from_row(row, CATEGORIES) for batch in rows.to_batches(1000) for row in batch.to_pylist()]
        annotations = [annotation for _, many in entries for annotation in many]
        coco.write(str(root / "next.json"), CATEGORIES, [image for image, _ in entries], annotations)

    return work


def of_manifest(root: Path, images: int) -> Callable[[], object]:
    """Any command: a manifest is written and read, one shard for every 640 images."""
    files = [File(f"shard-{k:05d}.parquet", 640, 134_217_728 + k, f"{k:064x}") for k in range(max(images // 640, 1))]
    manifest = Manifest("shards", CATEGORIES, files, {"images": images})

    def work() -> None:
        Manifest.from_json(manifest.to_json(), path="manifest.json")

    return work


def of_train(root: Path, images: int) -> Callable[[], object]:
    """`train`, in every task that reads: the order of an epoch, with 80 images in a row group."""
    starts = np.append(np.arange(0, images, 80), images)
    return lambda: feed.epoch_order(starts, feed.READ_ROWS, 0, 0)


STAGES: dict[str, tuple[Callable[[Path, int], Callable[[], object]], int]] = {
    "`cut`: read twice, write four pieces": (of_cut, 100_000),
    "`cut`: sort the ids of the images": (of_places, 10_000_000),
    "`shard`: read and plan the COCO JSON": (of_shard, 20_000),
    "any: write and read a manifest": (of_manifest, 10_000_000),
    "`train`: order an epoch": (of_train, 1_000_000),
    "`segment`: publish the parts": (of_publish, 10_000),
    "`review`: choose 5,200 boxes and read their rows": (of_select, 100_000),
    "`evaluate`: add up and compute": (of_evaluate, 2_000),
    "`feedback`: gather and write the COCO JSON": (of_feedback, 20_000),
}
"""What is measured, and on how many images."""


def costs(only: str) -> Iterator[str]:
    """The first table, line by line. A stage costs the difference of two corpora, one a quarter of the other."""
    header = ["stage", "boxes", "MiB", "seconds", "MiB per million", "seconds per million", "GiB for a billion"]
    yield measure.table(header, [])
    for name, (prepare, images) in STAGES.items():
        if only not in name:
            continue
        taken = []
        for size in (images // 4, images):
            with tempfile.TemporaryDirectory() as folder:
                work = prepare(Path(folder), size)
                gc.collect()
                pa.default_memory_pool().release_unused()
                ctypes.CDLL(None).malloc_trim(0)  # what is freed but kept would hide what the work takes
                begin = time.process_time()
                before, peak = measure.peak_resident(work)
                taken.append((peak - before, time.process_time() - begin))
        (few_mib, few_seconds), (mib, seconds) = taken
        millions = (images - images // 4) * BOXES / 1e6
        more = (mib - few_mib) / millions
        row = [name, f"{images * BOXES:,}", f"{mib:,.0f}", f"{seconds:.1f}"]
        row += [f"{more:,.1f}", f"{(seconds - few_seconds) / millions:.1f}", f"{more * 1000 / 1024:,.1f}"]
        yield "| " + " | ".join(row) + " |"


def bytes_of_a_box(data: Path) -> str:
    """The second table: real masks, written as mask rows are."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(path.parent.parent.name for path in data.glob("*/annotations/instances_train.json")):
            corpus = coco.parse((data / name / "annotations" / "instances_train.json").read_bytes(), name)
            made = []
            for entry in corpus.images:
                for a in entry.annotations:
                    x, y, w, h = a.bbox
                    row = {"image_id": entry.id, "annotation_id": a.id, "file_name": entry.file_name}
                    row |= {"width": entry.width, "height": entry.height, "label": 0, "box": [x, y, x + w, y + h]}
                    row["mask"] = coco.rle_counts(a.segmentation, entry.height, entry.width) if a.segmentation else None
                    measures = np.random.default_rng(a.id).random(4).astype(np.float32).tolist()
                    row |= dict(zip(("score", "box_iou", "spill", "fill"), measures, strict=True))
                    made.append(row | {"status": "ok", "model": "cells/1"})
            documents = _documents(made[:1000])
            step = 256 * max(len(made) // len(corpus.images), 1)
            groups = [pa.Table.from_pylist(made[k : k + step], schema=MASK_SCHEMA) for k in range(0, len(made), step)]
            file = storage.write_parquet(f"{folder}/{name}.parquet", groups, MASK_SCHEMA)
            mask = sum(len(row["mask"] or b"") for row in made) / len(made)
            rows.append(
                [
                    f"boxes of {name}",
                    f"{len(made):,}",
                    f"{mask:.0f}",
                    f"{file.bytes / len(made):.0f}",
                    f"{documents:.0f}",
                ]
            )
    files = [File(f"shard-{k:05d}.parquet", 640, 134_217_728 + k, f"{k:064x}") for k in range(1000)]
    entry = len(Manifest("shards", CATEGORIES, files, {}).to_json()) / len(files)
    rows.append(["a shard in the manifest", f"{len(files):,}", "-", f"{entry:.0f}", "-"])
    return measure.table(["what", "number", "bytes of the RLE", "bytes in the file", "bytes in the database"], rows)


def _documents(rows: list[dict[str, Any]]) -> float:
    """Bytes per box in the documents of a review, one for each image."""
    total = 0
    for _, of_image in itertools.groupby(rows, key=lambda row: row["image_id"]):
        boxes = list(of_image)
        pairs = [review._label(row, ["thing"], set()) for row in boxes]
        total += len(bson.encode(review._sample(boxes[0], "/media/image.png", pairs).to_mongo_dict()))
    return total / len(rows)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="stages whose name holds this, and not the second table")
    parser.add_argument("--data", type=Path, required=True, help="folder with corpora that have masks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for line in costs(args.only):
        print(line, flush=True)
    if not args.only:
        print()
        print(bytes_of_a_box(args.data))


if __name__ == "__main__":
    main()
