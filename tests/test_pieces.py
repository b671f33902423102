"""Cutting a COCO file: nothing lost, values untouched, and the shards of the pieces are those of the whole."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_shards import Mixed, rows

from boxinst.errors import InputError
from pipelines import claims, pieces, shards, storage
from pipelines.config import CutConfig, ShardConfig
from pipelines.pieces import Places, run
from pipelines.schema import MANIFEST, Manifest

CATEGORIES = [{"id": 4, "name": "thing"}, {"id": 2, "name": "stuff"}]


def corpus(images: int = 7, boxes: int = 30, seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)
    ids = rng.sample(range(1000), images)
    return {
        "info": {"year": 2024, "é": "\ud800"},
        "images": [{"id": k, "file_name": f"{k}.png"} for k in ids],
        "annotations": [
            {"id": k, "image_id": rng.choice(ids), "category_id": 4, "bbox": [rng.random() * 100 for _ in range(4)]}
            for k in range(boxes)
        ],
        "categories": CATEGORIES,
        "licenses": [],
    }


def write(path: Path, content: dict[str, Any], **options: Any) -> str:
    path.write_text(json.dumps(content, **options))
    return str(path)


def cut(annotations: str, out: Path | str, size: int = 3, **more: Any) -> tuple[Manifest, list[dict[str, Any]]]:
    manifest = run(CutConfig(annotations, str(out), images_per_piece=size, **more))
    made = [storage.read_bytes(f"{out}/{file.path}") for file in manifest.files]
    assert [len(data) for data in made] == [file.bytes for file in manifest.files]
    assert manifest == storage.read_manifest(str(out), "pieces")
    return manifest, [json.loads(data) for data in made]


def split_plainly(content: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """The slow and obvious way, for a file without defects."""
    others = {key: value for key, value in content.items() if key not in ("images", "annotations")}
    made = []
    for k in range(0, len(content["images"]), size):
        mine = content["images"][k : k + size]
        ids = {image["id"] for image in mine}
        boxes = [a for a in content["annotations"] if a["image_id"] in ids]
        made.append({**others, "images": mine, "annotations": boxes})
    return made


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("indent", [None, 1])
def test_pieces_are_those_of_the_obvious_way(size: int, indent: int | None, tmp_path: Path) -> None:
    content = corpus()
    manifest, made = cut(write(tmp_path / "a.json", content, indent=indent), tmp_path / "out", size)
    assert made == split_plainly(content, size)
    assert [file.rows for file in manifest.files] == [len(piece["images"]) for piece in made]
    most = max(len(piece["annotations"]) for piece in made)
    assert manifest.counts == {"images": 7, "boxes": 30, "most_boxes": most}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        MANIFEST,
        *(file.path for file in manifest.files),
    ]


def test_the_lists_may_stand_in_any_order(tmp_path: Path) -> None:
    content = corpus()
    expected = split_plainly(content, 3)
    keys = ("info", "images", "annotations", "categories")
    for number, order in enumerate(itertools.permutations(keys)):
        given = {key: content[key] for key in order} | {"licenses": []}
        _, made = cut(write(tmp_path / f"{number}.json", given), tmp_path / f"out{number}", 3)
        assert made == expected


def test_values_are_exactly_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of every kind survive as ``json.loads`` has them, in small lots and through many writes."""
    monkeypatch.setattr(pieces, "BATCH", 3)
    monkeypatch.setattr(pieces, "BUFFER", 50)
    monkeypatch.setattr(storage, "CHUNK", 37)
    rng = random.Random(1)
    odd = [0.1 + 0.2, 1e-320, -0.0, 2**70, float("nan"), float("inf"), 1e22, "\ud800é", None, True, {"size": [1, 2]}]
    content = corpus(images=12, boxes=200)
    for entry in [*content["images"], *content["annotations"]]:
        entry |= {rng.choice("uvw"): rng.choice([*odd, rng.random(), rng.uniform(-1e9, 1e9)]) for _ in range(3)}
    _, made = cut(write(tmp_path / "a.json", content), tmp_path / "out", 2)
    expected = [{key: piece[key] for key in made[0]} for piece in split_plainly(content, 2)]  # keys in the same order
    assert repr(made) == repr(expected)  # NaN differs from itself


