"""The demo's reviewer: judges by the truth where there is one, by consistency where there is not."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from boxinst import rle
from boxinst.errors import InputError
from jobs import reviewer, walk
from pipelines import storage
from pipelines.schema import MASK_SCHEMA, Manifest
from pipelines.synthetic import SyntheticCorpus

SIZE = 20


def square(width: int) -> bytes:
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[:, :10, :width] = True
    return rle.encode(mask)[0]


def mask_rows(folder: Path, rows: list[tuple[int, bytes | None, float | None, str]]) -> Manifest:
    """Mask rows in a folder, from (annotation id, mask, box IoU, status)."""
    keys = ("annotation_id", "mask", "box_iou", "status")
    content = [dict(zip(keys, row, strict=True)) | {"width": SIZE, "height": SIZE} for row in rows]
    table = pa.Table.from_pylist(content, schema=MASK_SCHEMA)
    file = storage.write_parquet(str(folder / "rows.parquet"), [table], MASK_SCHEMA)
    return Manifest("masks", [], [file], {})


def corpus_json(folder: Path, masks: dict[int, bytes | None]) -> str:
    annotations = [
        {"id": key, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}
        | ({} if mask is None else {"segmentation": {"size": [SIZE, SIZE], "counts": mask.decode()}})
        for key, mask in masks.items()
    ]
    images = [{"id": 1, "file_name": "a.png", "width": SIZE, "height": SIZE}]
    path = folder / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return str(path)


def test_verdicts_by_truth_and_by_consistency(tmp_path: Path) -> None:
    truth = corpus_json(
        tmp_path, {1: square(10), 2: square(10), 3: square(10), 4: square(10), 5: None, 6: None, 7: None}
    )
    manifest = mask_rows(
        tmp_path,
        [
            (1, square(9), 0.1, "ok"),  # IoU 0.9, whatever the box says
            (2, square(6), 1.0, "ok"),  # 0.6
            (3, square(4), 1.0, "ok"),  # 0.4
            (4, None, None, "empty"),
            (5, square(10), 0.95, "ok"),  # no truth from here on
            (6, square(10), 0.8, "ok"),
            (7, square(10), 0.3, "ok"),
        ],
    )
    expected = {1: "accept", 2: "fix", 3: "reject", 4: "reject", 5: "accept", 6: "fix", 7: "reject"}
    assert reviewer.verdicts(str(tmp_path), manifest, truth) == expected


def test_the_truth_of_a_corpus_is_found_by_annotation(corpus: SyntheticCorpus) -> None:
    entries = json.loads(Path(corpus.val).read_text())["annotations"]
    truth = reviewer.true_masks(corpus.val)
    assert set(truth) == {entry["id"] for entry in entries}
    areas = rle.area(list(truth.values()), 96, 96)
    assert areas == [next(e["area"] for e in entries if e["id"] == key) for key in truth]
    assert reviewer.true_masks(corpus.val_boxes) == {}


def test_a_corpus_is_found_with_its_twins_or_without(corpus: SyntheticCorpus, tmp_path: Path) -> None:
    assert walk.find_corpus(str(Path(corpus.images).parent)) == corpus
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train_boxes.json", "instances_val.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    found = walk.find_corpus(str(tmp_path))
    assert found.train == found.train_boxes == str(tmp_path / "annotations" / "instances_train_boxes.json")
    assert found.val == found.val_boxes == str(tmp_path / "annotations" / "instances_val.json")


def test_an_incomplete_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        walk.find_corpus(str(tmp_path))
    assert "--corpus" in str(error.value)
    assert str(tmp_path / "images") in str(error.value)
    assert "instances_train.json" in str(error.value)
