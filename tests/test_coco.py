"""COCO JSON and rows: pure inverse pairs, and no entry that disappears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pycocotools import mask as mask_api

from boxinst import rle
from boxinst.errors import InputError
from pipelines import coco
from pipelines.coco import Annotation, ImageEntry
from pipelines.schema import REJECT_SCHEMA, Category

LABELS = {3: 0, 9: 1}
CATEGORIES = [Category(3, "cell"), Category(9, "debris")]


def parse(content: Any) -> coco.Corpus:
    return coco.parse(json.dumps(content).encode(), "a.json")


def content(images: list[Any], annotations: list[Any]) -> dict[str, Any]:
    categories = [{"id": 9, "name": "debris"}, {"id": 3, "name": "cell", "supercategory": "x"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def image(number: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "width": 20, "height": 10, **more}


def box(number: Any = 1, image_id: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": 3, "bbox": [1, 2, 3, 4], **more}


def row(bbox: Any, segmentation: Any = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    entry = ImageEntry(5, "a.png", 20, 10, [Annotation(1, 3, bbox, segmentation, False)])
    return coco.to_row(entry, b"data", (20, 10), LABELS)


# --- reading ---


def test_order_and_labels_are_those_of_the_ids() -> None:
    corpus = parse(content([image(2), image(1)], [box(8, 1), box(7, 1)]))
    assert corpus.categories == CATEGORIES
    assert [entry.id for entry in corpus.images] == [1, 2]
    assert [a.id for a in corpus.images[0].annotations] == [7, 8]
    assert corpus.images[1].annotations == []
    assert corpus.rejects == []


@pytest.mark.parametrize(
    ("images", "reason", "kept"),
    [
        ([image(1), image(1, file_name="b.png")], "duplicate image id", 1),
        ([image("1"), image(1)], "image id is not an integer", 1),
        ([image(True), image(2**63), image(1)], "image id is not an integer", 1),
        (["text", image(1)], "image id is not an integer", 1),
        ([image(1, file_name="../secret.png")], "file name leaves the images folder", 0),
        ([image(1, file_name="a/../../secret.png")], "file name leaves the images folder", 0),
        ([image(1, file_name="/etc/passwd.png")], "file name leaves the images folder", 0),
        ([image(1, file_name=None)], "no file name", 0),
        ([image(1, file_name="a\ud800.png")], "file name holds half a character", 0),
    ],
)
def test_rejected_images(images: list[Any], reason: str, kept: int) -> None:
    corpus = parse(content(images, [box(1, 1)]))
    assert len(corpus.images) == kept
    own = [r for r in corpus.rejects if r["kind"] == "image"]
    assert {r["reason"] for r in own} == {reason}
    assert corpus.entered_images == len(images) == kept + len(own)
    boxes = [r for r in corpus.rejects if r["kind"] == "box"]
    assert [r["reason"] for r in boxes] == ([] if kept else ["image rejected"])
    assert len(pa.Table.from_pylist(corpus.rejects, schema=REJECT_SCHEMA)) == len(corpus.rejects), "it can be stored"


def test_sub_folders_are_no_escape() -> None:
    assert parse(content([image(1, file_name="a/b..c/1.png")], [])).images[0].file_name == "a/b..c/1.png"


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (box(None), "annotation id is not an integer"),
        (box(1.5), "annotation id is not an integer"),
        (7, "annotation id is not an integer"),
        (box(50), "duplicate annotation id"),
        (box(1, image_id=77), "unknown image"),
        (box(1, image_id=None), "unknown image"),
        (box(1, category_id=4), "unknown category"),
        (box(1, category_id=[3]), "unknown category"),
    ],
)
def test_rejected_boxes(annotation: Any, reason: str) -> None:
    corpus = parse(content([image()], [box(50), annotation]))
    assert [a.id for a in corpus.images[0].annotations] == [50]
    assert [(r["kind"], r["action"], r["reason"]) for r in corpus.rejects] == [("box", "rejected", reason)]
    assert set(corpus.rejects[0]) == set(REJECT_SCHEMA.names)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG", r"a\.json is not JSON"),
        (b"[" * 200_000, r"a\.json is not JSON"),
        (b"", r"a\.json is not JSON"),
        (b"[]", r'a\.json is not COCO: it has no list "images"'),
        (b'{"images": [], "annotations": {}}', r'no list "annotations"'),
        (b'{"images": [], "annotations": []}', r'no list "categories"'),
        (b'{"images": [], "annotations": [], "categories": []}', r'empty list "images"'),
        (b'{"images": [{}], "annotations": [], "categories": []}', r'empty list "categories"'),
        (b'{"images": [{}], "annotations": [], "categories": [{"id": 1}]}', r"the category \{'id': 1\}"),
        (
            b'{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            r"2 categories of id 1",
        ),
        (
            b'{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            r"2 categories of name 'a'",
        ),
    ],
)
def test_not_coco(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"--annotations: .*{message}.*\. \w+ .*\.$"):
        coco.parse(data, "a.json")


# --- boxes ---


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 4, 6]),
        ([0, 0, 20, 10], [0, 0, 20, 10]),
        ([0.0004, 0, 20, 10], [0.0004, 0, 20, 10]),
        ([-0.0004, 0, 20.0008, 10], [0, 0, 20, 10]),
    ],
)
def test_good_boxes(bbox: list[float], expected: list[float]) -> None:
    found, rejects = row(bbox)
    assert found["boxes"][0] == pytest.approx(expected, abs=1e-9)
    assert rejects == []


def test_clipped_boxes_are_kept_and_recorded() -> None:
    found, rejects = row([-5, 4, 10, 30])
    assert found["boxes"] == [[0, 4, 5, 10]]
    assert [(r["action"], r["reason"], r["value"]) for r in rejects] == [
        ("clipped", "box partly outside the image", "[-5, 4, 10, 30]")
    ]


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        (None, "box is not four numbers"),
        ([1, 2, 3], "box is not four numbers"),
        ([1, 2, 3, "4"], "box is not four numbers"),
        ([1, 2, 3, True], "box is not four numbers"),
        ([1, 2, float("nan"), 4], "box is not finite"),
        ([1, float("inf"), 3, 4], "box is not finite"),
        ([10**400, 2, 3, 4], "box is not finite"),
        ([1, 2, 0, 4], "empty box"),
        ([1, 2, 3, -4], "empty box"),
        ([20, 2, 3, 4], "box outside the image"),
        ([1, -9, 3, 4], "box outside the image"),
        ([1e300, 2, 1e300, 4], "box outside the image"),
    ],
)
def test_bad_boxes(bbox: Any, reason: str) -> None:
    found, rejects = row(bbox)
    assert found["boxes"] == found["annotation_ids"] == found["masks"] == []
    assert [(r["kind"], r["action"], r["reason"], r["annotation_id"]) for r in rejects] == [
        ("box", "rejected", reason, 1)
    ]


def test_property_every_box_is_kept_inside_or_rejected() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        bbox = [float(v) for v in rng.normal(5, 15, 4)]
        found, rejects = row(bbox)
        rejected = [r for r in rejects if r["action"] == "rejected"]
        assert len(found["boxes"]) + len(rejected) == 1
        for x1, y1, x2, y2 in found["boxes"]:
            assert 0 <= x1 < x2 <= 20
            assert 0 <= y1 < y2 <= 10


# --- masks ---


def disc() -> np.ndarray:
    rows, columns = np.mgrid[:10, :20]
    return (rows - 5) ** 2 + (columns - 9) ** 2 <= 12


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *ends, flat.size]).tolist()}


def test_three_kinds_of_segmentation_agree() -> None:
    mask = disc()
    counts = rle.encode(torch.from_numpy(mask)[None])[0]
    compressed = {"size": [10, 20], "counts": counts.decode()}
    assert coco.rle_counts(compressed, 10, 20) == counts
    assert coco.rle_counts(uncompressed(mask), 10, 20) == counts
    rectangle = np.zeros((10, 20), bool)
    rectangle[2:6, 1:4] = True
    found = coco.rle_counts([[1, 2, 4, 2, 4, 6, 1, 6]], 10, 20)
    assert np.array_equal(rle.decode([found], 10, 20)[0].numpy(), rectangle)


def test_parts_of_a_polygon_are_joined() -> None:
    found = coco.rle_counts([[0, 0, 2, 0, 2, 2, 0, 2], [5, 5, 8, 5, 8, 8, 5, 8]], 10, 20)
    assert rle.area([found], 10, 20) == [4 + 9]


def test_property_run_lengths_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width = rng.integers(1, 40, 2)
        mask = rng.random((height, width)) < rng.random()
        counts = mask_api.encode(np.asfortranarray(mask, np.uint8))["counts"]
        assert coco.run_lengths(counts) == uncompressed(mask)["counts"]


@pytest.mark.parametrize(
    "segmentation",
    [
        "text",
        7,
        [1, 2, 3, 4, 5, 6],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 1e9]],
        [[-9, -9, -8, -9, -8, -8]],
        {"size": [10, 20]},
        {"size": [20, 10], "counts": [0, 200]},
        {"size": [10, 20], "counts": [0, 100]},
        {"size": [10, 20], "counts": [0, 300]},
        {"size": [10, 20], "counts": [0, 300, -100]},
        {"size": [10, 20], "counts": [200]},
        {"size": [10, 20], "counts": ["0", 200]},
        {"size": [10, 20], "counts": "héé"},
        {"size": [10, 20], "counts": "P"},
        {"size": [10, 20], "counts": "garbage!!"},
    ],
)
def test_unreadable_segmentation_leaves_the_box(segmentation: Any) -> None:
    found, rejects = row([1, 2, 3, 4], segmentation)
    assert found["masks"] == [None]
    assert found["annotation_ids"] == [1]
    assert [(r["kind"], r["action"], r["reason"]) for r in rejects] == [
        ("mask", "rejected", "segmentation cannot be read")
    ]
    assert rejects[0]["value"]


# --- there and back ---


def test_round_trip(tmp_path: Path) -> None:
    counts = rle.encode(torch.from_numpy(disc())[None])[0]
    first = {
        "image_id": 5,
        "file_name": "sub/a.png",
        "image": b"data",
        "width": 20,
        "height": 10,
        "annotation_ids": [1, 4],
        "boxes": [[0.5, 2.25, 4.125, 6.0], [6.0, 2.0, 13.0, 9.0]],
        "labels": [1, 0],
        "masks": [None, counts],
        "crowd": [False, True],
    }
    entry, annotations = coco.from_row(first, CATEGORIES)
    assert "segmentation" not in annotations[0]
    assert annotations[0]["area"] == 3.625 * 3.75
    assert annotations[1]["area"] == disc().sum()
    coco.write(str(tmp_path / "a.json"), CATEGORIES, [entry], annotations)
    corpus = coco.parse((tmp_path / "a.json").read_bytes(), "a.json")
    second, rejects = coco.to_row(corpus.images[0], b"data", (20, 10), LABELS)
    assert second == first
    assert rejects == []
    assert corpus.categories == CATEGORIES