DEFECTS: dict[str, tuple[str, Any, int]] = {
    "annotation of no image": ("annotations", {"id": 90, "image_id": 5000, "category_id": 4}, 0),
    "annotation without an image": ("annotations", {"id": 90}, 0),
    "annotation whose image is no integer": ("annotations", {"id": 90, "image_id": "1"}, 0),
    "annotation whose image is beyond 64 bits": ("annotations", {"id": 90, "image_id": 2**64}, 0),
    "annotation whose image is true": ("annotations", {"id": 90, "image_id": True}, 0),
    "annotation that is no object": ("annotations", [1], 0),
    "annotation that is null": ("annotations", None, 0),
    "image without an id": ("images", {"file_name": "x.png"}, 0),
    "image that is no object": ("images", "x.png", 0),
    "image of a known id": ("images", {"id": 6, "file_name": "again.png"}, 2),
}
"""An entry, and the piece where it belongs."""


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("first", [False, True])
def test_nothing_is_lost(defect: str, first: bool, tmp_path: Path) -> None:
    name, entry, piece = DEFECTS[defect]
    content = corpus()
    for position, image in enumerate(content["images"]):
        image["id"] = position
    for annotation in content["annotations"]:
        annotation["image_id"] = annotation["id"] % 7
    expected = split_plainly(content, 3)
    place = 0 if first and defect != "image of a known id" else len(content[name])
    content[name].insert(place, entry)
    manifest, made = cut(write(tmp_path / "a.json", content), tmp_path / "out", 3)
    expected[piece][name].insert(0 if place == 0 else len(expected[piece][name]), entry)
    assert made == expected
    assert (manifest.counts["images"], manifest.counts["boxes"]) == (
        len(content["images"]),
        len(content["annotations"]),
    )


def test_the_first_image_of_an_id_decides() -> None:
    places = Places(np.array([9, 5, 9, 5, 7, -3, 9]), 2)
    assert places.pieces == 2
    assert places.of([9, 5, 7, -3, 8, None, 0]).tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert Places(np.array([1, 3, 5]), 2).of([5, 4, 1, 6]).tolist() == [1, 0, 0, 0]
    assert Places(np.array([], np.int64), 2).of([1, None]).tolist() == [0, 0]


def test_an_image_of_id_zero_is_not_what_has_no_image() -> None:
    assert Places(np.array([5, 6, 0]), 1).of([0, None]).tolist() == [2, 0]


def test_a_file_without_any_usable_image_is_one_piece(tmp_path: Path) -> None:
    content = {"images": [{"id": "a"}, 7], "annotations": [{"image_id": "a"}], "categories": CATEGORIES}
    _, made = cut(write(tmp_path / "a.json", content), tmp_path / "out", 1)
    assert made == [content]


@pytest.mark.parametrize("size", [2, 4])
def test_shards_of_the_pieces_are_those_of_the_whole(size: int, tmp_path: Path, ray_session: None) -> None:
    """Rows and rejects alike; only a repeated annotation id must have its two boxes in one piece, as it has here."""
    mixed = Mixed(tmp_path)
    # A piece in which no image can be used is refused by `shard`, so let each have a good one.
    good = [entry for entry in mixed.images if entry["id"] in (*range(1, 8), 14)]
    bad = [entry for entry in mixed.images if entry["id"] not in (*range(1, 8), 9, 14)]
    nines = [entry for entry in mixed.images if entry["id"] == 9]
    ordered = [nines[0], *itertools.chain(*itertools.zip_longest(good, bad)), nines[1]]
    content = json.loads((tmp_path / "a.json").read_text()) | {"images": [e for e in ordered if e]}
    path = write(tmp_path / "a.json", content)
    whole = shards.run(ShardConfig(path, f"{tmp_path}/images", f"{tmp_path}/whole"))
    manifest, _ = cut(path, tmp_path / "pieces", size)
    parts = []
    for file in manifest.files:
        name = file.path.removesuffix(".json")
        config = ShardConfig(f"{tmp_path}/pieces/{file.path}", f"{tmp_path}/images", f"{tmp_path}/{name}")
        parts.append((config.output, shards.run(config)))
    assert len(parts) > 1

    def key(row: dict[str, Any]) -> str:
        return json.dumps([row.get("kind"), row["image_id"], row.get("annotation_id"), row.get("reason")], default=str)

    assert sorted((r for out, m in parts for r in rows(out, m)), key=key) == sorted(
        rows(f"{tmp_path}/whole", whole), key=key
    )
    rejects = [r for out, _ in parts for r in pq.read_table(f"{out}/{shards.REJECTS}").to_pylist()]
    assert sorted(rejects, key=key) == sorted(pq.read_table(f"{tmp_path}/whole/{shards.REJECTS}").to_pylist(), key=key)
    for name, count in whole.counts.items():
        assert sum(m.counts[name] for _, m in parts) == count, name
    assert {tuple(c.name for c in m.categories) for _, m in parts} == {("stuff", "thing")}


