"""What a reviewer gets to see: which boxes, their mask rows, and their images as files that a browser shows."""

from __future__ import annotations

import functools
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipelines import images, settings, storage
from pipelines.s3 import patiently
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
    worst, drawn, total = _Least(limit or None), _Least(audit), 0
    for rows in storage.row_groups(uri, manifest, ("annotation_id", "box_iou", "status")):
        ids = rows["annotation_id"].to_numpy()
        # What has no mask comes before the worst mask.
        ok = pc.equal(rows["status"], "ok")
        worst.add(pc.if_else(ok, pc.fill_null(rows["box_iou"], -1.0), -1.0).to_numpy(), ids)
        drawn.add(_lots(ids, seed), ids)
        total += len(ids)
    return Selection(np.union1d(worst.ids, drawn.ids), np.sort(drawn.ids), total)


class _Least:
    """The ids of the least values of many, of which few are held at a time. Among equal values the least ids.

    Args:
        size: how many; None keeps all.
    """

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._kept: list[tuple[NDArray[Any], NDArray[np.int64]]] = []

    def add(self, values: NDArray[Any], ids: NDArray[np.int64]) -> None:
        self._kept.append((values, ids))
        if self._size is not None:
            values, ids = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
            least = np.lexsort((ids, values))[: self._size]
            self._kept = [(values[least], ids[least])]

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.concatenate([np.empty(0, np.int64), *(ids for _, ids in self._kept)])


def _lots(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A random number for each id, the same wherever the id stands."""
    start = _mixed(np.array([(seed + 1) % 2**64], np.uint64))
    return _mixed(start + ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's way to make random bits of a counter (Steele, Lea and Flood 2014)."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)


def read_rows(uri: str, manifest: Manifest, wanted: NDArray[np.int64]) -> dict[int, list[dict[str, Any]]]:
    """Mask rows of the annotations wanted, by image id, in the order of the annotation ids."""
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in _holding(uri, manifest, "annotation_id", wanted, MASK_SCHEMA.names):
        rows[row["image_id"]].append(row)
    return {image_id: sorted(rows[image_id], key=lambda r: r["annotation_id"]) for image_id in sorted(rows)}


def media(uri: str, manifest: Manifest, wanted: set[int]) -> Iterator[tuple[int, str]]:
    """Image id and local file of each image wanted: the original where there is one, else written from the shards.

    Of the shards only the row groups that hold a wanted image are read whole.

    Args:
        uri: shards.
        manifest: theirs.
        wanted: image ids.
    """
    ids = np.array(sorted(wanted), np.int64)
    for row in _holding(uri, manifest, "image_id", ids, ("image_id", "file_name", "image")):
        yield row["image_id"], _file(row, manifest)


def _holding(
    uri: str, manifest: Manifest, key: str, wanted: NDArray[np.int64], columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of an artefact whose ``key`` is among ``wanted``, which is sorted; the rows of one file in memory."""
    fs = storage.filesystem(uri)
    for path in storage.shard_files(uri, manifest):
        with storage.explained(uri):
            yield from patiently(functools.partial(_rows_of, fs, path, key, wanted, columns))


def _rows_of(
    fs: pafs.FileSystem, path: str, key: str, wanted: NDArray[np.int64], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """See ``_holding``. Only the row groups that hold a wanted row are read whole."""
    file, values, rows = storage.open_parquet(fs, path), pa.array(wanted, pa.int64()), []
    place = file.schema.names.index(key)
    for group in range(file.num_row_groups):
        known = file.metadata.row_group(group).column(place).statistics
        if known is not None and known.has_min_max:
            first, last = np.searchsorted(wanted, [known.min, known.max + 1])
            if first == last:
                continue
        if pc.any(pc.is_in(file.read_row_group(group, columns=[key])[key], values)).as_py():
            table = file.read_row_group(group, columns=list(columns))
            rows += table.filter(pc.is_in(table[key], values)).to_pylist()
    return rows


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
