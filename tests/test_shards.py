"""Sharding: every image and box accounted for, the same result each time, and bad input refused before any work."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fault_proxy import FaultProxy
from PIL import Image

from boxinst.errors import InputError
from pipelines import claims, coco, images, shards, storage
from pipelines.schema import MANIFEST, REJECT_SCHEMA, SHARD_SCHEMA, Manifest
from pipelines.shards import REJECTS, ShardConfig, run
from pipelines.synthetic import SyntheticCorpus

SIZE = (24, 16)  # width, height


def picture(mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full(SIZE[::-1], 40000, np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(kind="JPEG", exif=exif)


class Mixed:
    """A corpus with one of everything: what comes of each image and each box is written beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.kept_boxes: dict[int, list[float]] = {}
        self.rejected: set[tuple[str, str, int | None, int | None, str]] = set()
        (root / "images" / "sub").mkdir(parents=True)
        kinds = {"RGB": "PNG", "L": "PNG", "I;16": "PNG", "CMYK": "JPEG", "P": "GIF", "RGBA": "PNG"}
        for number, (mode, kind) in enumerate(kinds.items(), 1):
            self.image(number, f"{mode.replace(';', '')}.{kind.lower()}", picture(mode, kind))
            self.box(number * 10, number, [1, 2, 3, 4], kept=[1, 2, 4, 6])
        self.image(7, "sub/turned.jpg", turned())
        self.box(70, 7, [20, 2, 3, 4], kept=[20, 2, 23, 6])
        self.image(8, "corrupt.png", picture()[:200], reason="unreadable image")
        self.box(80, 8, [1, 2, 3, 4], reason="image rejected")
        self.box(81, 8, [9, 2, 3, 4], reason="image rejected")
        self.image(9, "boxless.png", picture())
        self.image(10, "absent.png", None, reason="missing file")
        self.box(100, 10, [1, 2, 3, 4], reason="image rejected")
        self.image(11, "large.png", picture(), size=(48, 32), reason="size disagrees with the JSON")
        self.box(110, 11, [1, 2, 3, 4], reason="image rejected")
        self.image(9, "twice.png", picture(), reason="duplicate image id")
        self.image(12, "../outside.png", None, reason="file name leaves the images folder")
        self.image(13, "empty.png", b"", reason="unreadable image")
        self.image(14, "boxes.png", picture())
        self.box(140, 14, [-2, 3, 6, 4], kept=[0, 3, 4, 7], clipped=True)
        self.box(141, 14, [24, 3, 6, 4], reason="box outside the image")
        self.box(142, 14, [3, 3, 0, 4], reason="empty box")
        self.box(143, 14, [3, float("nan"), 1, 4], reason="box is not finite")
        self.box(144, 14, [3, 3, 4, 4], category=5, reason="unknown category")
        self.box(140, 14, [3, 3, 4, 4], reason="duplicate annotation id")
        self.box(146, 99, [3, 3, 4, 4], reason="unknown image")
        self.box(147, 14, [3, 3, 4, 4], kept=[3, 3, 7, 7], segmentation=[[3, 3, 7, 3, 7, 7, 3, 7]])
        self.box(148, 14, [3, 3, 4, 4], kept=[3, 3, 7, 7], segmentation={"size": [1, 1], "counts": [1]})
        self.rejected.add(("mask", "rejected", 14, 148, "segmentation cannot be read"))
        content = {"images": self.images, "annotations": self.annotations}
        content["categories"] = [{"id": 4, "name": "thing"}, {"id": 2, "name": "stuff"}]
        (root / "a.json").write_text(json.dumps(content))

    def image(
        self, number: int, name: str, data: bytes | None, *, size: tuple[int, int] = SIZE, reason: str = ""
    ) -> None:
        self.images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        if data is not None:
            (self.root / "images" / name).write_bytes(data)
        if reason:
            self.rejected.add(("image", "rejected", number, None, reason))

    def box(
        self,
        number: int,
        image: int,
        bbox: list[float],
        *,
        kept: list[float] | None = None,
        clipped: bool = False,
        reason: str = "",
        category: int = 4,
        **more: Any,
    ) -> None:
        self.annotations.append({"id": number, "image_id": image, "bbox": bbox, "category_id": category, **more})
        if kept is not None:
            self.kept_boxes[number] = kept
        if clipped:
            self.rejected.add(("box", "clipped", image, number, "box partly outside the image"))
        if reason:
            self.rejected.add(("box", "rejected", image, number, reason))

    def config(self, out: Path | str, **more: Any) -> ShardConfig:
        return ShardConfig(annotations=f"{self.root}/a.json", images=f"{self.root}/images", out=str(out), **more)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def done(mixed: Mixed, ray_session: None) -> tuple[Manifest, str]:
    out = str(mixed.root / "shards")
    return run(mixed.config(out)), out