def test_again_does_nothing_and_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "a.json", corpus()), tmp_path / "out"
    first, _ = cut(path, out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert cut(path, out)[0] == first
    assert "nothing to do" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    with pytest.raises(InputError, match=r"holds pieces made from other inputs or options.*--overwrite"):
        cut(path, out, 2)
    assert len(cut(path, out, 2, overwrite=True)[1]) == 4
    assert len(list(out.iterdir())) == 5
    write(tmp_path / "a.json", corpus(seed=1))
    with pytest.raises(InputError, match="--overwrite"):
        cut(path, out, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(InputError, match="holds something else"):
        cut(path, tmp_path / "mine", overwrite=True)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", corpus())
    with claims.held(str(tmp_path / "out"), "--out"), pytest.raises(InputError, match=r"--out: .* is being written by"):
        cut(path, tmp_path / "out")


def test_a_failure_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write(tmp_path / "a.json", corpus()), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pieces._Writer, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cut(path, out)
    assert [file.name for file in out.iterdir()] == [storage.CLAIM]
    assert len(cut(path, out)[1]) == 3


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = write(tmp_path / "a.json", corpus()), pieces._distribute

    def change(*args: Any) -> None:
        write(tmp_path / "a.json", corpus(boxes=29))
        plain(*args)

    monkeypatch.setattr(pieces, "_distribute", change)
    with pytest.raises(InputError, match=r"--annotations: .*a\.json has changed meanwhile"):
        cut(path, tmp_path / "out")


def test_counts_that_disagree_are_a_fault_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pieces._Writer.add
    monkeypatch.setattr(pieces._Writer, "add", lambda self, entries, where: plain(self, entries[1:], where[1:]))
    with pytest.raises(RuntimeError, match="the file has"):
        cut(write(tmp_path / "a.json", corpus()), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a\.json is not JSON \(.*character 2\)\. Give a COCO JSON file"),
        ("", r"is not JSON \(Expecting value: character 1\)"),
        ('{"images": [{]}', r"is not JSON \(.*character 14\)"),
        (
            "[]",
            r'is not COCO: it has no list "images". A COCO file has the lists "images", "annotations", "categories"',
        ),
        ('{"images": {}, "annotations": [], "categories": []}', 'no list "images"'),
        ('{"images": [1], "categories": [{"id": 1, "name": "a"}]}', 'no list "annotations"'),
        ('{"images": [1], "annotations": []}', 'no list "categories"'),
        ('{"images": [1], "annotations": [], "categories": 3}', 'no list "categories"'),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', 'empty list "images"'),
        ('{"images": [1], "annotations": [], "categories": []}', 'empty list "categories"'),
        ('{"images": [1], "annotations": [], "categories": [{"id": "1"}]}', "has the category"),
        ('{"images": [1], "images": []}', r'has "images" twice\. Give a file that has it once'),
    ],
)
def test_what_is_no_coco_file_is_refused_before_anything_is_written(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        cut(f"{tmp_path}/a.json", tmp_path / "out")
    assert error.value.item == "--annotations"
    assert not (tmp_path / "out").exists()


def test_bad_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--annotations: .*none\.json does not exist"):
        cut(f"{tmp_path}/none.json", tmp_path / "out")
    with pytest.raises(InputError, match=r"--images-per-piece: 0\. Give 1 or more"):
        CutConfig("a.json", images_per_piece=0)
    monkeypatch.setattr(pieces, "MOST", 3)
    with pytest.raises(InputError, match=r"--images-per-piece: 1 makes 7 pieces\. Give at least 3\."):
        cut(write(tmp_path / "a.json", corpus()), tmp_path / "out", 1)


def test_the_default_output_is_named_after_the_file(home: Path) -> None:
    assert CutConfig("x/all.json").output == f"{home}/pieces/all"


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import cli

    words = ["--annotations", write(tmp_path / "a.json", corpus()), "--out", f"{tmp_path}/out"]
    assert cli.main(["cut", *words, "--images-per-piece", "3"]) == 0
    shown = capsys.readouterr().out
    assert "7 images and 30 boxes, all of the file, in 3 pieces;" in shown
    assert f"Made 3 pieces: {tmp_path}/out" in shown
    assert f"boxinst shard --annotations {tmp_path}/out/piece-00000.json" in shown


def test_the_same_on_s3(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK", 100)
    content = corpus()
    storage.write_bytes(f"{s3}/in/a.json", json.dumps(content).encode())
    manifest, made = cut(f"{s3}/in/a.json", f"{s3}/out")
    assert made == split_plainly(content, 3)
    assert manifest.source["annotations"] == f"{s3}/in/a.json"
    here, _ = cut(write(tmp_path / "a.json", content), tmp_path / "out")
    assert here.files == manifest.files
    assert cut(f"{s3}/in/a.json", f"{s3}/out")[0] == manifest
    assert sorted(storage.list_files(f"{s3}/out")) == [MANIFEST, *(file.path for file in manifest.files)]
    with pytest.raises(InputError, match="does not exist"):
        cut(f"{s3}/in/none.json", f"{s3}/out")
