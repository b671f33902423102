"""What people said and did in the review, found again in the next corpus."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from reviewing import DISCS, HEIGHT, WIDTH, Artefacts, default_mask, disc, write_shards

from boxinst.errors import InputError
from pipelines import coco, feedback, review, storage
from pipelines.feedback import FeedbackConfig
from pipelines.review import ReviewConfig
from pipelines.verdicts import GIVEN, MASKS, relative

pytest_plugins = ["reviewing"]


@pytest.fixture
def name(artefacts: Artefacts) -> str:
    """A review of all eight boxes."""
    name = f"feedback-{uuid.uuid4().hex}"
    review.run(ReviewConfig(artefacts.masks, artefacts.shards, dataset=name))
    return name


def _samples(name: str) -> dict[int, Any]:
    import fiftyone as fo

    return {sample.image_id: sample for sample in fo.load_dataset(name)}


def _label(samples: dict[int, Any], number: int) -> Any:
    return next(d for d in samples[number // 10][MASKS].detections if d.annotation_id == number)


def _written(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    content = json.loads(path.read_text())
    return content, {a["id"]: a for a in content["annotations"]}


def _mask(annotation: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(annotation["segmentation"]).astype(bool)


def _given(number: int) -> list[float]:
    x, y, r = DISCS[number % 10]
    return [x - r - 0.5, y - r - 0.25, 2 * r + 1.5, 2 * r + 1]


def test_every_verdict_and_edit_arrives(name: str, tmp_path: Path) -> None:
    review.tag(name, {0: "accept", 1: "reject", 10: "fix", 21: "accept", 30: "accept"})
    samples = _samples(name)
    # As the Annotate tab leaves it: the mask at screen resolution, the box tight around it.
    brushed = _label(samples, 11)
    circle = disc(90, 50, 24)
    rows, columns = np.flatnonzero(circle.any(1)), np.flatnonzero(circle.any(0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    brushed.mask = np.kron(circle[box[1] : box[3], box[0] : box[2]], np.ones((7, 7))).astype(np.uint8)
    brushed.bounding_box = relative([float(v) for v in box], WIDTH, HEIGHT)
    moved = _label(samples, 20)
    moved.bounding_box = relative([10.0, 20.0, 50.0, 60.0], WIDTH, HEIGHT)
    _label(samples, 30).label = "square"
    samples[3][MASKS].detections = [_label(samples, 30)]  # 31 is deleted
    for sample in samples.values():
        sample.save()

    out = tmp_path / "next.json"
    done = feedback.run(FeedbackConfig(str(out), dataset=name))
    content, written = _written(out)

    review_of = {number: entry.get("review") for number, entry in written.items()}
    assert review_of == {
        0: "accepted",
        1: "rejected",
        10: "fix",
        11: "edited",
        20: "moved",
        21: "no mask",
        30: "accepted",
        31: "deleted",
    }
    assert {number for number, entry in written.items() if "segmentation" in entry} == {0, 11, 30}
    assert np.array_equal(_mask(written[0]), default_mask(0, 0))
    assert np.array_equal(_mask(written[11]), circle)
    assert np.array_equal(_mask(written[30]), default_mask(3, 0))
    for number, entry in written.items():
        expected = [10, 20, 40, 40] if number == 20 else _given(number)
        assert entry["bbox"] == pytest.approx(expected), number
        assert entry["category_id"] == (7 if number == 30 else 3)
        assert entry["iscrowd"] == 0
    assert written[11]["area"] == circle.sum()
    assert [image["file_name"] for image in content["images"]] == [f"{k:03}.png" for k in range(4)]
    assert content["categories"] == [{"id": 3, "name": "disc"}, {"id": 7, "name": "square"}]

    assert sum(done.outcomes.values()) == done.boxes == 8
    assert done.outcomes["accepted"] == 2
    assert (done.masks, done.reclassified, done.added, done.dropped) == (3, 1, 0, 0)
    assert "8 boxes, 3 with masks" in str(done)
    assert "1 class changed" in str(done)


def test_a_verdict_on_the_given_box_counts(name: str, tmp_path: Path) -> None:
    samples = _samples(name)
    box = next(d for d in samples[0][GIVEN].detections if d.annotation_id == 1)
    box.tags.append("accept")
    samples[0].save()
    done = feedback.run(FeedbackConfig(str(tmp_path / "next.json"), dataset=name))
    assert (done.outcomes["accepted"], done.masks) == (1, 1)
    import fiftyone as fo

    assert review.verdicts(fo.load_dataset(name)) == {"accept": 1, "reject": 0, "fix": 0}


def test_the_output_is_a_corpus(name: str, tmp_path: Path) -> None:
    review.tag(name, {0: "accept"})
    out = tmp_path / "next.json"
    feedback.run(FeedbackConfig(str(out), dataset=name))
    corpus = coco.parse(out.read_bytes(), str(out))
    assert corpus.rejects == []
    assert [c.name for c in corpus.categories] == ["disc", "square"]
    assert sum(a.segmentation is not None for image in corpus.images for a in image.annotations) == 1
    labels = {c.id: k for k, c in enumerate(corpus.categories)}
    row, rejects = coco.to_row(corpus.images[0], b"", (WIDTH, HEIGHT), labels)
    assert rejects == []
    assert row["masks"][0] is not None
    assert row["masks"][1] is None


def test_boxes_that_nobody_reviewed_are_all_there(artefacts: Artefacts, tmp_path: Path) -> None:
    name = f"feedback-{uuid.uuid4().hex}"
    review.run(ReviewConfig(artefacts.masks, artefacts.shards, dataset=name, limit=1, audit=0))
    out = tmp_path / "next.json"
    done = feedback.run(FeedbackConfig(str(out), dataset=name))
    content, written = _written(out)
    assert done.outcomes == {"unreviewed": 8}
    assert len(content["images"]) == 4
    assert sorted(written) == [0, 1, 10, 11, 20, 21, 30, 31]
    assert not any("segmentation" in entry or "review" in entry for entry in written.values())


def test_labels_drawn_in_the_app_are_new_annotations(name: str, tmp_path: Path) -> None:
    import fiftyone as fo

    samples = _samples(name)
    mask = np.ones((50, 70), dtype=np.uint8)
    drawn = [
        fo.Detection(label="square", bounding_box=relative([2.2, 3.0, 12.0, 13.0], WIDTH, HEIGHT), mask=mask),
        fo.Detection(label="disc", bounding_box=relative([1.0, 2.0, 8.0, 9.0], WIDTH, HEIGHT)),
        fo.Detection(label="disc", bounding_box=[0.1, 0.1, 0.1, 0.1], tags=["reject"]),
    ]
    samples[2][MASKS].detections += drawn
    samples[2].save()
    out = tmp_path / "next.json"
    done = feedback.run(FeedbackConfig(str(out), dataset=name))
    _, written = _written(out)
    assert (done.boxes, done.masks, done.added) == (10, 1, 2)
    assert {number: written[number]["image_id"] for number in (32, 33)} == {32: 2, 33: 2}
    assert written[32]["bbox"] == [2, 3, 10, 10]
    assert _mask(written[32]).sum() == written[32]["area"] == 100
    assert written[32]["category_id"] == 7
    assert written[33]["bbox"] == pytest.approx([1, 2, 7, 7])
    assert written[32]["review"] == written[33]["review"] == "drawn"


def test_deleted_boxes_can_be_left_out(name: str, tmp_path: Path) -> None:
    samples = _samples(name)
    samples[0][MASKS].detections = []
    samples[0].save()
    done = feedback.run(FeedbackConfig(str(tmp_path / "a.json"), dataset=name, drop_deleted=True))
    assert (done.boxes, done.dropped, done.outcomes["deleted"]) == (6, 2, 2)
    assert feedback.run(FeedbackConfig(str(tmp_path / "b.json"), dataset=name)).boxes == 8


def test_the_same_review_gives_the_same_file(name: str, tmp_path: Path) -> None:
    review.tag(name, {0: "accept"})
    for k in range(2):
        feedback.run(FeedbackConfig(str(tmp_path / f"{k}.json"), dataset=name))
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_an_unknown_review_names_those_there_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dataset 'nobody'") as error:
        feedback.run(FeedbackConfig(str(tmp_path / "next.json"), dataset="nobody"))
    assert error.value.item == "--dataset"
    assert name in str(error.value)
    assert "boxinst review" in error.value.remedy


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "next.json"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists") as error:
        feedback.run(FeedbackConfig(str(out), dataset="any"))
    assert error.value.item == "--out"
    assert str(out) in str(error.value)
    assert "--overwrite" in error.value.remedy
    assert out.read_text() == "mine"


def test_an_output_that_is_no_json_file() -> None:
    with pytest.raises(InputError, match="corpus2") as error:
        FeedbackConfig("corpus2")
    assert error.value.item == "--out"


def test_other_shards_are_refused(name: str, tmp_path: Path) -> None:
    other = write_shards(str(tmp_path / "other"), str(tmp_path / "more"), 5)
    with pytest.raises(InputError, match=storage.read_manifest(other).hash) as error:
        feedback.run(FeedbackConfig(str(tmp_path / "next.json"), dataset=name, shards=other))
    assert error.value.item == "--shards"


def test_shards_that_have_moved_can_be_named(name: str, artefacts: Artefacts, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    Path(artefacts.shards).rename(moved)
    config = FeedbackConfig(str(tmp_path / "next.json"), dataset=name)
    with pytest.raises(InputError, match="does not exist") as error:
        feedback.run(config)
    assert error.value.item == "--shards"
    assert feedback.run(FeedbackConfig(config.out, dataset=name, shards=str(moved))).boxes == 8


def test_a_class_that_the_corpus_does_not_have(name: str, tmp_path: Path) -> None:
    samples = _samples(name)
    _label(samples, 10).label = "hexagon"
    samples[1].save()
    out = tmp_path / "next.json"
    with pytest.raises(InputError, match="hexagon") as error:
        feedback.run(FeedbackConfig(str(out), dataset=name))
    assert error.value.item == "annotation 10"
    assert "disc, square" in error.value.remedy
    assert not out.exists()
