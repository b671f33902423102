"""Shards and mask rows for the tests of the review, written row by row: no Ray and no model.

PYTEST_DONT_REWRITE: it holds fixtures and no assertions, and is imported before pytest makes a plugin of it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from boxinst import rle
from boxinst.metrics import mask_box_consistency
from pipelines import storage
from pipelines.schema import MASK_SCHEMA, SHARD_SCHEMA, Category, Manifest

HEIGHT, WIDTH = 96, 128
DISCS = ((35, 40, 20), (90, 50, 25))
"""Centre and radius of the two discs of every image."""

CATEGORIES = [Category(3, "disc"), Category(7, "square")]


def disc(x: float, y: float, radius: float) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def picture(number: int) -> NDArray[np.uint8]:
    pixels = np.random.default_rng(number).integers(60, 120, (HEIGHT, WIDTH, 3))
    for (x, y, radius), color in zip(DISCS, ((200, 80, 60), (90, 190, 80)), strict=True):
        pixels[disc(x, y, radius)] = color
    return pixels.astype(np.uint8)


def png(pixels: NDArray[Any], form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


@dataclass
class Artefacts:
    """A corpus of which each image holds two discs; annotation 10 * image + k is disc k."""

    shards: str
    masks: str
    images: str


def write_shards(root: str, images: str, count: int, *, files: int = 2) -> str:
    """``count`` images in ``files`` Parquet files of one image per row group."""
    Path(images).mkdir(parents=True, exist_ok=True)
    uri, entries = storage.join(root, "shards"), []
    rows = []
    for number in range(count):
        data, name = png(picture(number)), f"{number:03}.png"
        (Path(images) / name).write_bytes(data)
        boxes = [[x - r - 0.5, y - r - 0.25, x + r + 1.0, y + r + 0.75] for x, y, r in DISCS]
        rows.append(
            {
                "image_id": number,
                "file_name": name,
                "image": data,
                "width": WIDTH,
                "height": HEIGHT,
                "annotation_ids": [10 * number, 10 * number + 1],
                "boxes": boxes,
                "labels": [0, 0],
                "masks": [None, None],
                "crowd": [False, False],
            }
        )
    for k, part in enumerate(np.array_split(np.arange(count), files)):
        tables = (pa.Table.from_pylist([rows[number]], schema=SHARD_SCHEMA) for number in part)
        entries.append(storage.write_parquet(storage.join(uri, f"shard-{k}.parquet"), tables, SHARD_SCHEMA))
    counts = {"images": count, "boxes": 2 * count}
    source = {"images": storage.absolute(images)}
    storage.write_manifest(uri, Manifest("shards", CATEGORIES, entries, counts, source))
    return uri


def default_mask(image: int, k: int) -> NDArray[np.bool_] | None:
    """Discs that grow worse with the image's number; the second disc of image 1 spills, that of image 2 failed."""
    x, y, r = DISCS[k]
    if (image, k) == (2, 1):
        return None
    if (image, k) == (1, 1):
        return disc(x - 4, y + 3, r + 4)
    return disc(x, y, r - image)


def write_masks(
    root: str,
    shards: str,
    *,
    name: str = "masks",
    model: str = "discs/1",
    draw: Callable[[int, int], NDArray[np.bool_] | None] = default_mask,
) -> str:
    """Mask rows of ``shards``; ``draw(image, k)`` gives the mask of a disc, or None for a box that failed."""
    manifest = storage.read_manifest(shards, "shards")
    rows = []
    for number in range(manifest.counts["images"]):
        for k, (x, y, r) in enumerate(DISCS):
            box, mask = [x - r - 0.5, y - r - 0.25, x + r + 1.0, y + r + 0.75], draw(number, k)
            row = {"image_id": number, "annotation_id": 10 * number + k, "file_name": f"{number:03}.png", "label": 0}
            row |= {"width": WIDTH, "height": HEIGHT, "box": box, "model": model, "status": "error: out of memory"}
            row |= dict.fromkeys(("mask", "score", "box_iou", "spill", "fill"))
            if mask is not None:
                masks = torch.from_numpy(mask)[None]
                figures = [float(v[0]) for v in mask_box_consistency(masks, torch.tensor([box]))]
                row |= dict(zip(("box_iou", "spill", "fill"), figures, strict=True))
                row |= {"mask": rle.encode(masks)[0], "score": 0.9 - 0.3 * k + 0.01 * number, "status": "ok"}
            rows.append(row)
    uri = storage.join(root, name)
    table = pa.Table.from_pylist(rows, schema=MASK_SCHEMA)
    file = storage.write_parquet(storage.join(uri, "masks-0.parquet"), [table], MASK_SCHEMA)
    source = {"shards": storage.absolute(shards), "shards_hash": manifest.hash, "model": model}
    storage.write_manifest(uri, Manifest("masks", CATEGORIES, [file], {"boxes": len(rows)}, source))
    return uri


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MongoDB for the session; FiftyOne stays with the first that a process connects to."""
    from pipelines import mongo

    before = os.environ.get("BOXINST_HOME")
    os.environ["BOXINST_HOME"] = str(tmp_path_factory.mktemp("database"))
    address = mongo.connect()
    if before is None:
        del os.environ["BOXINST_HOME"]
    else:
        os.environ["BOXINST_HOME"] = before
    return address


@pytest.fixture
def artefacts(tmp_path: Path, home: Path, database: str) -> Artefacts:
    """Four images, eight boxes."""
    images = str(tmp_path / "images")
    shards = write_shards(str(tmp_path), images, 4)
    return Artefacts(shards, write_masks(str(tmp_path), shards), images)
