"""A COCO corpus, its JSON and its images, becomes Parquet shards in which every image and box is accounted for."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import ray.data

from boxinst.errors import InputError
from pipelines import claims, cluster, coco, images, observe, storage
from pipelines.coco import Annotation, Corpus, ImageEntry
from pipelines.config import ShardConfig
from pipelines.schema import REJECT_SCHEMA, SHARD_SCHEMA, File, Manifest

REJECTS = "rejects.parquet"

ROW_GROUP_BYTES = 16 << 20
"""Image bytes of a row group: what a task holds in memory at a time."""

READ_AHEAD = 16
"""Images that a task reads at the same time; S3 answers late but many at once."""

_PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("bytes", pa.int64()),  # of the file, as it was listed
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("annotations", pa.large_string()),  # JSON of Annotation's fields
    ]
)

_DONE_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("file", pa.string()),  # JSON of File's fields, null when every image of the shard was rejected
        ("counts", pa.string()),  # JSON
        ("rejects", pa.list_(pa.struct(list(REJECT_SCHEMA)))),
    ]
)


def run(config: ShardConfig) -> Manifest:
    """Write the shards, the rejects beside them, and the manifest last.

    The same input gives the same files. A finished output of the same inputs is left as it is; a killed run is done
    again from the start.

    Returns:
        The manifest. Its counts reconcile: entered = kept + rejected, for images and boxes.

    Raises:
        InputError: something about the inputs, the storage or the output folder that its owner has to change.
    """
    storage.check(config.annotations, config.images, config.output)
    with claims.held(config.output, "--out") as claim:
        return _run(config, claim)


def _run(config: ShardConfig, claim: claims.Claim) -> Manifest:
    """See ``run``; the output is claimed."""
    storage.check_readable(config.annotations, "--annotations")
    storage.check_readable(config.images, "--images")
    data = storage.read_bytes(config.annotations)
    corpus = coco.parse(data, storage.redact(config.annotations))
    files = _match(corpus, config)
    source = {
        "annotations": storage.absolute(config.annotations),
        "annotations_sha256": hashlib.sha256(data).hexdigest(),
        "images": storage.absolute(config.images),
        "images_sha256": _fingerprint(files),
        "target_mb": config.target_mb,
        "exif": config.exif,
    }
    finished = storage.ensure_output(config.output, "shards", source, overwrite=config.overwrite)
    if finished is not None:
        print(f"{config.output} holds the shards of these inputs already: nothing to do.", file=sys.stderr)
        return finished
    storage.clear(config.output, keep=[storage.CLAIM])  # what a killed run has left
    done = _write_shards(corpus, files, config)
    manifest = _reconcile(corpus, done, config, source)
    claim.check()
    storage.write_manifest(config.output, manifest)
    return manifest


def _match(corpus: Corpus, config: ShardConfig) -> dict[str, storage.Entry]:
    """The files that the corpus names, by name; images without one move to the rejects."""
    wanted = {entry.file_name for entry in corpus.images}
    listing: dict[str, storage.Entry] = {}
    other = ""
    for name, about in storage.walk(config.images):  # the folder may hold many more than the corpus
        if name in wanted:
            listing[name] = about
        else:
            other = min(other, name) if other else name
    missing = [entry for entry in corpus.images if entry.file_name not in listing]
    if len(missing) == len(corpus.images):
        example = f", which holds {other}" if other else ", which is empty"
        named = f"the {len(missing)} images of the JSON ({missing[0].file_name})" if missing else "any image"
        raise InputError(
            "--images",
            f"no file of {named} in {storage.redact(config.images)}{example}",
            "Give the folder that the JSON's file_name is relative to.",
        )
    for entry in missing:
        corpus.rejects.append(_reject_image(entry, "missing file", entry.file_name))
        corpus.rejects += coco.reject_annotations(entry, "missing file")
    corpus.images = [entry for entry in corpus.images if entry.file_name in listing]
    return {entry.file_name: listing[entry.file_name] for entry in corpus.images}


def _fingerprint(files: dict[str, storage.Entry]) -> str:
    """Changes when an image is added, removed or written again."""
    content = [(name, info.size, info.mtime_ns) for name, info in sorted(files.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _plan(corpus: Corpus, files: dict[str, storage.Entry], target: int) -> list[pa.Table]:
    """One table per shard: its images, in the order of their ids, until ``target`` bytes are reached."""
    shards: list[list[dict[str, Any]]] = [[]]
    size = 0
    for entry in corpus.images:
        if shards[-1] and size + files[entry.file_name].size > target:
            shards.append([])
            size = 0
        size += files[entry.file_name].size
        row = {"image_id": entry.id, "file_name": entry.file_name, "width": entry.width, "height": entry.height}
        row["bytes"] = files[entry.file_name].size
        row["annotations"] = json.dumps([asdict(a) for a in entry.annotations])
        shards[-1].append({"shard": len(shards) - 1, **row})
    return [pa.Table.from_pylist(rows, schema=_PLAN_SCHEMA) for rows in shards]


def _write_shards(corpus: Corpus, files: dict[str, storage.Entry], config: ShardConfig) -> list[dict[str, Any]]:
    """Run one task per shard and return their rows of ``_DONE_SCHEMA``, in order."""
    cluster.start()
    observe.count("shard", rejects=len(corpus.rejects))
    plan = _plan(corpus, files, config.target_mb << 20)
    labels = {category.id: label for label, category in enumerate(corpus.categories)}
    task = {"images_uri": config.images, "out": config.output, "exif": config.exif, "labels": labels}
    shards = ray.data.from_arrow(plan).map_batches(
        _write_shard, batch_size=None, batch_format="pyarrow", fn_kwargs=task
    )
    try:
        out = config.output
        with (
            storage.explained(out),
            observe.progress("shard", lambda: len(storage.list_files(out)) - 1, len(plan), "shards"),
        ):
            done = shards.take_all()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    done.sort(key=lambda row: row["shard"])
    if [row["shard"] for row in done] != list(range(len(plan))):
        raise RuntimeError(f"{len(plan)} shards were planned, {[row['shard'] for row in done]} written")
    return done


def _write_shard(plan: pa.Table, *, images_uri: str, out: str, exif: images.Exif, labels: dict[int, int]) -> pa.Table:
    """Read and check the images of one shard and write its file. A task of Ray Data.

    Args:
        plan: one table of ``_plan``, whole.
        images_uri: folder of the images.
        out: folder of the shards.
        exif: which pixels the boxes refer to.
        labels: label of each category id.

    Returns:
        One row of ``_DONE_SCHEMA``.
    """
    number = plan["shard"][0].as_py()
    rejects: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()

    def tables() -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        size = 0
        for entry, data in _read_images(plan, images_uri):
            try:
                if isinstance(data, ValueError):
                    raise data
                frame = _check(entry, data, exif)
            except ValueError as error:
                reason, _, value = str(error).partition(": ")
                rejects.append(_reject_image(entry, reason, value))
                rejects.extend(coco.reject_annotations(entry, reason))
                continue
            row, problems = coco.to_row(entry, data, frame, labels)
            rejects.extend(problems)
            rows.append(row)
            counts.update(_counts(row))
            size += len(data)
            if size >= ROW_GROUP_BYTES:
                yield pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
                rows, size = [], 0
        if rows:
            yield pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)

    groups = tables()
    first = next(groups, None)
    file = None
    if first is not None:
        path = storage.join(out, f"shard-{number:05d}.parquet")
        file = json.dumps(asdict(storage.write_parquet(path, itertools.chain([first], groups), SHARD_SCHEMA)))
    observe.count("shard", images=counts["images"], boxes=counts["boxes"], rejects=len(rejects))
    done = {"shard": number, "file": file, "counts": json.dumps(counts), "rejects": rejects}
    return pa.Table.from_pylist([done], schema=_DONE_SCHEMA)


def _read_images(plan: pa.Table, images_uri: str) -> Iterator[tuple[ImageEntry, bytes | ValueError]]:
    """Every image of a plan with its file's bytes, or with the reason why there are none."""

    def read(row: dict[str, Any]) -> bytes | ValueError:
        name = row["file_name"]
        try:
            return storage.read_bytes(storage.join(images_uri, name), row["bytes"])
        except FileNotFoundError:
            return ValueError(f"missing file: {name}")
        except InputError as error:
            if storage.is_s3(images_uri):  # the storage is at fault, not this image
                raise
            return ValueError(f"unreadable image: {error.value}")

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for batch in plan.to_batches(max_chunksize=READ_AHEAD):
            rows = batch.to_pylist()
            for row, data in zip(rows, pool.map(read, rows), strict=True):
                boxes = [Annotation(**item) for item in json.loads(row["annotations"])]
                yield ImageEntry(row["image_id"], row["file_name"], row["width"], row["height"], boxes), data


