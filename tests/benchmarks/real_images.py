"""Train and score on the two real data sets, and print the tables of docs/benchmarks.md.

python tests/benchmarks/real_images.py --data ../shared/data --out bench
python tests/benchmarks/real_images.py --data ../shared/data --out bench --only nuclei-boxes nuclei-masks

Each row is one run of `boxinst train` and `boxinst evaluate` with the options shown; started again, the command goes
on where it was, and what has been measured is not measured again: give another --out for that. The picture of boxes,
our masks and true masks is written beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

METRICS = ("mask_iou", "mask_ap", "mask_ap50", "box_ap")
SHARED = "--recipe nuclei --model.no-exclusive"
"""The recipe with masks that may overlap, as they are learned."""
SHORT = f"{SHARED} --steps 300 --loss.warmup-steps 30 --ema-decay 0.98 --model.views 1"
"""A quarter of the recipe's steps and views, in which the leads are compared."""
QUARTER = f"{SHORT} --loss.region-weight 0.25"
"""With a quarter of the weight that the recipe gives the colours of regions, which all of these rows have alike."""
LIGHT = "--loss.mask-weight 1"
"""A mask label counts no more than a box."""
OURS_OFF = "--loss.fill-range 0 1 --loss.region-weight 0"
"""The losses as published."""
SMALL_NETWORK = (
    "--recipe nuclei --model.no-exclusive --model.mask-stride 4 --model.contrast-stretch None --model.views 1 "
    "--loss.bottom-pixels 10 --loss.warmup-steps 90 "
) + OURS_OFF


@dataclass(frozen=True)
class Variant:
    """One row of a table."""

    corpus: str
    labels: str
    """Split to train on: train_boxes, train with all masks, train_N with the masks of N % of the objects, or
    train_even, the boxes with the images of rare types repeated."""
    about: str
    train: str
    """Options of `boxinst train`."""
    mode: str = "prompt"
    short_side: int = 0


