"""COCO's JSON and the rows of shards: reading with every entry accounted for, and the way back.

Reading never guesses: an image or a box that cannot be used becomes a reject with its id and its reason.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from boxinst import rle
from boxinst.errors import InputError
from pipelines import storage
from pipelines.schema import Category

EPSILON = 1e-3
"""Pixels. What is less is the rounding of float32 and no defect of a box."""


LISTS = ("images", "annotations", "categories")
"""What a COCO file of instances has."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One box of an image, as the JSON has it."""

    id: int
    category_id: int
    bbox: Any
    """x, y, width, height in pixels; not checked yet."""
    segmentation: Any
    """Polygons or RLE, or None; not checked yet."""
    crowd: bool


@dataclass
class ImageEntry:
    """One image of the JSON with its boxes."""

    id: int
    file_name: str
    """Path below the images folder."""
    width: int | None
    """None where the JSON does not say: the file decides then."""
    height: int | None
    annotations: list[Annotation] = field(default_factory=list)


@dataclass
class Corpus:
    """The content of a COCO JSON file, in the order of the image ids."""

    categories: list[Category]
    """In the order of their ids; the position is the label."""
    images: list[ImageEntry]
    rejects: list[dict[str, Any]]
    """Rows of ``schema.REJECT_SCHEMA``."""
    entered_images: int
    entered_boxes: int


def reject(
    kind: str,
    reason: str,
    value: object = "",
    *,
    image_id: int | None = None,
    annotation_id: int | None = None,
    file_name: str | None = None,
    action: str = "rejected",
) -> dict[str, Any]:
    """One row of ``schema.REJECT_SCHEMA``."""
    return {
        "kind": kind,
        "action": action,
        "image_id": image_id,
        "annotation_id": annotation_id,
        "file_name": None if file_name is None else _text(file_name),
        "reason": reason,
        "value": _text(str(value)[:200]),
    }


def _text(value: str) -> str:
    """``value`` with half characters (lone surrogates, which JSON may hold) spelled out, so that it can be stored."""
    return value.encode("utf-8", "backslashreplace").decode()


def reject_annotations(entry: ImageEntry, value: object) -> list[dict[str, Any]]:
    """Rejects for the boxes of an image that is rejected itself for the reason ``value``."""
    return [
        reject("box", "image rejected", value, image_id=entry.id, annotation_id=a.id, file_name=entry.file_name)
        for a in entry.annotations
    ]


# --- reading --------------------------------------------------------------------------------------------------------


