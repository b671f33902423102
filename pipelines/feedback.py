"""A review as the next corpus: COCO JSON in which the masks that people accepted or edited are labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from boxinst import rle
from boxinst.errors import InputError
from pipelines import coco, mongo, storage
from pipelines.config import FeedbackConfig
from pipelines.schema import SHARD_SCHEMA, Manifest
from pipelines.verdicts import (
    GIVEN,
    INFO,
    MASKS,
    Outcome,
    check_info,
    digest,
    outcome,
    paste,
    pixels,
    strictest,
)

LABELLED: tuple[Outcome, ...] = ("accepted", "edited")
"""Outcomes that make a mask a label."""


@dataclass(frozen=True)
class Feedback:
    """What was written."""

    out: str
    images: int
    boxes: int
    """Annotations in the file."""
    masks: int
    """Of these, those with a mask label."""
    outcomes: dict[str, int]
    """Number of the corpus's annotations per outcome; their sum is what the corpus has."""
    reclassified: int
    """Annotations whose class was changed."""
    added: int
    """Labels drawn in the App, which are new annotations."""
    dropped: int
    """Annotations that were left out (``drop_deleted``)."""

    def __str__(self) -> str:
        said = ", ".join(f"{number} {name}" for name, number in self.outcomes.items() if number)
        more = {"class changed": self.reclassified, "drawn anew": self.added, "left out": self.dropped}
        extra = "".join(f"; {number} {name}" for name, number in more.items() if number)
        return f"{self.out}: {self.images} images, {self.boxes} boxes, {self.masks} with masks ({said}{extra})"


@dataclass(frozen=True)
class Judged:
    """What the review says of one label."""

    outcome: Outcome | None
    """None for a label that was drawn in the App."""
    label: str | None = None
    """Class name, where it is another than the given one."""
    box: list[float] | None = None
    """xyxy pixels, where the reviewer moved the box."""
    mask: bytes | None = None
    """RLE counts in the image's pixels, where the mask is a label now."""


def run(config: FeedbackConfig) -> Feedback:
    """Write the next corpus: every annotation of the reviewed one, in its order, and what was drawn in the App.

    ==========  ============================================================  =========  ==========
    outcome     when                                                          mask       ``review``
    ==========  ============================================================  =========  ==========
    accepted    tag accept                                                    as shown   accepted
    edited      the mask was brushed; with tag reject it is rejected instead  as edited  edited
    rejected    tag reject                                                    unchanged  rejected
    fix         tag fix, and not brushed                                      unchanged  fix
    deleted     the label was deleted                                         unchanged  deleted
    moved       the box was moved, and nothing said of the mask               unchanged  moved
    no mask     accepted or emptied, but there is no mask                     unchanged  no mask
    unreviewed  none of these                                                 unchanged  (none)
    ==========  ============================================================  =========  ==========

    "Unchanged" is the mask label that the corpus had, mostly none. The given box is kept, even where an edited mask
    goes beyond it, unless the reviewer moved the box itself. A changed class is taken over whatever the verdict.

    Raises:
        InputError: no such review; the shards are gone or are others; the output exists; a class that is unknown.
    """
    storage.check(config.out, config.shards)
    if storage.exists(config.out) and not config.overwrite:
        raise InputError("--out", f"{storage.redact(config.out)} exists", "Give another path, or `--overwrite`.")
    dataset, info = _open(config.dataset)
    uri = config.shards or info["shards"]
    storage.check_readable(uri, "--shards")
    shards = storage.read_manifest(uri, "shards")
    if shards.hash != info["shards_hash"]:
        value = f"{storage.redact(uri)} has hash {shards.hash}, the review {info['shards_hash']}"
        raise InputError("--shards", value, "Give the shards that were reviewed.")
    judged, drawn = _judge(dataset)

    ids = {category.name: category.id for category in shards.categories}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    reclassified = dropped = 0
    for row in _rows(uri, shards):
        image, entries = coco.from_row(row, shards.categories)
        images.append(image)
        for entry in entries:
            said = judged.pop(entry["id"], Judged("unreviewed"))
            outcomes[str(said.outcome)] += 1
            reclassified += said.label is not None
            if said.outcome == "deleted" and config.drop_deleted:
                dropped += 1
            else:
                annotations.append(_apply(entry, said, (row["height"], row["width"]), ids))
    if judged:
        raise RuntimeError(f"{len(judged)} reviewed annotations are not in the shards, the first is {min(judged)}")
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    number = max((entry["id"] for entry in annotations), default=0)
    for k, (image_id, said) in enumerate(drawn, start=1):
        entry = {"id": number + k, "image_id": image_id, "iscrowd": 0}
        annotations.append(_apply(entry, said, sizes[image_id], ids) | {"review": "drawn"})
    coco.write(config.out, shards.categories, images, annotations)

    masks = sum("segmentation" in entry for entry in annotations)
    counts = dict(outcomes)
    return Feedback(config.out, len(images), len(annotations), masks, counts, reclassified, len(drawn), dropped)


