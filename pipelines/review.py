"""Mask rows as a FiftyOne dataset for people to judge: the least consistent masks and a random sample of all.

A label of the dataset is *touched* when a reviewer has given it a verdict, brushed its mask, moved its box, changed its
class or deleted it. What is touched is never changed by this stage; every other label shows the latest mask rows.
"""

from __future__ import annotations

import math
import signal
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from boxinst import rle
from boxinst.errors import InputError
from pipelines import mongo, storage
from pipelines.config import ReviewConfig
from pipelines.schema import Manifest
from pipelines.selection import Selection, media, read_rows, select
from pipelines.verdicts import (
    GIVEN,
    INFO,
    INFO_VERSION,
    MASKS,
    UNSEGMENTED,
    VERDICTS,
    Verdict,
    check_info,
    crop,
    digest,
    relative,
    strictest,
)

IMAGES_AT_ONCE = 200
"""Images that are written to the database together."""

START_SECONDS = 300
"""How long the App's server may take to listen."""


@dataclass(frozen=True)
class Review:
    """What a run has done."""

    dataset: str
    images: int
    """In the dataset now."""
    boxes: int
    """In the dataset now."""
    of: int
    """Boxes that the mask rows hold."""
    added: int
    updated: int
    """Untouched labels that show other mask rows than before."""
    kept: int
    """Touched labels."""
    verdicts: dict[str, int]
    """Number of labels per verdict."""

    def __str__(self) -> str:
        said = ", ".join(f"{number} {verdict}" for verdict, number in self.verdicts.items())
        return (
            f"review {self.dataset!r}: {self.boxes} of {self.of} boxes on {self.images} images "
            f"({self.added} added, {self.updated} updated, {self.kept} touched and left alone; verdicts: {said})"
        )


def run(config: ReviewConfig) -> Review:
    """Create the dataset or bring it up to date; with ``app``, open it and block until Ctrl-C.

    Running it twice changes nothing. Labels once in the dataset stay there whatever is selected later.

    Raises:
        InputError: an artefact is missing, newer than this program, or does not belong to the other; the dataset holds
            something else; the port is taken; or no database can be had.
    """
    storage.check(config.shards, config.masks)
    shards = storage.read_manifest(config.shards, "shards")
    masks = storage.read_manifest(config.masks, "masks")
    _check_match(config, shards, masks)
    if config.app:
        _check_port(config.address, config.port)
    selection = select(config.masks, masks, limit=config.limit, audit=config.audit, seed=config.seed)
    dataset = _open(config, shards, masks)
    review = _fill(dataset, config, shards, masks, selection)
    _save_views(dataset, anew=bool(review.added or review.updated))
    _set_label_schema(dataset, [c.name for c in shards.categories])
    if config.app:
        print(review, flush=True)
        _serve(dataset, config)
        review = replace(review, verdicts=verdicts(dataset))
    return review


def _check_match(config: ReviewConfig, shards: Manifest, masks: Manifest) -> None:
    made_from = masks.source.get("shards_hash")
    if made_from != shards.hash or masks.categories != shards.categories:
        value = f"{storage.redact(config.shards)} has hash {shards.hash}, the masks were made from {made_from}"
        raise InputError("--shards", value, "Give the shards that `boxinst segment` read, or segment these.")


@cache
def _fiftyone() -> Any:
    """FiftyOne, connected. Imported late: it takes ten seconds, and must find the database's address set."""
    mongo.connect()
    import fiftyone  # noqa: PLC0415

    return fiftyone


# --- the dataset ----------------------------------------------------------------------------------------------------