def parse(data: bytes, path: str) -> Corpus:
    """Read a COCO JSON file's content.

    Args:
        data: the file.
        path: its name, for the errors.

    Raises:
        InputError: not JSON, or not a COCO file of instances.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise not_json(path, error) from None
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise no_list(path, key)
    if not content["images"]:
        raise no_images(path)
    categories = read_categories(content["categories"], path)
    rejects: list[dict[str, Any]] = []
    images = _images(content["images"], rejects)
    _attach(content["annotations"], images, {c.id for c in categories}, rejects)
    kept = []
    for entry in sorted(images.values(), key=lambda e: e.id):
        reason = _unusable(entry.file_name)
        if not reason:
            kept.append(entry)
            continue
        rejects.append(reject("image", reason, entry.file_name, image_id=entry.id, file_name=entry.file_name))
        rejects += reject_annotations(entry, reason)
    return Corpus(categories, kept, rejects, len(content["images"]), len(content["annotations"]))


def not_json(path: str, error: Exception) -> InputError:
    """The error of a file ``path`` that cannot be parsed."""
    return InputError("--annotations", f"{path} is not JSON ({error})", "Give a COCO JSON file.")


def no_list(path: str, key: str) -> InputError:
    """The error of a file ``path`` without the list ``key``."""
    remedy = 'A COCO file has the lists "images", "annotations", "categories".'
    return InputError("--annotations", f'{path} is not COCO: it has no list "{key}"', remedy)


def no_images(path: str) -> InputError:
    """The error of a file ``path`` whose list of images is empty."""
    return InputError("--annotations", f'{path} has an empty list "images"', "Give a file that lists images.")


def read_categories(items: list[Any], path: str) -> list[Category]:
    """The list "categories" of the file ``path``, in the order of the ids.

    Raises:
        InputError: there are none, or one is no category, or two are alike.
    """
    categories = []
    for item in items:
        if not isinstance(item, dict) or integer(item.get("id")) is None or not isinstance(item.get("name"), str):
            raise InputError("--annotations", f"{path} has the category {item!r}", "Give it an integer id and a name.")
        categories.append(Category(item["id"], item["name"]))
    if not categories:
        raise InputError("--annotations", f'{path} has an empty list "categories"', "List the classes there.")
    for what in ("id", "name"):
        value, times = Counter(getattr(c, what) for c in categories).most_common(1)[0]
        if times > 1:
            raise InputError("--annotations", f"{path} has {times} categories of {what} {value!r}", "Rename one.")
    return sorted(categories, key=lambda c: c.id)


def _images(items: list[Any], rejects: list[dict[str, Any]]) -> dict[int, ImageEntry]:
    """Image entries by id; the first of an id counts."""
    images: dict[int, ImageEntry] = {}
    for item in items:
        get = item.get if isinstance(item, dict) else {}.get
        number, width, height = (integer(get(key)) for key in ("id", "width", "height"))
        name = get("file_name") if isinstance(get("file_name"), str) else ""
        if number is None:
            rejects.append(reject("image", "image id is not an integer", get("id"), file_name=name))
        elif number in images:
            rejects.append(reject("image", "duplicate image id", number, image_id=number, file_name=name))
        else:
            images[number] = ImageEntry(number, name or "", width, height)
    return images


def _attach(
    items: list[Any], images: dict[int, ImageEntry], category_ids: set[int], rejects: list[dict[str, Any]]
) -> None:
    """Put the annotations into their image's entry, in the order of their ids."""
    seen: set[int] = set()
    for item in items:
        get = item.get if isinstance(item, dict) else {}.get
        number, image_id, category_id = (integer(get(key)) for key in ("id", "image_id", "category_id"))
        entry = None if image_id is None else images.get(image_id)
        if number is None:
            reason, value = "annotation id is not an integer", get("id")
        elif number in seen:
            reason, value = "duplicate annotation id", number
        elif entry is None:
            reason, value = "unknown image", get("image_id")
        elif category_id is None or category_id not in category_ids:
            reason, value = "unknown category", get("category_id")
        else:
            seen.add(number)
            segmentation, crowd = get("segmentation") or None, bool(get("iscrowd"))
            entry.annotations.append(Annotation(number, category_id, get("bbox"), segmentation, crowd))
            continue
        name = None if entry is None else entry.file_name
        rejects.append(reject("box", reason, value, image_id=image_id, annotation_id=number, file_name=name))
    for entry in images.values():
        entry.annotations.sort(key=lambda a: a.id)


def integer(value: object) -> int | None:
    """``value`` where it is an integer that fits a column, None where not (True is none either)."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def _unusable(name: str) -> str:
    """Why no image can be read by a file name; empty where one can."""
    path = PurePosixPath(name)
    if not name:
        return "no file name"
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        return "file name leaves the images folder"
    return "" if _text(name) == name else "file name holds half a character"


# --- COCO to rows ---------------------------------------------------------------------------------------------------


def to_row(
    entry: ImageEntry, data: bytes, size: tuple[int, int], labels: Mapping[int, int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An image and its usable boxes as a row of ``schema.SHARD_SCHEMA``, and rejects for what was left or changed.

    Args:
        entry: the image.
        data: the image file's bytes.
        size: its width and height in pixels, in the frame that the boxes refer to.
        labels: label of each category id.
    """
    width, height = size
    rejects: list[dict[str, Any]] = []
    kept: list[tuple[Annotation, list[float], bytes | None]] = []
    for annotation in entry.annotations:
        where: dict[str, Any] = {"image_id": entry.id, "annotation_id": annotation.id, "file_name": entry.file_name}
        try:
            box, clipped = clip(annotation.bbox, width, height)
        except ValueError as error:
            rejects.append(reject("box", str(error), annotation.bbox, **where))
            continue
        if clipped:
            reason = "box partly outside the image"
            rejects.append(reject("box", reason, annotation.bbox, **where, action="clipped"))
        counts = None
        if annotation.segmentation is not None:
            try:
                counts = rle_counts(annotation.segmentation, height, width)
            except ValueError as error:
                rejects.append(reject("mask", "segmentation cannot be read", error, **where))
        kept.append((annotation, box, counts))
    row = {
        "image_id": entry.id,
        "file_name": entry.file_name,
        "image": data,
        "width": width,
        "height": height,
        "annotation_ids": [a.id for a, _, _ in kept],
        "boxes": [box for _, box, _ in kept],
        "labels": [labels[a.category_id] for a, _, _ in kept],
        "masks": [counts for _, _, counts in kept],
        "crowd": [a.crowd for a, _, _ in kept],
    }
    return row, rejects