def rows(out: str, manifest: Manifest) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in storage.shard_files(out, manifest)]
    assert all(table.schema.equals(SHARD_SCHEMA) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


# --- accounting ---


def test_what_is_kept(mixed: Mixed, done: tuple[Manifest, str]) -> None:
    manifest, out = done
    found = rows(out, manifest)
    assert [row["image_id"] for row in found] == [1, 2, 3, 4, 5, 6, 7, 9, 14]
    for row in found:
        assert row["image"] == (mixed.root / "images" / row["file_name"]).read_bytes(), "bytes are kept as they are"
        assert (row["width"], row["height"]) == SIZE
        assert images.decode(row["image"]).shape == (SIZE[1], SIZE[0], 3)
    boxes = {number: box for row in found for number, box in zip(row["annotation_ids"], row["boxes"], strict=True)}
    assert boxes == mixed.kept_boxes
    assert [c.name for c in manifest.categories] == ["stuff", "thing"]
    assert {label for row in found for label in row["labels"]} == {1}
    masks = {n: mask for row in found for n, mask in zip(row["annotation_ids"], row["masks"], strict=True)}
    assert [number for number, mask in masks.items() if mask is not None] == [147]
    assert masks[147] == coco.rle_counts([[3, 3, 7, 3, 7, 7, 3, 7]], SIZE[1], SIZE[0])


def test_what_is_rejected(mixed: Mixed, done: tuple[Manifest, str]) -> None:
    _, out = done
    table = pq.read_table(f"{out}/{REJECTS}")
    assert table.schema.equals(REJECT_SCHEMA)
    found = [(r["kind"], r["action"], r["image_id"], r["annotation_id"], r["reason"]) for r in table.to_pylist()]
    assert set(found) == mixed.rejected
    assert len(found) == len(set(found))


def test_counts_add_up(mixed: Mixed, done: tuple[Manifest, str]) -> None:
    counts = done[0].counts
    assert counts["entered_images"] == len(mixed.images) == counts["images"] + counts["rejected_images"]
    assert counts["entered_boxes"] == len(mixed.annotations) == counts["boxes"] + counts["rejected_boxes"]
    assert counts["boxes"] == len(mixed.kept_boxes)
    assert {k: counts[k] for k in ("masks", "rejected_masks", "clipped_boxes", "images_without_boxes")} == {
        "masks": 1,
        "rejected_masks": 1,
        "clipped_boxes": 1,
        "images_without_boxes": 1,
    }


def test_a_lost_box_is_an_error(mixed: Mixed) -> None:
    corpus = coco.parse((mixed.root / "a.json").read_bytes(), "a.json")
    counts = json.dumps({"images": 10, "boxes": 3})
    with pytest.raises(RuntimeError, match="images do not add up"):
        shards._reconcile(corpus, [{"counts": counts, "rejects": [], "file": None}], mixed.config("unused"), {})


def test_boxes_of_turned_pixels(mixed: Mixed, ray_session: None, tmp_path: Path) -> None:
    content = json.loads((mixed.root / "a.json").read_text())
    content["images"] = [{"id": 7, "file_name": "sub/turned.jpg", "width": SIZE[1], "height": SIZE[0]}]
    content["annotations"] = [{"id": 1, "image_id": 7, "bbox": [2, 20, 3, 4], "category_id": 4}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    config = replace(mixed.config(tmp_path / "out"), annotations=str(tmp_path / "a.json"))
    with pytest.raises(InputError, match=r"none of 1 can be used: 1 size disagrees.*agrees with --exif applied"):
        run(config)
    manifest = run(replace(config, exif="applied"))
    (row,) = rows(config.output, manifest)
    assert manifest.exif == "applied"
    assert (row["width"], row["height"]) == SIZE[::-1]
    assert row["boxes"] == [[2, 20, 5, 24]]
    assert images.decode(row["image"], exif=manifest.exif).shape == (SIZE[0], SIZE[1], 3)


def test_real_photographs(data_dir: Path, ray_session: None, tmp_path: Path) -> None:
    root = data_dir / "coco128"
    manifest = run(ShardConfig(f"{root}/annotations/instances_train.json", f"{root}/images", str(tmp_path / "out")))
    counts = manifest.counts
    assert (counts["images"], counts["boxes"], counts["masks"], counts["images_without_boxes"]) == (108, 800, 800, 2)
    assert len(manifest.categories) == 80


# --- the same again ---


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ShardConfig:
    """Images of 0.75 MB that fill four shards of 1 MB."""
    root = tmp_path_factory.mktemp("large")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for number in range(4):
        noise = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{number}.png", compress_level=0)
        entries.append({"id": number, "file_name": f"{number}.png", "width": 500, "height": 500})
    boxes = [{"id": n, "image_id": n, "bbox": [1, 1, 9, 9], "category_id": 1} for n in range(4)]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "noise"}]}
    (root / "a.json").write_text(json.dumps(content))
    return ShardConfig(f"{root}/a.json", f"{root}/images", str(root / "shards"), target_mb=1)