def _open(config: ReviewConfig, shards: Manifest, masks: Manifest) -> Any:
    """The dataset, made if it is new."""
    fo = _fiftyone()
    if fo.dataset_exists(config.dataset):
        dataset = fo.load_dataset(config.dataset)
        info = check_info(dataset.info.get(INFO), config.dataset)
        if info["shards_hash"] != shards.hash:
            value = f"{config.dataset!r} reviews the shards {info['shards_hash']}, these are {shards.hash}"
            raise InputError("--dataset", value, "Give another name for the review of other shards.")
    else:
        dataset = fo.Dataset(config.dataset, persistent=True)
        dataset.add_sample_field("image_id", fo.IntField)
        dataset.add_sample_field("file_name", fo.StringField)
        for field in (MASKS, GIVEN):
            dataset.add_sample_field(field, fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
            dataset.add_sample_field(f"{field}.detections.annotation_id", fo.IntField)
        for name in ("box_iou", "spill", "fill"):
            dataset.add_sample_field(f"{MASKS}.detections.{name}", fo.FloatField)
        for name in ("status", "model"):
            dataset.add_sample_field(f"{MASKS}.detections.{name}", fo.StringField)
        dataset.add_sample_field(f"{MASKS}.detections.audit", fo.BooleanField)
        dataset.add_sample_field(f"{GIVEN}.detections.shown_box", fo.ListField, subfield=fo.FloatField)
        dataset.add_sample_field(f"{GIVEN}.detections.shown_mask", fo.StringField)
        colors = [{"path": MASKS, "fieldColor": "#ff2fd0"}, {"path": GIVEN, "fieldColor": "#ffe119"}]
        dataset.app_config.color_scheme = fo.ColorScheme(color_by="field", opacity=0.5, fields=colors)
        # The given boxes are a click away: were they shown, a click on a mask would often take the box around it.
        dataset.app_config.active_fields = fo.ActiveFields(paths=[MASKS])
    made_from = {
        "version": INFO_VERSION,
        "shards": storage.absolute(config.shards),
        "shards_hash": shards.hash,
        "masks": storage.absolute(config.masks),
        "masks_hash": masks.hash,
        "model": masks.source.get("model"),
    }
    if dataset.info.get(INFO) != made_from:
        dataset.info[INFO] = made_from
        dataset.save()
    return dataset


def _fill(dataset: Any, config: ReviewConfig, shards: Manifest, masks: Manifest, selection: Selection) -> Review:
    """Write the labels of the chosen annotations, and of those the dataset has already."""
    present = {
        image_id: (sample, file, given or [], labels or [])
        for sample, image_id, file, given, labels in zip(
            *dataset.values(["id", "image_id", "filepath", f"{GIVEN}.detections", f"{MASKS}.detections"]), strict=True
        )
    }
    known = [g.annotation_id for _, _, given, _ in present.values() for g in given]
    rows = read_rows(config.masks, masks, np.union1d(selection.ids, np.array(known, dtype=np.int64)))
    names, sampled = [c.name for c in shards.categories], set(selection.audit.tolist())
    added = updated = kept = 0

    changed: dict[str, tuple[list[Any], list[Any]]] = {}
    for image_id in rows.keys() & present.keys():
        sample, _, given, labels = present[image_id]
        before = added, updated
        done = _merge(given, labels, [_label(row, names, sampled) for row in rows[image_id]])
        added, updated, kept = added + done[0], updated + done[1], kept + done[2]
        if (added, updated) != before:
            changed[sample] = given, labels
    if changed:
        view = dataset.select(list(changed), ordered=True)
        for field, which in ((GIVEN, 0), (MASKS, 1)):
            view.set_values(field, [_fiftyone().Detections(detections=lists[which]) for lists in changed.values()])

    moved: dict[str, str] = {}
    wanted = {i for i in rows if i not in present or not Path(present[i][1]).is_file()}
    samples: list[Any] = []
    with tqdm(total=len(wanted), desc="review", unit=" images", disable=not wanted) as progress:
        for image_id, file in media(config.shards, shards, wanted):
            if image_id in present:
                moved[present[image_id][0]] = file
            else:
                pairs = [_label(row, names, sampled) for row in rows[image_id]]
                samples.append(_sample(rows[image_id][0], file, pairs))
                added += len(pairs)
            progress.update()
            if len(samples) == IMAGES_AT_ONCE:
                dataset.add_samples(samples, progress=False)
                samples = []
        if samples:
            dataset.add_samples(samples, progress=False)
        if progress.n != len(wanted):
            value = f"{len(wanted) - progress.n} images of the mask rows are not in {storage.redact(config.shards)}"
            raise InputError("--shards", value, "Give the shards that `boxinst segment` read.")
    if moved:
        dataset.set_values("filepath", moved, key_field="id")
    boxes = dataset.count(f"{GIVEN}.detections")
    return Review(config.dataset, len(dataset), boxes, selection.total, added, updated, kept, verdicts(dataset))


def _label(row: Mapping[str, Any], names: Sequence[str], sampled: set[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of the given box and of the mask label that show a mask row."""
    width, height, box = row["width"], row["height"], row["box"]
    shown, mask = box, None
    if row["mask"] is not None:
        shown, mask = crop(rle.decode([row["mask"]], height, width)[0].numpy(), box)
    bounding_box = relative(shown, width, height)
    common = {"label": names[row["label"]], "annotation_id": row["annotation_id"]}
    given = {"bounding_box": relative(box, width, height), "shown_box": bounding_box, "shown_mask": digest(mask)}
    label = {
        "bounding_box": bounding_box,
        "mask": mask,
        "confidence": _number(row["score"]),
        **{name: _number(row[name]) for name in ("box_iou", "spill", "fill")},
        "status": row["status"],
        "model": row["model"],
        "audit": row["annotation_id"] in sampled,
        "tags": [] if row["status"] == "ok" else [UNSEGMENTED],
    }
    return common | given, common | label


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _sample(row: Mapping[str, Any], file: str, pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> Any:
    fo = _fiftyone()
    given, labels = zip(*pairs, strict=True)
    return fo.Sample(
        filepath=file,
        image_id=row["image_id"],
        file_name=row["file_name"],
        metadata=fo.ImageMetadata(width=row["width"], height=row["height"]),
        **{
            GIVEN: fo.Detections(detections=[fo.Detection(**fields) for fields in given]),
            MASKS: fo.Detections(detections=[fo.Detection(**fields) for fields in labels]),
        },
    )


def _merge(given: list[Any], labels: list[Any], pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[int, ...]:
    """Bring the labels of an image up to date, in place. Returns how many were added, updated, and left as touched."""
    fo = _fiftyone()
    boxes = {g.annotation_id: g for g in given}
    current = {label.annotation_id: label for label in labels}
    added = updated = kept = 0
    for box_fields, label_fields in pairs:
        box, label = boxes.get(box_fields["annotation_id"]), current.get(box_fields["annotation_id"])
        if box is None:
            given.append(fo.Detection(**box_fields))
            labels.append(fo.Detection(**label_fields))
            added += 1
        elif label is None or _touched(box, label):
            kept += 1
        else:
            own = [tag for tag in label.tags if tag != UNSEGMENTED]
            fields = label_fields | {"tags": own + label_fields["tags"]}
            same = box.shown_mask == box_fields["shown_mask"] and all(
                getattr(label, name, None) == value for name, value in fields.items() if name != "mask"
            )
            if not same:
                for target, values in ((box, box_fields), (label, fields)):
                    for name, value in values.items():
                        target[name] = value
                updated += 1
    return added, updated, kept


def _touched(box: Any, label: Any) -> bool:
    return (
        strictest([*label.tags, *box.tags]) is not None
        or label.label != box.label
        or list(label.bounding_box) != list(box.shown_box)
        or digest(label.mask) != box.shown_mask
    )


# --- the App --------------------------------------------------------------------------------------------------------


def _save_views(dataset: Any, *, anew: bool) -> None:
    """Save what a reviewer looks at. ``anew`` is for labels that have changed: tiles are made when they are saved.

    The queues and the random sample show one mask per tile; the others show images, and follow the verdicts.
    """
    fo = _fiftyone()
    F = fo.ViewField
    views = {
        "accepted": dataset.filter_labels(MASKS, F("tags").contains("accept")),
        "rejected": dataset.filter_labels(MASKS, F("tags").contains("reject")),
        "to fix": dataset.filter_labels(MASKS, F("tags").contains("fix")),
    }
    for name in sorted(dataset.distinct(f"{GIVEN}.detections.label")):
        views[f"class {name}"] = dataset.filter_labels(MASKS, F("label") == name)
    existing = set(dataset.list_saved_views())
    if anew or "worst first" not in existing:
        drawn = dataset.filter_labels(MASKS, F("audit") == True)  # noqa: E712  # an expression, not a comparison
        orders = {"worst first": (dataset, "box_iou"), "lowest score first": (dataset, "confidence")}
        for name, (labels, by) in {**orders, "audit sample": (drawn, "box_iou")}.items():
            dataset.save_view(name, labels.to_patches(MASKS).sort_by(f"{MASKS}.{by}"), overwrite=True)
    for name, view in views.items():
        if name not in existing:
            dataset.save_view(name, view)


def _set_label_schema(dataset: Any, classes: Sequence[str]) -> None:
    """Let the Annotate tab change the class, the mask and the verdict of a label, and show the rest."""
    if MASKS in dataset.label_schemas:
        return
    schema = dataset.generate_label_schemas(fields=[MASKS], scan_samples=False)
    shown = ("annotation_id", "box_iou", "spill", "fill", "confidence", "status", "model")
    attributes = {a["name"]: a for a in schema[MASKS]["attributes"]}
    tags = {"name": "tags", "type": "list<str>", "component": "checkboxes", "values": [*VERDICTS, UNSEGMENTED]}
    schema[MASKS] |= {
        "attributes": [tags, *({**attributes[name], "read_only": True} for name in shown)],
        "classes": list(classes),
        "component": "radio" if len(classes) <= 5 else "dropdown",
    }
    dataset.set_label_schemas(schema)
    dataset.activate_label_schemas(MASKS)


def _check_port(address: str, port: int) -> None:
    """FiftyOne would silently show whatever answers at that port.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            value = f"{address}:{port} cannot be used ({error.strerror})"
            raise InputError("--port", value, "Give another port.") from error


def _serve(dataset: Any, config: ReviewConfig) -> None:
    """Open the App and block until Ctrl-C."""
    from fiftyone.core.service import ServerService  # noqa: PLC0415  # late, as in _fiftyone

    class PatientServer(ServerService):
        """FiftyOne's server as `launch_app` starts it, which gives up after a minute: too early on a busy machine."""

        def _wait_for_child_port(self, port: int | None = None, timeout: int = START_SECONDS) -> int:
            return super()._wait_for_child_port(port, timeout)

    server = PatientServer(config.port, address=config.address, do_not_track=True)
    print(f"Review at http://{config.address}:{config.port}/datasets/{dataset.slug} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's stop is a Ctrl-C too
    try:
        server.wait()
    except KeyboardInterrupt:
        print("Verdicts and edits are kept in the database.", flush=True)
    finally:
        server.stop()


# --- verdicts -------------------------------------------------------------------------------------------------------


def verdicts(dataset: Any) -> dict[str, int]:
    """Number of boxes per verdict. Of several verdicts the strictest counts; one on the given box is as good."""
    tags: dict[int, list[str]] = defaultdict(list)
    for field in (MASKS, GIVEN):
        values = dataset.values([f"{field}.detections.annotation_id", f"{field}.detections.tags"])
        for numbers, lists in zip(*values, strict=True):
            for number, own in zip(numbers or (), lists or (), strict=True):
                tags[number] += own
    said = [strictest(own) for own in tags.values()]
    return {verdict: said.count(verdict) for verdict in VERDICTS}


def tag(dataset: str, said: Mapping[int, Verdict]) -> None:
    """Give verdicts as a reviewer would, replacing earlier ones.

    Args:
        dataset: name of the review.
        said: verdict per annotation id.

    Raises:
        InputError: no such review, a verdict that does not exist, or an annotation that is not in the review.
    """
    fo = _fiftyone()
    if not fo.dataset_exists(dataset):
        known = ", ".join(fo.list_datasets()) or "none"
        raise InputError("--dataset", f"no dataset {dataset!r}, there are: {known}", "Run `boxinst review` first.")
    reviewed = fo.load_dataset(dataset)
    values = reviewed.values([f"{MASKS}.detections.annotation_id", f"{MASKS}.detections.id"], unwind=True)
    labels = dict(zip(*values, strict=True))
    for annotation, verdict in said.items():
        if verdict not in VERDICTS:
            raise InputError(f"annotation {annotation}", f"verdict {verdict!r}", f"Give one of {', '.join(VERDICTS)}.")
        if annotation not in labels:
            raise InputError(f"annotation {annotation}", f"not in the review {dataset!r}", "Raise its --limit.")
    chosen = reviewed.select_labels(ids=[labels[a] for a in said], fields=MASKS)
    chosen.untag_labels(list(VERDICTS), label_fields=MASKS)
    for verdict in VERDICTS:
        ids = [labels[a] for a, v in said.items() if v == verdict]
        if ids:
            reviewed.select_labels(ids=ids, fields=MASKS).tag_labels(verdict, label_fields=MASKS)