def _check(entry: ImageEntry, data: bytes, exif: images.Exif) -> tuple[int, int]:
    """Width and height of an image that decodes and is as large as the JSON says.

    Raises:
        ValueError: ``reason: value``.
    """
    try:
        height, width = images.decode(data, exif=exif).shape[:2]
    except ValueError as error:
        raise ValueError(f"unreadable image: {error}") from error
    said = (width if entry.width is None else entry.width, height if entry.height is None else entry.height)
    if said != (width, height):
        hint = ""
        other: images.Exif = "applied" if exif == "stored" else "stored"
        if images.size(data, exif=other) == said:
            hint = f"; it agrees with --exif {other}"
        value = f"{said[0]}x{said[1]} in the JSON, {width}x{height} in the file{hint}"
        raise ValueError(f"size disagrees with the JSON: {value}")
    return width, height


def _reject_image(entry: ImageEntry, reason: str, value: str) -> dict[str, Any]:
    return coco.reject("image", reason, value, image_id=entry.id, file_name=entry.file_name)


def _counts(row: dict[str, Any]) -> dict[str, int]:
    return {
        "images": 1,
        "images_without_boxes": int(not row["boxes"]),
        "boxes": len(row["boxes"]),
        "masks": sum(mask is not None for mask in row["masks"]),
    }


