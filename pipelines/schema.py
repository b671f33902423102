"""The artefacts between the stages: their columns, their versions and their manifests. Spelled here only.

An artefact is a directory: Parquet files, rejects, and a ``manifest.json`` that is written last, so that a
directory without one is unfinished. Its hash names the content.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from boxinst.errors import InputError

SCHEMA_VERSION = 1
"""Raised when a reader of the old version could misread the new one."""

MANIFEST = "manifest.json"

BOX = pa.list_(pa.float32(), 4)

SHARD_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("image", pa.binary()),  # the file's bytes as they were
        ("width", pa.int32()),
        ("height", pa.int32()),
        # One entry per box; the lists of a row are equally long.
        ("annotation_ids", pa.list_(pa.int64())),
        ("boxes", pa.list_(BOX)),  # xyxy pixels
        ("labels", pa.list_(pa.int32())),  # index into the manifest's categories
        ("masks", pa.list_(pa.binary())),  # COCO compressed RLE counts at height x width, or null
        ("crowd", pa.list_(pa.bool_())),
    ]
)
"""One row per image."""

MASK_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.int32()),
        ("box", BOX),  # xyxy pixels, as given
        ("mask", pa.binary()),  # COCO compressed RLE counts at height x width; null unless status is ok
        ("score", pa.float32()),
        # Mask-box consistency: see boxinst.metrics.mask_box_consistency.
        ("box_iou", pa.float32()),
        ("spill", pa.float32()),
        ("fill", pa.float32()),
        ("status", pa.string()),  # "ok", or "empty", or "error: <reason>"
        ("model", pa.string()),  # "name/version", or the folder's name
    ]
)
"""One row per given box."""

REJECT_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # "image", "box", or "mask" (the box is kept, its mask label is not)
        ("action", pa.string()),  # "rejected" or "clipped"
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),  # null for an image
        ("file_name", pa.string()),
        ("reason", pa.string()),
        ("value", pa.string()),
    ]
)
"""One row per image or box that was rejected or changed."""


@dataclass
class Category:
    """A class of the corpus; its position in the manifest is the label index."""

    id: int
    """The id that the corpus gives it."""
    name: str


@dataclass
class File:
    """One Parquet file of an artefact, or one COCO file of pieces."""

    path: str
    """Relative to the artefact's directory."""
    rows: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """What an artefact holds."""

    kind: Literal["shards", "masks", "pieces"]
    categories: list[Category]
    files: list[File]
    counts: dict[str, int]
    """Reconciled counts, for example images, boxes, rejected_images, rejected_boxes, clipped_boxes."""
    source: dict[str, Any] = field(default_factory=dict)
    """What it was made from: paths, the hash of the shards, the model."""
    schema_version: int = SCHEMA_VERSION
    exif: Literal["stored", "applied"] = "stored"
    """Whether boxes refer to the pixels as stored in the file or as turned by the EXIF orientation."""

    @property
    def hash(self) -> str:
        """Hex digest of the content: files, categories and orientation, not of where they came from."""
        content: list[Any] = [self.kind, self.schema_version, self.exif, [asdict(c) for c in self.categories]]
        content.append([(f.sha256, f.rows) for f in self.files])
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The manifest as the text of ``manifest.json``."""
        return json.dumps({**asdict(self), "hash": self.hash}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, path: str, kind: str | None = None) -> Manifest:
        """Inverse of ``to_json``.

        Args:
            text: content of a ``manifest.json``.
            path: where it was read, for the error.
            kind: the kind of artefact wanted, where only one will do.

        Raises:
            InputError: not a manifest, of another kind, or written by a newer version.
        """
        try:
            data = json.loads(text)
            version = int(data["schema_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(path, f"not a manifest ({error!r})", "Write the artefact again.") from error
        if version > SCHEMA_VERSION:
            raise InputError(
                path,
                f"schema version {version}, this program reads up to {SCHEMA_VERSION}",
                "Upgrade boxinst, or write the artefact again with this version.",
            )
        if kind is not None and data["kind"] != kind:
            remedy = {"shards": "Run `boxinst shard` and give its output.", "masks": "Run `boxinst segment`."}
            raise InputError(path, f"holds {data['kind']}, wanted {kind}", remedy.get(kind, ""))
        stated = data.pop("hash", None)
        data["categories"] = [Category(**c) for c in data["categories"]]
        data["files"] = [File(**f) for f in data["files"]]
        manifest = cls(**data)
        if stated not in (None, manifest.hash):
            raise InputError(path, f"hash {stated} does not match its content {manifest.hash}", "Write it again.")
        return manifest