VARIANTS = {
    "short-published": Variant(
        "nuclei", "train_boxes", "projection and pairwise loss, as published", f"{SHORT} {OURS_OFF}"
    ),
    "short-fill": Variant("nuclei", "train_boxes", "+ range of fill", f"{SHORT} --loss.region-weight 0"),
    "short-region": Variant("nuclei", "train_boxes", "+ colours of regions", f"{QUARTER} --loss.fill-range 0 1"),
    "short-boxes": Variant("nuclei", "train_boxes", "+ both, the recipe", QUARTER),
    "short-contrast": Variant(
        "nuclei",
        "train_boxes",
        "recipe, colour distances against local contrast",
        f"{QUARTER} --loss.contrast-reach 16 --loss.theta 0.5",
    ),
    "short-overlap": Variant(
        "nuclei", "train_boxes", "recipe, one owner per pixel", f"{QUARTER} --loss.overlap-weight 0.3"
    ),
    "short-teacher": Variant(
        "nuclei", "train_boxes", "recipe, mean teacher in the second half", f"{QUARTER} --loss.teacher-weight 1"
    ),
    "short-even": Variant("nuclei", "train_even", "recipe, rare types of image repeated", QUARTER),
    "short-masks-5": Variant("nuclei", "train_5", "masks of 5 %, boxes of the rest", QUARTER),
    "short-masks-20": Variant("nuclei", "train_20", "masks of 20 %, boxes of the rest", QUARTER),
    "short-masks": Variant("nuclei", "train", "all masks", QUARTER),
    "short-masks-5-light": Variant("nuclei", "train_5", "masks of 5 %, of weight 1", f"{QUARTER} {LIGHT}"),
    "short-masks-20-light": Variant("nuclei", "train_20", "masks of 20 %, of weight 1", f"{QUARTER} {LIGHT}"),
    "short-masks-light": Variant("nuclei", "train", "all masks, of weight 1", f"{QUARTER} {LIGHT}"),
    "nuclei-boxes": Variant("nuclei", "train_boxes", "boxes alone", "--recipe nuclei"),
    "nuclei-shared": Variant("nuclei", "train_boxes", "boxes alone, masks may overlap", SHARED),
    "nuclei-region-0": Variant(
        "nuclei", "train_boxes", "boxes alone, without the colours of regions", f"{SHARED} --loss.region-weight 0"
    ),
    "nuclei-region-25": Variant(
        "nuclei", "train_boxes", "boxes alone, a quarter of their weight", f"{SHARED} --loss.region-weight 0.25"
    ),
    "nuclei-contrast": Variant(
        "nuclei",
        "train_boxes",
        "boxes alone, colour distances against local contrast",
        f"{SHARED} --loss.contrast-reach 16 --loss.theta 0.5",
    ),
    "nuclei-teacher": Variant(
        "nuclei",
        "train_boxes",
        "boxes alone, mean teacher in the second half",
        f"{SHARED} --loss.teacher-weight 1",
    ),
    "nuclei-masks-5": Variant("nuclei", "train_5", "masks of 5 %, boxes of the rest", "--recipe nuclei"),
    "nuclei-masks-20": Variant("nuclei", "train_20", "masks of 20 %, boxes of the rest", "--recipe nuclei"),
    "nuclei-masks": Variant("nuclei", "train", "all masks, same network and schedule", "--recipe nuclei"),
    "nuclei-masks-5-light": Variant("nuclei", "train_5", "masks of 5 %, of weight 1", f"--recipe nuclei {LIGHT}"),
    "nuclei-masks-20-light": Variant("nuclei", "train_20", "masks of 20 %, of weight 1", f"--recipe nuclei {LIGHT}"),
    "nuclei-masks-light": Variant("nuclei", "train", "all masks, of weight 1", f"--recipe nuclei {LIGHT}"),
    "nuclei-masks-shared": Variant("nuclei", "train", "all masks, of weight 1, which may overlap", f"{SHARED} {LIGHT}"),
    "nuclei-projection": Variant(
        "nuclei",
        "train_boxes",
        "boxes, projection loss alone",
        f"{SHARED} --loss.pairwise-weight 0 {OURS_OFF} --model.views 1 --steps 900 --loss.warmup-steps 90",
    ),
    "nuclei-detect": Variant(
        "nuclei",
        "train_boxes",
        "boxes, detection without given boxes",
        f"{SHARED} --model.detect --model.no-prompt --model.mask-stride 4 --loss.max-positives 32 "
        "--steps 300 --loss.warmup-steps 60",
        mode="detect",
    ),
    "coco128-boxes": Variant(
        "coco128",
        "train_boxes",
        "boxes alone, from random weights",
        f"{SMALL_NETWORK} --augment.crop 0 --augment.short-sides 320 --augment.max-side 480 --augment.no-vflip "
        "--steps 600",
        short_side=320,
    ),
}


def annotations_of(data: Path, out: Path, corpus: str, split: str) -> Path:
    """The COCO file of a split; those that are no file of the corpus are made from it, once."""
    given = data / corpus / "annotations" / f"instances_{split}.json"
    made = out / "annotations" / f"{corpus}-{split}.json"
    if given.exists() or made.exists():
        return given if given.exists() else made
    labels = json.loads((given.parent / "instances_train.json").read_text())
    kind = split.removeprefix("train_")
    if kind == "even":
        labels = with_even_types(labels)
    else:
        keep = np.random.default_rng(0).random(len(labels["annotations"])) < int(kind) / 100
        for annotation, kept in zip(labels["annotations"], keep, strict=True):
            if not kept:
                del annotation["segmentation"]
    made.parent.mkdir(exist_ok=True)
    made.write_text(json.dumps(labels))
    return made


def with_even_types(labels: dict[str, Any]) -> dict[str, Any]:
    """Boxes alone, and every image of a type that is f times rarer than the most frequent one √f times, rounded."""
    counts = Counter(image["image_type"] for image in labels["images"])
    boxes = defaultdict(list)
    for annotation in labels["annotations"]:
        annotation.pop("segmentation")
        boxes[annotation["image_id"]].append(annotation)
    images, annotations = [], []
    for image in labels["images"]:
        for _ in range(round((max(counts.values()) / counts[image["image_type"]]) ** 0.5)):
            images.append({**image, "id": len(images) + 1})
            annotations += [{**a, "id": 0, "image_id": len(images)} for a in boxes[image["id"]]]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1
    return {**labels, "images": images, "annotations": annotations}