def _reconcile(corpus: Corpus, done: list[dict[str, Any]], config: ShardConfig, source: dict[str, Any]) -> Manifest:
    """Write the rejects and build the manifest, once entered = kept + rejected holds.

    Raises:
        InputError: no image is left.
        RuntimeError: the sums disagree, which is a defect of this program.
    """
    rejects = corpus.rejects + [reject for row in done for reject in row["rejects"]]
    rejects.sort(key=lambda r: (r["kind"], r["image_id"] or 0, r["annotation_id"] or 0, r["reason"], r["value"]))
    kept: Counter[str] = Counter()
    for row in done:
        kept.update(json.loads(row["counts"]))
    if not kept["images"]:
        bad = [r for r in rejects if r["kind"] == "image"]
        reasons = Counter(r["reason"] for r in bad)
        value = f"none of {corpus.entered_images} can be used: " + ", ".join(f"{n} {r}" for r, n in reasons.items())
        raise InputError("--images", value, f"The first: {bad[0]['file_name']}: {bad[0]['value']}.")
    how = Counter((r["kind"], r["action"]) for r in rejects)
    counts = {name: kept[name] for name in ("images", "images_without_boxes", "boxes", "masks")}
    counts |= {
        "entered_images": corpus.entered_images,
        "entered_boxes": corpus.entered_boxes,
        "rejected_images": how["image", "rejected"],
        "rejected_boxes": how["box", "rejected"],
        "rejected_masks": how["mask", "rejected"],
        "clipped_boxes": how["box", "clipped"],
    }
    for what in ("images", "boxes"):
        if counts[f"entered_{what}"] != counts[what] + counts[f"rejected_{what}"]:
            raise RuntimeError(f"{what} do not add up: {counts}")
    files = [File(**json.loads(row["file"])) for row in done if row["file"]]
    if sum(file.rows for file in files) != counts["images"]:
        raise RuntimeError(f"{sum(file.rows for file in files)} rows written for {counts['images']} images")
    table = pa.Table.from_pylist(rejects, schema=REJECT_SCHEMA)
    storage.write_parquet(storage.join(config.output, REJECTS), [table], REJECT_SCHEMA)
    return Manifest("shards", corpus.categories, files, counts, source, exif=config.exif)