@pytest.fixture(scope="module")
def large_manifest(large: ShardConfig, ray_session: None) -> Manifest:
    return run(large)


def test_shards_are_about_as_large_as_asked(large_manifest: Manifest) -> None:
    assert [file.rows for file in large_manifest.files] == [1, 1, 1, 1]
    assert [file.path for file in large_manifest.files] == [f"shard-{n:05d}.parquet" for n in range(4)]
    assert all(0.7e6 < file.bytes < 1.1e6 for file in large_manifest.files)


def test_same_input_same_hash(
    large: ShardConfig, large_manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    config = replace(large, out=str(out))
    manifest = run(config)
    assert manifest.hash == large_manifest.hash
    assert manifest.files == large_manifest.files
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(config) == manifest
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(InputError, match="--overwrite"):
        run(replace(config, target_mb=64))
    merged = run(replace(config, target_mb=64, overwrite=True))
    assert [file.rows for file in merged.files] == [4]
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, REJECTS, "shard-00000.parquet"]


def test_from_s3_to_s3(
    s3: str, s3_proxy: FaultProxy, corpus: SyntheticCorpus, ray_session: None, shards: dict[str, str]
) -> None:
    for path in Path(corpus.images).iterdir():
        storage.write_bytes(f"{s3}/data/images/{path.name}", path.read_bytes())
    storage.write_bytes(f"{s3}/data/a.json", Path(corpus.val).read_bytes())
    before = len(s3_proxy.keys)
    manifest = run(ShardConfig(f"{s3}/data/a.json", f"{s3}/data/images/", f"{s3}/out/val"))
    asked = Counter(operation for operation, key in s3_proxy.keys[before:] if "/data/images/" in key)
    assert asked == {"GetObject": 4}, "each image is one request"
    written = [key for operation, key in s3_proxy.keys[before:] if operation in ("PutObject", "UploadPart")]
    written = [key for key in written if not key.endswith(".claim")]  # which is written anew as a sign of life
    assert len(written) == 4, "the mark, one shard, the rejects and the manifest, however many images there are"
    assert manifest.hash == storage.read_manifest(shards["val"]).hash
    assert storage.read_manifest(f"{s3}/out/val", "shards") == manifest
    assert set(storage.list_files(f"{s3}/out/val")) == {MANIFEST, REJECTS, "shard-00000.parquet"}