def shard(data: Path, out: Path, corpus: str, split: str) -> str:
    """Shards of a split, made once."""
    from pipelines import shards

    uri = str(out / "shards" / f"{corpus}-{split}")
    annotations = annotations_of(data, out, corpus, split)
    shards.run(shards.ShardConfig(annotations=str(annotations), images=str(data / corpus / "images"), out=uri))
    return uri


def measure(name: str, data: Path, out: Path, threads: int, seed: int) -> dict[str, Any]:
    """One row: train (or find trained) and evaluate."""
    from jobs import options
    from pipelines import evaluate, train

    variant = VARIANTS[name]
    val = shard(data, out, variant.corpus, "val")
    argv = f"{variant.train} --shards {shard(data, out, variant.corpus, variant.labels)} --val {val} --name {name}"
    argv += f" --cpus-per-worker {threads} --seed {seed}"
    config = options.parse(train.TrainConfig, argv.split(), command="train", about=None)
    trained = train.run(config)
    figures = evaluate.run(
        evaluate.EvaluateConfig(
            model=trained.model,
            shards=val,
            mode=variant.mode,  # type: ignore[arg-type]
            max_detections=1000,
            short_side=variant.short_side,
            max_side=480 if variant.short_side else 1333,
        )
    )
    row = {"name": name, "model": trained.model, "minutes": trained.seconds / 60, "steps": trained.steps, **figures}
    if variant.corpus == "nuclei" and variant.mode == "prompt":
        torch.set_num_threads(threads or torch.get_num_threads())
        row["types"] = by_type(trained.model, val, annotations_of(data, out, "nuclei", "val"))
    return row


def by_type(model_folder: str, val: str, annotations: Path) -> dict[str, dict[str, float]]:
    """Mean mask IoU of the model and of the inscribed ellipse, and the model's AP, for each type of image."""
    import boxinst
    from pipelines import storage
    from pipelines.samples import sample_from_row
    from pipelines.scorecard import Scorecard

    model = boxinst.load(model_folder)
    manifest = storage.read_manifest(val, "shards")
    types = {image["id"]: image["image_type"] for image in json.loads(annotations.read_text())["images"]}
    cards = {kind: Scorecard(model.config.classes, "prompt", 1000, True) for kind in types.values()}
    for file in storage.shard_files(val, manifest):
        for row in pq.read_table(file).to_pylist():
            image, targets, image_id = sample_from_row(row, exif=manifest.exif)
            (found,) = model.segment([image], [targets.boxes])
            cards[types[image_id]].update(image_id, *image.shape[1:], found, targets)
    kept = ("instances", "mask_iou", "inscribed_ellipse_mask_iou", "mask_ap")
    figures = {kind: card.compute() for kind, card in cards.items()}
    return {kind: {name: of_type[name] for name in kept} for kind, of_type in figures.items()}


