"""What a reviewer gets to see: which boxes, their mask rows, and their images as files that a browser shows."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipelines import images, settings, storage
from pipelines.schema import MASK_SCHEMA, Manifest

SHOWN_AS_FILED = {"JPEG", "PNG", "WEBP"}
"""Formats that every browser shows; in the modes L, RGB and P."""


@dataclass(frozen=True)
class Selection:
    """The boxes to review, by annotation id."""

    ids: NDArray[np.int64]
    """All of them, in order."""
    audit: NDArray[np.int64]
    """The random sample among them."""
    total: int
    """Rows they were selected from."""


def select(uri: str, manifest: Manifest, *, limit: int, audit: int, seed: int) -> Selection:
    """The boxes whose masks agree least with them, and a random sample of all boxes.

    Args:
        uri: mask rows.
        manifest: theirs.
        limit: number of boxes to take worst first; 0 takes all.
        audit: number of boxes to draw at random.
        seed: of the draw; it does not depend on the order of the rows.
    """
    columns = ("annotation_id", "box_iou", "status")
    schema = pa.schema([MASK_SCHEMA.field(name) for name in columns])
    table = pa.concat_tables([schema.empty_table(), *storage.row_groups(uri, manifest, columns)])
    ids = table["annotation_id"].to_numpy()
    # What has no mask comes before the worst mask.
    consistency = pc.if_else(pc.equal(table["status"], "ok"), pc.fill_null(table["box_iou"], -1.0), -1.0).to_numpy()
    drawn = np.random.default_rng(seed).choice(np.sort(ids), size=min(audit, len(ids)), replace=False)
    worst = ids[np.lexsort((ids, consistency))[:limit]] if limit else ids
    return Selection(np.union1d(worst, drawn), np.sort(drawn), len(ids))


def read_rows(uri: str, manifest: Manifest, wanted: NDArray[np.int64]) -> dict[int, list[dict[str, Any]]]:
    """Mask rows of the annotations wanted, by image id, in the order of the annotation ids."""
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    values = pa.array(wanted, pa.int64())
    for table in storage.row_groups(uri, manifest):
        for row in table.filter(pc.is_in(table["annotation_id"], values)).to_pylist():
            rows[row["image_id"]].append(row)
    return {image_id: sorted(rows[image_id], key=lambda r: r["annotation_id"]) for image_id in sorted(rows)}


def media(uri: str, manifest: Manifest, wanted: set[int]) -> Iterator[tuple[int, str]]:
    """Image id and local file of each image wanted: the original where there is one, else written from the shards.

    Of the shards only the row groups that hold a wanted image are read.

    Args:
        uri: shards.
        manifest: theirs.
        wanted: image ids.
    """
    fs, values = storage.filesystem(uri), pa.array(sorted(wanted), pa.int64())
    for path in storage.shard_files(uri, manifest):
        with storage.explained(uri), fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["image_id"])["image_id"]
                if not pc.any(pc.is_in(ids, values)).as_py():
                    continue
                table = file.read_row_group(group, columns=["image_id", "file_name", "image"])
                for row in table.filter(pc.is_in(table["image_id"], values)).to_pylist():
                    yield row["image_id"], _file(row, manifest)


def _file(row: Mapping[str, Any], manifest: Manifest) -> str:
    """Path of a file that a browser shows with the pixels that the boxes refer to."""
    data, name = row["image"], PurePosixPath(row["file_name"])
    shown = _for_browser(data, manifest.exif)
    folder = str(manifest.source.get("images") or "")
    if shown is None and folder and not storage.is_s3(folder):
        original = Path(folder) / name
        if original.is_file() and original.read_bytes() == data:
            return str(original)
    suffix, content = (name.suffix, data) if shown is None else (".png", shown)
    # Named by the id: file names repeat in subfolders.
    target = settings.home() / "cache" / "media" / manifest.hash / f"{row['image_id']}{suffix}"
    if not target.is_file() or target.stat().st_size != len(content):
        storage.write_bytes(str(target), content)
    return str(target)


def _for_browser(data: bytes, exif: images.Exif) -> bytes | None:
    """The image as PNG, or None where a browser shows the file itself as this program reads it.

    Browsers turn images as their EXIF says, and show neither TIFF nor the full range of 16 bits.
    """
    with Image.open(io.BytesIO(data)) as image:
        plain = image.format in SHOWN_AS_FILED and image.mode in ("L", "RGB", "P")
        if plain and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return None
    png = io.BytesIO()
    Image.fromarray(images.decode(data, exif=exif)).save(png, "PNG")
    return png.getvalue()