def clip(bbox: Any, width: int, height: int) -> tuple[list[float], bool]:
    """COCO's [x, y, w, h] as xyxy inside the image, and whether that has moved an edge.

    Raises:
        ValueError: the reason why it is no usable box.
    """
    if not isinstance(bbox, list) or len(bbox) != 4 or any(type(v) not in (int, float) for v in bbox):
        raise ValueError("box is not four numbers")
    if not all(abs(v) <= sys.float_info.max for v in bbox):  # NaN, infinity, and integers beyond every float
        raise ValueError("box is not finite")
    x, y, w, h = (float(v) for v in bbox)
    if w <= EPSILON or h <= EPSILON:
        raise ValueError("empty box")
    given = [x, y, x + w, y + h]
    box = [min(max(v, 0.0), float(limit)) for v, limit in zip(given, (width, height) * 2, strict=True)]
    if box[2] - box[0] <= EPSILON or box[3] - box[1] <= EPSILON:
        raise ValueError("box outside the image")
    return box, any(abs(a - b) > EPSILON for a, b in zip(given, box, strict=True))


def rle_counts(segmentation: Any, height: int, width: int) -> bytes:
    """COCO's compressed counts of polygons, of an uncompressed or of a compressed RLE.

    pycocotools writes past its memory when it is given wrong runs or coordinates, so they are checked before.

    Raises:
        ValueError: it cannot be read, is of another size, or covers no pixel.
    """
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width]:
            raise ValueError(f"RLE of size {size}, the image has [{height}, {width}]")
        if isinstance(counts, str):
            counts = counts.encode()
        runs = run_lengths(counts) if isinstance(counts, bytes) else counts
        if not isinstance(runs, list) or any(type(r) is not int or r < 0 for r in runs) or sum(runs) != height * width:
            raise ValueError("the runs of the RLE do not add up to the image")
        if not isinstance(counts, bytes):
            counts = mask_api.frPyObjects({"size": size, "counts": runs}, height, width)["counts"]
    else:
        counts = mask_api.merge(mask_api.frPyObjects(_polygons(segmentation, height, width), height, width))["counts"]
    if rle.area([counts], height, width) == [0]:
        raise ValueError("covers no pixel")
    return counts


def _polygons(segmentation: Any, height: int, width: int) -> list[list[float]]:
    """The polygons of a segmentation, once their coordinates are known to be sane."""
    if not isinstance(segmentation, list):
        raise ValueError(f"neither polygons nor RLE: {type(segmentation).__name__}")
    limit = 10 * max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon needs three or more points x, y")
        if any(type(v) not in (int, float) for v in polygon) or not np.all(np.abs(polygon) <= limit):  # NaN too
            raise ValueError("a polygon's coordinate is not a number near the image")
    return segmentation


def run_lengths(counts: bytes) -> list[int]:
    """Run lengths in COCO's compressed counts: 5 bits a character, a sign, differences from the run before the last.

    Source: ``rleFrString`` in pycocotools' ``maskApi.c``.

    Raises:
        ValueError: a character that cannot be, or an end in the middle of a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = character - 48
        if not 0 <= code < 64:
            raise ValueError(f"the RLE has the character {chr(character)!r}")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:  # more to come
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the RLE ends too early")
    return runs


# --- rows to COCO ---------------------------------------------------------------------------------------------------


def from_row(row: Mapping[str, Any], categories: Sequence[Category]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Inverse of ``to_row``: COCO's entry of the image, and those of its annotations."""
    size = [row["height"], row["width"]]
    image = {"id": row["image_id"], "file_name": row["file_name"], "width": size[1], "height": size[0]}
    annotations = []
    columns = ("annotation_ids", "boxes", "labels", "masks", "crowd")
    for number, (x1, y1, x2, y2), label, counts, crowd in zip(*(row[c] for c in columns), strict=True):
        annotation = {
            "id": number,
            "image_id": row["image_id"],
            "category_id": categories[label].id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(crowd),
        }
        if counts is not None:
            annotation["segmentation"] = {"size": size, "counts": counts.decode()}
            annotation["area"] = float(rle.area([counts], *size)[0])
        annotations.append(annotation)
    return image, annotations


def write(
    uri: str,
    categories: Iterable[Category],
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
) -> None:
    """Write a COCO JSON file, complete or not at all."""
    content = {"categories": [asdict(c) for c in categories], "images": images, "annotations": annotations}
    storage.write_bytes(uri, json.dumps(content).encode())
