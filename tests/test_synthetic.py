"""The drawn corpus: deterministic, exact, and far from what boxes alone would give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from boxinst.errors import InputError
from pipelines.synthetic import CLASSES, SyntheticConfig, SyntheticCorpus, draw, write


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(SyntheticConfig(out=str(tmp_path / name), train=2, val=1, size=64, seed=seed))
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a["images/00001.png"] != c["images/00001.png"]


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    write(SyntheticConfig(out=str(tmp_path / "a"), train=1, val=1, size=64))
    write(SyntheticConfig(out=str(tmp_path / "b"), train=3, val=1, size=64))
    assert (tmp_path / "a/images/00001.png").read_bytes() == (tmp_path / "b/images/00001.png").read_bytes()


def test_masks_are_disjoint_and_boxes_tight(corpus: SyntheticCorpus) -> None:
    content = json.loads(Path(corpus.train).read_text())
    assert [c["name"] for c in content["categories"]] == list(CLASSES)
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        masks = [mask_api.decode(a["segmentation"]) for a in own]
        assert own
        assert np.sum(masks, 0).max() == 1
        for annotation, mask in zip(own, masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = columns[0], rows[0]
            assert annotation["bbox"] == [x, y, columns[-1] - x + 1, rows[-1] - y + 1]
            assert annotation["area"] == mask.sum() > 15


def test_a_mask_covers_what_was_drawn() -> None:
    for seed in range(5):
        pixels, masks, labels = draw(96, 5, np.random.default_rng(seed))
        assert len(masks) == len(labels)
        for mask in masks:  # inside is unlike the ring around it
            grown = np.asarray(Image.fromarray(mask).resize((96, 96)))
            around = np.zeros_like(grown)
            for shift in ((0, 3), (0, -3), (3, 0), (-3, 0)):
                around |= np.roll(grown, shift, (0, 1))
            around &= ~np.any(masks, 0)
            inside, outside = pixels[mask].mean(0), pixels[around].mean(0)
            assert np.abs(inside - outside).max() > 20


def test_boxes_and_ellipses_are_poor_masks(corpus: SyntheticCorpus) -> None:
    filled, ellipses = [], []
    for annotation in json.loads(Path(corpus.train).read_text())["annotations"]:
        mask = mask_api.decode(annotation["segmentation"]).astype(bool)
        x, y, w, h = annotation["bbox"]
        rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
        box = (columns > x) & (columns < x + w) & (rows > y) & (rows < y + h)
        ellipse = ((columns - x - w / 2) * 2 / w) ** 2 + ((rows - y - h / 2) * 2 / h) ** 2 <= 1
        filled.append((mask & box).sum() / (mask | box).sum())
        ellipses.append((mask & ellipse).sum() / (mask | ellipse).sum())
    assert np.mean(filled) < 0.6
    assert np.mean(ellipses) < 0.65


def test_boxes_only_twin(corpus: SyntheticCorpus) -> None:
    for full, boxes in ((corpus.train, corpus.train_boxes), (corpus.val, corpus.val_boxes)):
        one, two = json.loads(Path(full).read_text()), json.loads(Path(boxes).read_text())
        assert one["images"] == two["images"]
        assert one["categories"] == two["categories"]
        for a, b in zip(one["annotations"], two["annotations"], strict=True):
            assert b["area"] == b["bbox"][2] * b["bbox"][3]
            del a["segmentation"], a["area"], b["area"]
            assert a == b


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"--out: .* holds something else\. Give another folder"):
        write(SyntheticConfig(out=str(tmp_path)))
    with pytest.raises(InputError, match=r"--size: 3\. Give 64 or more"):
        SyntheticConfig(out="x", size=3)
