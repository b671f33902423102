"""Which boxes a reviewer sees, and their images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from reviewing import picture, png, write_masks, write_shards

from pipelines import images, selection, storage
from pipelines.schema import Manifest


@pytest.fixture
def masks(tmp_path: Path) -> tuple[str, Manifest]:
    shards = write_shards(str(tmp_path), str(tmp_path / "images"), 6)
    uri = write_masks(str(tmp_path), shards)
    return uri, storage.read_manifest(uri)


def test_the_worst_come_first_and_what_has_no_mask_before_them(masks: tuple[str, Manifest]) -> None:
    chosen = selection.select(*masks, limit=3, audit=0, seed=0)
    rows = selection.read_rows(*masks, np.arange(100))
    by_id = {r["annotation_id"]: r for image in rows.values() for r in image}
    failed = {i for i, r in by_id.items() if r["status"] != "ok"}
    assert failed == {21}
    assert failed < set(chosen.ids.tolist())
    ranked = sorted(by_id.keys() - failed, key=lambda i: by_id[i]["box_iou"])
    assert set(chosen.ids.tolist()) == failed | set(ranked[:2])
    assert len(chosen.audit) == 0
    assert chosen.total == 12


def test_what_passes_batch_by_batch_is_chosen_from_all() -> None:
    rng = np.random.default_rng(0)
    ids, values = rng.permutation(5000), rng.integers(0, 50, 5000).astype(np.float32)  # many are equal
    least = selection._Least(700)
    for part in np.array_split(np.arange(5000), 13):
        least.add(values[part], ids[part])
        assert sum(len(kept) for _, kept in least._kept) <= 700
    assert set(least.ids) == set(ids[np.lexsort((ids, values))[:700]])


def test_lots_are_even_and_belong_to_the_id() -> None:
    ids = np.arange(100_000)
    for seed in (0, 1, 7):
        lots = selection._lots(ids, seed)
        assert np.array_equal(selection._lots(ids[::-1], seed), lots[::-1])
        shares = np.bincount(lots >> np.uint64(61), minlength=8) / len(ids)
        assert shares == pytest.approx(1 / 8, abs=0.005)
    first, second = (np.argsort(selection._lots(ids, seed))[:1000] for seed in (0, 1))
    assert len(np.intersect1d(first, second)) < 40  # 10 by chance


def test_zero_takes_all(masks: tuple[str, Manifest]) -> None:
    chosen = selection.select(*masks, limit=0, audit=2, seed=0)
    assert len(chosen.ids) == 12
    assert len(chosen.audit) == 2


def test_the_random_sample_is_a_function_of_the_seed(masks: tuple[str, Manifest]) -> None:
    def drawn(seed: int) -> set[int]:
        return set(selection.select(*masks, limit=1, audit=5, seed=seed).audit.tolist())

    assert drawn(1) == drawn(1)
    assert len({frozenset(drawn(seed)) for seed in range(8)}) > 1
    assert len(selection.select(*masks, limit=1, audit=1000, seed=0).audit) == 12


def test_media_is_the_original_or_comes_from_the_shards(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "images"
    uri = write_shards(str(tmp_path), str(folder), 4)
    manifest = storage.read_manifest(uri)
    (folder / "001.png").unlink()
    (folder / "002.png").write_bytes(png(picture(77)))  # changed since
    files = dict(selection.media(uri, manifest, {0, 1, 2}))
    assert files.keys() == {0, 1, 2}
    assert files[0] == str(folder / "000.png")
    for number in (1, 2):
        assert Path(files[number]).is_relative_to(home / "cache" / "media" / manifest.hash)
        assert np.array_equal(np.asarray(Image.open(files[number])), picture(number))
    assert dict(selection.media(uri, manifest, {0, 1, 2})) == files


def test_media_of_s3_is_cached_for_what_is_reviewed_only(s3: str, tmp_path: Path, home: Path) -> None:
    uri = write_shards(f"{s3}/corpus", str(tmp_path / "gone"), 4)
    manifest = storage.read_manifest(uri)
    for file in (tmp_path / "gone").iterdir():
        file.unlink()
    files = dict(selection.media(uri, manifest, {3}))
    assert list(files) == [3]
    assert [str(p) for p in (home / "cache" / "media").rglob("*.png")] == [files[3]]
    assert np.array_equal(np.asarray(Image.open(files[3])), picture(3))


@pytest.mark.parametrize("kind", ["tiff", "deep", "turned", "cmyk"])
@pytest.mark.parametrize("exif", ["stored", "applied"])
def test_a_browser_gets_the_pixels_that_the_boxes_refer_to(kind: str, exif: images.Exif) -> None:
    pixels = picture(0)
    if kind == "tiff":
        data = png(pixels, "TIFF")
    elif kind == "deep":
        data = png(pixels[..., 0].astype(np.uint16) * 257)
    else:
        stream, image = io.BytesIO(), Image.fromarray(pixels)
        orientation = Image.Exif()
        if kind == "cmyk":
            image = image.convert("CMYK")
        else:
            orientation[ExifTags.Base.Orientation] = 6
        image.save(stream, "JPEG", exif=orientation)
        data = stream.getvalue()
    shown = selection._for_browser(data, exif)
    assert shown is not None
    with Image.open(io.BytesIO(shown)) as image:
        assert image.format == "PNG"
        assert image.getexif().get(ExifTags.Base.Orientation) is None
        assert np.array_equal(np.asarray(image), images.decode(data, exif=exif))


def test_plain_files_are_shown_as_they_are() -> None:
    for data in (png(picture(0)), png(picture(0), "JPEG"), png(picture(0)[..., 0])):
        assert selection._for_browser(data, "stored") is None


def test_file_names_cannot_leave_the_cache(tmp_path: Path, home: Path) -> None:
    row = {"image_id": 5, "file_name": "../../../outside.png", "image": png(picture(0))}
    manifest = storage.read_manifest(write_shards(str(tmp_path), str(tmp_path / "images"), 1))
    path = Path(selection._file(row, replace(manifest, source={})))
    assert path == home / "cache" / "media" / manifest.hash / "5.png"