def _open(name: str) -> tuple[Any, dict[str, Any]]:
    """The review of that name, and what it was made from."""
    mongo.connect()
    # Late: FiftyOne takes ten seconds to import, and must find the database's address set.
    import fiftyone as fo  # noqa: PLC0415

    if not fo.dataset_exists(name):
        known = ", ".join(fo.list_datasets()) or "none"
        raise InputError(
            "--dataset", f"no dataset {name!r}; there are: {known}", "Run `boxinst review`, or correct it."
        )
    dataset = fo.load_dataset(name)
    return dataset, check_info(dataset.info.get(INFO), name)


def _rows(uri: str, shards: Manifest) -> Iterator[Mapping[str, Any]]:
    """The rows of the shards without the images' bytes."""
    columns = [name for name in SHARD_SCHEMA.names if name != "image"]
    for table in storage.row_groups(uri, shards, columns):
        yield from table.to_pylist()


def _judge(dataset: Any) -> tuple[dict[int, Judged], list[tuple[int, Judged]]]:
    """What the review says, by annotation id; and the labels drawn in the App, with their image ids."""
    judged: dict[int, Judged] = {}
    drawn: list[tuple[int, Judged]] = []
    fields = ["image_id", "metadata.width", "metadata.height", f"{GIVEN}.detections", f"{MASKS}.detections"]
    for image_id, width, height, given, labels in zip(*dataset.values(fields), strict=True):
        boxes = {box.annotation_id: box for box in given or []}
        judged |= {number: Judged("deleted") for number in boxes}
        seen: set[int] = set()
        for label in labels or []:
            number = getattr(label, "annotation_id", None)
            if number is not None and number in boxes and number not in seen:
                seen.add(number)
                judged[number] = _of_box(boxes[number], label, width, height)
            elif strictest(label.tags) != "reject":  # drawn, or a copy of another label
                drawn.append((image_id, _of_drawn(label, width, height)))
    return judged, drawn


def _of_box(box: Any, label: Any, width: int, height: int) -> Judged:
    edited = digest(label.mask) != box.shown_mask
    # Brushing draws the box anew around the mask; only a box that changed alone was moved by the reviewer.
    moved = not edited and list(label.bounding_box) != list(box.shown_box)
    mask = _encode(label, width, height)
    verdict = strictest([*label.tags, *box.tags])  # who meant the mask may have clicked on the box around it
    result = outcome(verdict, edited=edited, moved=moved, masked=mask is not None)
    return Judged(
        result,
        label.label if label.label != box.label else None,
        pixels(label.bounding_box, width, height) if moved else None,
        mask if result in LABELLED else None,
    )


def _of_drawn(label: Any, width: int, height: int) -> Judged:
    mask = _encode(label, width, height)
    box = pixels(label.bounding_box, width, height) if mask is None else rle.extent([mask], height, width)[0].tolist()
    return Judged(None, label.label or "", box, mask)


def _encode(label: Any, width: int, height: int) -> bytes | None:
    """RLE of a label's mask in the image's pixels; None where it covers none."""
    if label.mask is None:
        return None
    mask: NDArray[np.bool_] = paste(label.mask, label.bounding_box, width, height)
    return rle.encode(torch.from_numpy(mask)[None])[0] if mask.any() else None


def _apply(entry: dict[str, Any], said: Judged, size: tuple[int, int], categories: Mapping[str, int]) -> dict[str, Any]:
    """An annotation as the review leaves it.

    Args:
        entry: COCO's entry.
        said: of it.
        size: height and width of the image.
        categories: id of each class name.
    """
    entry = dict(entry)
    if said.label is not None:
        if said.label not in categories:
            item = f"annotation {entry['id']}" if said.outcome else f"label drawn on image {entry['image_id']}"
            raise InputError(item, f"class {said.label!r}", f"Correct it in the App to one of {', '.join(categories)}.")
        entry["category_id"] = categories[said.label]
    if said.box is not None:
        x1, y1, x2, y2 = said.box
        entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        if "segmentation" not in entry:
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    if said.mask is not None:
        entry["segmentation"] = {"size": list(size), "counts": said.mask.decode()}
        entry["area"] = float(rle.area([said.mask], *size)[0])
    if said.outcome not in (None, "unreviewed"):
        entry["review"] = said.outcome
    return entry