def type_table(row: dict[str, Any]) -> str:
    """The types of image of one row, as Markdown."""
    lines = ["| type of image | objects | mask IoU | of the inscribed ellipse | mask AP |", "|---|---|---|---|---|"]
    for kind, figures in sorted(row["types"].items(), key=lambda item: -item[1]["instances"]):
        iou, ellipse, ap = (figures[k] for k in ("mask_iou", "inscribed_ellipse_mask_iou", "mask_ap"))
        lines.append(f"| {kind} | {figures['instances']:.0f} | {iou:.3f} | {ellipse:.3f} | {ap:.3f} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one corpus as Markdown, under their baselines."""
    lines = [
        "| masks from | row | steps | minutes | mask IoU | mask AP | AP50 | box AP |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def line(about: str, steps: str, minutes: str, figures: dict[str, Any], prefix: str = "") -> None:
        cells = (f"{figures[prefix + m]:.3f}" if prefix + m in figures else "-" for m in METRICS)
        name = f"`{figures['name']}`" if not prefix else "-"
        lines.append(f"| {about} | {name} | {steps} | {minutes} | " + " | ".join(cells) + " |")

    given = next((row for row in rows if "filled_box_mask_iou" in row), None)
    if given:
        line("the filled box", "-", "-", given, "filled_box_")
        line("the inscribed ellipse", "-", "-", given, "inscribed_ellipse_")
    for row in rows:
        line(VARIANTS[row["name"]].about, str(row["steps"]), f"{row['minutes']:.1f}", row)
    by_name = {row["name"]: row["mask_ap"] for row in rows}
    if {"nuclei-boxes", "nuclei-masks"} <= set(by_name):
        ratio = by_name["nuclei-boxes"] / by_name["nuclei-masks"]
        lines.append(f"\nBoxes alone reach {ratio:.3f} of the mask AP of all masks.")
    return "\n".join(lines)


def picture(model_folder: str, val: str, out: Path, image_ids: tuple[int, ...] = ()) -> None:
    """Boxes, our masks and true masks of some validation images, side by side: one row per image."""
    import boxinst
    from boxinst.visualize import overlay, side_by_side, to_png
    from pipelines import storage
    from pipelines.samples import sample_from_row

    model = boxinst.load(model_folder)
    manifest = storage.read_manifest(val, "shards")
    rows = [row for file in storage.shard_files(val, manifest) for row in pq.read_table(file).to_pylist()]
    fit = [row for row in rows if max(row["width"], row["height"]) <= 360 and 8 <= len(row["boxes"]) <= 60]
    chosen = [row for row in rows if row["image_id"] in image_ids] or fit[:: max(1, len(fit) // 4)][:4]
    strips = []
    for row in chosen:
        image, targets, _ = sample_from_row(row, exif=manifest.exif)
        ours = model.segment([image], [targets.boxes])[0].masks
        panels = [overlay(image, targets.boxes), overlay(image, masks=ours), overlay(image, masks=targets.masks)]
        strips.append(side_by_side(panels, ["given boxes", "our masks (trained on boxes alone)", "true masks"]))
    width = max(strip.shape[2] for strip in strips)
    padded = [torch.nn.functional.pad(strip, (0, width - strip.shape[2], 0, 8), value=255) for strip in strips]
    (out / "nuclei.png").write_bytes(to_png(torch.cat(padded, 1)))
    print(f"Picture: {out / 'nuclei.png'} (images {', '.join(str(row['image_id']) for row in chosen)})")


def main() -> int:
    """Measure the rows asked for, print the tables, write figures and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder that holds nuclei and coco128"
    )
    parser.add_argument("--out", type=Path, default=Path("boxinst-home/benchmarks"), help="runs, shards and figures")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="which rows")
    parser.add_argument("--threads", type=int, default=0, help="of a row; 0 for all cores")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings; give each seed its own --out")
    parser.add_argument("--images", nargs="*", type=int, default=[], help="ids of the images in the picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["BOXINST_HOME"] = str(args.out.absolute())
    rows = []
    for name in args.only:
        measured = args.out / f"{name}.json"
        if not measured.exists():
            figures = measure(name, args.data, args.out, args.threads, args.seed)
            measured.write_text(json.dumps(figures, indent=2) + "\n")
        rows.append(json.loads(measured.read_text()))
    for group in dict.fromkeys(name.split("-")[0] for name in VARIANTS):
        mine = [row for row in rows if row["name"].startswith(f"{group}-")]
        if mine:
            print(f"\n{group}, val, maxDets 1000\n\n{table(mine)}")
    boxes = next((row for row in rows if row["name"] == "nuclei-boxes"), None)
    if boxes:
        print(f"\nnuclei-boxes by type of image\n\n{type_table(boxes)}")
        picture(boxes["model"], shard(args.data, args.out, "nuclei", "val"), args.out, tuple(args.images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
