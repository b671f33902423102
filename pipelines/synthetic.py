"""A small corpus with exact masks, drawn: shapes of four classes that overlap on a textured ground.

The shapes are far from their box and from the ellipse inscribed in it, so that a method has something to win.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api

from boxinst.errors import InputError

CLASSES = ("triangle", "star", "crescent", "cross")

COLORS = np.array([[214, 96, 62], [236, 186, 66], [112, 108, 196], [44, 150, 140]], np.float32)
"""One RGB per class; every object varies it a little."""

GROUNDS = np.array([[74, 82, 92], [92, 104, 84], [104, 92, 82], [196, 200, 196]], np.float32)

OVERSAMPLE = 4
"""Shapes are drawn this many times larger and averaged down, which smooths their edges."""

LEAST_VISIBLE = 0.5
"""A shape is placed only where at least this share of each shape below it stays visible."""


@dataclass(frozen=True)
class SyntheticConfig:
    """What to draw."""

    out: str
    """Folder for ``images/`` and ``annotations/``. It must be absent or hold an earlier synthetic corpus."""
    train: int = 64
    """Number of training images."""
    val: int = 16
    """Number of validation images."""
    size: int = 192
    """Width and height in pixels."""
    objects: int = 7
    """Largest number of shapes in an image; every image has at least one."""
    seed: int = 0
    """The same seed draws the same corpus."""

    def __post_init__(self) -> None:
        for name, least in (("train", 1), ("val", 1), ("size", 64), ("objects", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}", getattr(self, name), f"Give {least} or more.")


@dataclass(frozen=True)
class SyntheticCorpus:
    """Where the parts of a corpus are."""

    images: str
    """Folder of the images."""
    train: str
    """COCO JSON with masks; the ``_boxes`` twins have no ``segmentation``, and ``area`` is that of the box."""
    train_boxes: str
    val: str
    val_boxes: str


def write(config: SyntheticConfig) -> SyntheticCorpus:
    """Draw the corpus.

    Raises:
        InputError: the folder holds something else.
    """
    root = Path(config.out)
    images, annotations = root / "images", root / "annotations"
    if root.exists() and {p.name for p in root.iterdir()} - {"images", "annotations"}:
        raise InputError("--out", f"{root} holds something else", "Give another folder, or empty this one.")
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    paths = {"images": str(images)}
    first = 1
    for split, count in (("train", config.train), ("val", config.val)):
        content = _split(config, images, first, count)
        first += count
        for name, twin in ((split, content), (f"{split}_boxes", _boxes_only(content))):
            paths[name] = str(annotations / f"instances_{name}.json")
            Path(paths[name]).write_text(json.dumps(twin))
    return SyntheticCorpus(**paths)


def _split(config: SyntheticConfig, folder: Path, first: int, count: int) -> dict[str, Any]:
    """Draw images ``first`` to ``first + count - 1`` and return their COCO content."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(first, first + count):
        pixels, masks, labels = draw(config.size, config.objects, np.random.default_rng((config.seed, image_id)))
        name = f"{image_id:05d}.png"
        Image.fromarray(pixels).save(folder / name)
        entries.append({"id": image_id, "file_name": name, "width": config.size, "height": config.size})
        for number, (mask, label) in enumerate(zip(masks, labels, strict=True)):
            rle = mask_api.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {
                    "id": image_id * 100 + number,
                    "image_id": image_id,
                    "category_id": int(label) + 1,
                    "bbox": [float(v) for v in mask_api.toBbox(rle)],
                    "area": float(mask_api.area(rle)),
                    "iscrowd": 0,
                    "segmentation": {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    return {"images": entries, "annotations": annotations, "categories": categories}


def _boxes_only(content: dict[str, Any]) -> dict[str, Any]:
    """The twin that a corpus with box labels alone would have."""
    annotations = []
    for annotation in content["annotations"]:
        rest = {key: value for key, value in annotation.items() if key != "segmentation"}
        annotations.append({**rest, "area": annotation["bbox"][2] * annotation["bbox"][3]})
    return {**content, "annotations": annotations}


def draw(
    size: int, objects: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]], list[int]]:
    """Draw one image.

    Args:
        size: width and height S in pixels.
        objects: largest number of shapes.
        rng: source of everything random.

    Returns:
        Pixels [S, S, 3], the visible mask [S, S] of each shape from bottom to top, and its label.
    """
    canvas = GROUNDS[rng.integers(len(GROUNDS))] + rng.normal(0, 6, 3)
    canvas = canvas + 26 * _noise(size, 4, rng)[..., None] + 9 * _noise(size, 24, rng)[..., None]
    masks: list[NDArray[np.bool_]] = []
    labels: list[int] = []
    full: list[int] = []
    wanted = int(rng.integers(max(1, objects // 2), objects + 1))
    for _ in range(wanted * 8):
        if len(masks) == wanted:
            break
        label = int(rng.integers(len(CLASSES)))
        coverage = _coverage(CLASSES[label], size, rng)
        solid = coverage >= 0.5
        if any((mask & ~solid).sum() < LEAST_VISIBLE * area for mask, area in zip(masks, full, strict=True)):
            continue
        masks = [mask & ~solid for mask in masks] + [solid]
        labels.append(label)
        full.append(int(solid.sum()))
        canvas = canvas + coverage[..., None] * (_surface(label, size, rng) - canvas)
    canvas = canvas + rng.normal(0, 2.5, canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), masks, labels


def _noise(size: int, cells: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Smooth noise [S, S] in -1..1 with about ``cells`` bumps along a side."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float32)


def _surface(label: int, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Colour [S, S, 3] of an object: its class's, shaded across, with stripes, dots or bumps of its own."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / size
    across = (y * np.cos(angle) - x * np.sin(angle)) / size
    stripes = np.sin(along * rng.uniform(110, 170))
    dots = stripes * np.sin(across * rng.uniform(110, 170))
    pattern = (stripes, dots, _noise(size, 32, rng), np.zeros_like(x))[label]
    shade = 30 * along + 9 * pattern
    return (COLORS[label] + rng.normal(0, 9, 3) + shade[..., None]).astype(np.float32)


def _coverage(shape: str, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """How much of each pixel a shape at a random place, size and angle covers: [S, S] in 0..1."""
    large = size * OVERSAMPLE
    radius = rng.uniform(0.09, 0.22) * large
    center = rng.uniform(radius * 0.6, large - radius * 0.6, 2)
    angle = rng.uniform(0, 2 * np.pi)
    image = Image.new("L", (large, large))
    pen = ImageDraw.Draw(image)
    if shape == "crescent":
        bite = center + radius * rng.uniform(0.45, 0.6) * np.array([np.cos(angle), np.sin(angle)])
        pen.ellipse([*(center - radius), *(center + radius)], fill=1)
        pen.ellipse([*(bite - 0.8 * radius), *(bite + 0.8 * radius)], fill=0)
    else:
        points = center + radius * _outline(shape, rng) @ _rotation(angle)
        pen.polygon([(float(px), float(py)) for px, py in points], fill=1)
    drawn = np.asarray(image, np.float32).reshape(size, OVERSAMPLE, size, OVERSAMPLE)
    return drawn.mean((1, 3))


def _outline(shape: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Corners [n, 2] of a polygon inside the unit circle."""
    if shape == "cross":
        arm, tip = rng.uniform(0.2, 0.3), 0.97
        quarter = np.array([[arm, tip], [arm, arm], [tip, arm]])
        return np.concatenate([quarter @ _rotation(-np.pi / 2 * k) for k in range(4)])
    if shape == "star":
        angles = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
    else:
        angles = np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.25, 0.25, 3)
        reach = np.ones(3)
    return np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1)


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
