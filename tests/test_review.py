"""The review dataset: what it holds, that a second run changes nothing, and that what people did stays."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reviewing import HEIGHT, WIDTH, Artefacts, default_mask, write_masks, write_shards

from boxinst.errors import InputError
from pipelines import mongo, review, storage
from pipelines.review import ReviewConfig
from pipelines.verdicts import GIVEN, MASKS, UNSEGMENTED, paste

pytest_plugins = ["reviewing"]


@pytest.fixture
def config(artefacts: Artefacts) -> ReviewConfig:
    return ReviewConfig(artefacts.masks, artefacts.shards, dataset=f"review-{uuid.uuid4().hex}", audit=2)


def _load(name: str) -> Any:
    import fiftyone as fo

    dataset = fo.load_dataset(name)
    dataset.reload()
    return dataset


def _state(name: str) -> dict[str, Any]:
    """Everything in the database about a dataset, and its media."""
    import pymongo

    with pymongo.MongoClient[dict[str, Any]](os.environ[mongo.ADDRESS]) as client:
        database = client["fiftyone"]
        document = database["datasets"].find_one({"name": name})
        assert document is not None
        samples = list(database[document["sample_collection_name"]].find())
        views = list(database["views"].find({"_dataset_id": document["_id"]}))
    for volatile in ("last_loaded_at", "last_modified_at"):
        document.pop(volatile)
    for view in views:
        view.pop("last_loaded_at")
    return {"dataset": document, "samples": samples, "views": views}


def _labels(name: str) -> dict[int, Any]:
    return {label.annotation_id: label for sample in _load(name) for label in sample[MASKS].detections}


def test_the_dataset_shows_every_row(config: ReviewConfig) -> None:
    done = review.run(config)
    dataset = _load(config.dataset)
    assert (done.images, done.boxes, done.of, done.added) == (4, 8, 8, 8)
    assert dataset.persistent
    rows = {10 * image + k: default_mask(image, k) for image in range(4) for k in range(2)}
    for sample in dataset:
        assert Path(sample.filepath).name == sample.file_name == f"{sample.image_id:03}.png"
        given = {g.annotation_id: g for g in sample[GIVEN].detections}
        for label in sample[MASKS].detections:
            mask = rows.pop(label.annotation_id)
            x, y, w, h = given[label.annotation_id].bounding_box
            assert x * WIDTH % 1 == pytest.approx(0.5)  # as given, to the fraction
            assert label.model == "discs/1"
            assert label.label == "disc"
            if mask is None:
                assert label.mask is None
                assert label.tags == [UNSEGMENTED]
                assert label.status == "error: out of memory"
                assert label.bounding_box == [x, y, w, h]
                continue
            assert np.array_equal(paste(label.mask, label.bounding_box, WIDTH, HEIGHT), mask)
            assert 0 < label.box_iou <= 1
            image, disc = divmod(label.annotation_id, 10)
            assert label.confidence == pytest.approx(0.9 - 0.3 * disc + 0.01 * image)
            assert (label.spill > 0.1) == (label.annotation_id == 11)
            assert label.tags == []
    assert rows == {}


def test_running_twice_changes_nothing(config: ReviewConfig) -> None:
    review.run(config)
    review.tag(config.dataset, {0: "accept", 10: "reject"})
    before = _state(config.dataset)
    again = review.run(config)
    assert (again.added, again.updated, again.kept) == (0, 0, 2)
    assert again.verdicts == {"accept": 1, "reject": 1, "fix": 0}
    assert _state(config.dataset) == before


def test_a_newer_model_updates_only_what_nobody_touched(config: ReviewConfig, tmp_path: Path) -> None:
    review.run(config)
    review.tag(config.dataset, {0: "accept"})
    dataset = _load(config.dataset)
    by_image = {sample.image_id: sample for sample in dataset}
    brushed, renamed = by_image[1][MASKS].detections[0], by_image[2][MASKS].detections[0]
    brushed.mask = np.ones((300, 300), dtype=np.uint8)
    renamed.label = "square"
    moved = by_image[3][MASKS].detections[0]
    moved.bounding_box = [0.1, 0.1, 0.2, 0.2]
    del by_image[3][MASKS].detections[1]
    for sample in by_image.values():
        sample.save()
    before = _labels(config.dataset)
    newer = write_masks(
        str(tmp_path),
        config.shards,
        name="newer",
        model="discs/2",
        draw=lambda image, k: np.zeros((HEIGHT, WIDTH), dtype=bool),
    )
    done = review.run(replace(config, masks=newer))
    assert (done.added, done.updated, done.kept) == (0, 3, 5)
    after = _labels(config.dataset)
    touched = {0, 10, 20, 30}
    assert after.keys() == before.keys() == {0, 1, 10, 11, 20, 21, 30}  # 31 was deleted and stays so
    for number, label in after.items():
        assert label.id == before[number].id
        assert label.model == ("discs/1" if number in touched else "discs/2")
        if number in touched:
            assert label.to_dict() == before[number].to_dict()
        else:
            assert not label.mask.any()
            assert label.tags == []  # 21 has a mask now
    assert review.run(replace(config, masks=newer)).updated == 0


def test_only_the_selection_is_written_and_a_wider_one_adds_to_it(config: ReviewConfig) -> None:
    first = review.run(replace(config, limit=1, audit=0))
    assert (first.boxes, first.images, first.of) == (1, 1, 8)
    assert list(_labels(config.dataset)) == [21]
    review.tag(config.dataset, {21: "fix"})
    second = review.run(replace(config, limit=3, audit=2, seed=5))
    assert second.verdicts["fix"] == 1
    assert 3 <= second.boxes <= 5
    third = review.run(replace(config, limit=0, audit=0))
    assert third.boxes == len(_labels(config.dataset)) == 8
    assert third.added == 8 - second.boxes
    narrower = review.run(replace(config, limit=1, audit=0))
    assert narrower.boxes == 8


def _shown(dataset: Any, view: str) -> list[int]:
    """Annotation ids of the masks that a saved view shows, in its order."""
    samples = [sample[MASKS] for sample in dataset.load_saved_view(view)]
    return [m.annotation_id for s in samples for m in (s.detections if hasattr(s, "detections") else [s])]


def test_the_queue_shows_one_mask_per_tile_and_the_worst_first(config: ReviewConfig) -> None:
    review.run(replace(config, limit=3, audit=0))
    review.run(config)
    dataset = _load(config.dataset)
    queue = _shown(dataset, "worst first")
    assert len(dataset.load_saved_view("worst first")) == len(queue) == 8
    labels = _labels(config.dataset)
    consistency = [labels[number].box_iou for number in queue]
    assert consistency[0] is None  # no mask at all comes first
    assert consistency[1:] == sorted(consistency[1:])
    scores = [labels[number].confidence for number in _shown(dataset, "lowest score first")]
    assert scores[0] is None
    assert scores[1:] == sorted(scores[1:]) != [scores[1]] * 7
    sample = _shown(dataset, "audit sample")
    assert sorted(sample) == [number for number, label in sorted(labels.items()) if label.audit]
    assert len(sample) == 2


def test_the_other_views_follow_the_verdicts(config: ReviewConfig) -> None:
    review.run(config)
    dataset = _load(config.dataset)
    assert _shown(dataset, "accepted") == []
    review.tag(config.dataset, {0: "accept", 1: "accept", 10: "reject", 20: "fix"})
    assert _shown(dataset, "accepted") == [0, 1]
    assert _shown(dataset, "rejected") == [10]
    assert _shown(dataset, "to fix") == [20]
    assert _shown(dataset, "class disc") == [0, 1, 10, 11, 20, 21, 30, 31]


def test_the_annotate_tab_may_change_class_mask_and_verdict(config: ReviewConfig) -> None:
    review.run(config)
    dataset = _load(config.dataset)
    assert dataset.active_label_schemas == [MASKS]
    assert list(dataset.label_schemas) == [MASKS]
    schema = dataset.label_schemas[MASKS]
    assert schema["classes"] == ["disc", "square"]
    editable = [a["name"] for a in schema["attributes"] if not a.get("read_only")]
    assert editable == ["tags"]
    tags = next(a for a in schema["attributes"] if a["name"] == "tags")
    assert {"accept", "reject", "fix"} <= set(tags["values"])


def test_a_verdict_replaces_the_former(config: ReviewConfig) -> None:
    review.run(config)
    review.tag(config.dataset, {21: "reject", 0: "fix"})
    review.tag(config.dataset, {21: "accept"})
    labels = _labels(config.dataset)
    assert sorted(labels[21].tags) == ["accept", UNSEGMENTED]
    assert labels[0].tags == ["fix"]
    with pytest.raises(InputError, match="annotation 999"):
        review.tag(config.dataset, {999: "accept"})
    with pytest.raises(InputError, match="maybe") as error:
        review.tag(config.dataset, {0: "maybe"})  # type: ignore[dict-item]
    assert "accept" in error.value.remedy


def test_media_that_went_away_is_written_again(config: ReviewConfig, artefacts: Artefacts, home: Path) -> None:
    review.run(config)
    (Path(artefacts.images) / "002.png").unlink()
    assert review.run(config).added == 0
    files = {sample.image_id: Path(sample.filepath) for sample in _load(config.dataset)}
    assert files[2].is_relative_to(home / "cache" / "media")
    assert all(file.is_file() for file in files.values())


@pytest.mark.parametrize("what", ["masks", "shards"])
def test_a_missing_artefact(config: ReviewConfig, what: str) -> None:
    with pytest.raises(InputError, match="does not exist") as error:
        review.run(replace(config, **{what: "/nowhere/at/all"}))
    assert what in error.value.item
    assert "/nowhere/at/all" in str(error.value)
    assert error.value.remedy


def test_masks_of_a_newer_schema(config: ReviewConfig) -> None:
    path = Path(config.masks) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(InputError, match="schema version 99") as error:
        review.run(config)
    assert str(path) in error.value.item
    assert "Upgrade" in error.value.remedy


def test_shards_that_the_masks_were_not_made_from(config: ReviewConfig, tmp_path: Path) -> None:
    other = write_shards(str(tmp_path / "other"), str(tmp_path / "more"), 5)
    with pytest.raises(InputError, match=storage.read_manifest(other).hash) as error:
        review.run(replace(config, shards=other))
    assert error.value.item == "--shards"
    assert "boxinst segment" in error.value.remedy


def test_a_name_that_is_taken(config: ReviewConfig, tmp_path: Path) -> None:
    review.run(config)
    other = write_shards(str(tmp_path / "other"), str(tmp_path / "more"), 5)
    masks = write_masks(str(tmp_path / "other"), other)
    with pytest.raises(InputError, match="another name") as error:
        review.run(replace(config, shards=other, masks=masks))
    assert error.value.item == "--dataset"
    assert config.dataset in str(error.value)

    import fiftyone as fo

    mine = f"mine-{uuid.uuid4().hex}"
    fo.Dataset(mine, persistent=True)
    with pytest.raises(InputError, match="was not made by"):
        review.run(replace(config, dataset=mine))


@pytest.mark.parametrize(("name", "value"), [("limit", -1), ("audit", -3), ("port", 0), ("dataset", " ")])
def test_options_are_checked(name: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        ReviewConfig("masks", "shards", **{name: value})  # type: ignore[arg-type]
    assert error.value.item == f"--{name}"


def test_a_port_in_use_is_refused_before_any_work(config: ReviewConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=str(port)) as error:
            review.run(replace(config, app=True, port=port))
    assert error.value.item == "--port"


@pytest.mark.slow
@pytest.mark.timeout(900)  # the App alone may take minutes to start where many things run
def test_the_app_listens_on_loopback_until_it_is_interrupted(config: ReviewConfig) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import sys; from pipelines.review import ReviewConfig, run; "
        "run(ReviewConfig(*sys.argv[1:4], app=True, port=int(sys.argv[4])))"
    )
    words = [sys.executable, "-c", code, config.masks, config.shards, config.dataset, str(port)]
    # A shell's background job, and so its tests, ignore Ctrl-C; the App of a person at a terminal does not.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith(f"review {config.dataset!r}: 8 of 8 boxes on 4 images")
        line = next(line for line in process.stdout if line.startswith("Review at "))
        url = line.split()[2]
        assert url == f"http://127.0.0.1:{port}/datasets/{config.dataset}"
        assert urllib.request.urlopen(url, timeout=60).status == 200
        assert _listens_on(port) == {"127.0.0.1"}
    finally:
        process.send_signal(signal.SIGINT)
        try:
            rest = process.communicate(timeout=120)[0]
        finally:
            process.kill()
    assert "kept" in rest
    assert process.returncode == 0


def _listens_on(port: int) -> set[str]:
    import psutil

    found = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    return {connection.laddr.ip for connection in found}