@pytest.mark.long
def test_killed_and_run_again(large: ShardConfig, large_manifest: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    config = replace(large, out=str(out))
    code = f"from pipelines.shards import ShardConfig, run; run({config!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(out.glob("shard-*")):
            assert process.poll() is None, "it ended without writing a shard"
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / MANIFEST).exists()
    (out / "shard-00003.parquet.0123.partial").write_bytes(b"half of a shard")
    assert run(config).hash == large_manifest.hash
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, REJECTS, *(f.path for f in large_manifest.files)]


# --- bad input, before any work ---


@pytest.mark.usefixtures("s3")
def test_bad_input(mixed: Mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.start", lambda: pytest.fail("work has begun"))
    config = mixed.config(tmp_path / "out")
    nothing, text, listing = tmp_path / "nothing", tmp_path / "text.json", tmp_path / "list.json"
    nothing.mkdir()
    text.write_text("hello")
    listing.write_text('{"images": []}')
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "letter.txt").touch()
    cases = [
        ({"annotations": f"{nothing}/no.json"}, r"--annotations: .*no\.json does not exist\. Correct the path"),
        ({"annotations": str(text)}, r"--annotations: .*text\.json is not JSON .*\. Give a COCO JSON file"),
        ({"annotations": str(listing)}, r'--annotations: .*no list "annotations"\. A COCO file has'),
        ({"images": f"{nothing}/no"}, r"--images: .*nothing/no does not exist\. Correct"),
        ({"images": str(nothing)}, r"--images: .*is empty\. Give the folder"),
        (
            {"images": str(mixed.root)},
            r"--images: no file of .*RGB\.png.*, which holds .*\. Give the folder",
        ),
        ({"images": "s3://no-such-bucket/x"}, r"s3://no-such-bucket: no such bucket at http://127"),
        ({"out": str(strange)}, r"output folder: .*something else \(letter\.txt\)\. Give another"),
        ({"out": "s3://no-such-bucket/x"}, r"s3://no-such-bucket: no such bucket at http://127"),
    ]
    for change, message in cases:
        with pytest.raises(InputError, match=message):
            run(replace(config, **change))
    with pytest.raises(InputError, match=r"--target-mb: 0\. Give 1 or more"):
        replace(config, target_mb=0)
    with pytest.raises(InputError, match=r"--exif: turned\. Give stored or applied"):
        replace(config, exif="turned")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with claims.held(out, "--out"), pytest.raises(InputError, match=r"--out: .* is being written by"):
        run(ShardConfig("none.json", "none", out))


def test_nothing_usable_says_why(mixed: Mixed, ray_session: None, tmp_path: Path) -> None:
    content = json.loads((mixed.root / "a.json").read_text())
    content["images"] = [entry for entry in copy.deepcopy(content["images"]) if entry["id"] in (8, 10, 13)]
    (tmp_path / "a.json").write_text(json.dumps(content))
    config = replace(mixed.config(tmp_path / "out"), annotations=str(tmp_path / "a.json"))
    with pytest.raises(InputError, match=r"--images: none of 3 can be used: .*2 unreadable image.*The first: .*png: "):
        run(config)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_default_output(home: Path) -> None:
    assert ShardConfig("x/instances_train.json", "y").output == f"{home}/shards/instances_train"
