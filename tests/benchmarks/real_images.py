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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

METRICS = ("mask_iou", "mask_ap", "mask_ap50", "box_ap")
SMALL_NETWORK = "--recipe nuclei --model.mask-stride 4 --model.contrast-stretch None --loss.bottom-pixels 10"


@dataclass(frozen=True)
class Variant:
    """One row of a table."""

    corpus: str
    labels: str
    """Split to train on: the boxes-only twin, or the one with masks."""
    about: str
    train: str
    """Options of `boxinst train`."""
    mode: str = "prompt"
    short_side: int = 0


VARIANTS = {
    "nuclei-boxes": Variant("nuclei", "train_boxes", "boxes alone", "--recipe nuclei"),
    "nuclei-masks": Variant("nuclei", "train", "all masks, same network and schedule", "--recipe nuclei"),
    "nuclei-projection": Variant(
        "nuclei", "train_boxes", "boxes, projection loss alone", "--recipe nuclei --loss.pairwise-weight 0"
    ),
    "nuclei-detect": Variant(
        "nuclei",
        "train_boxes",
        "boxes, detection without given boxes",
        "--recipe nuclei --model.detect --model.no-prompt --model.mask-stride 4 --loss.max-positives 32 "
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


def shard(data: Path, out: Path, corpus: str, split: str) -> str:
    """Shards of a split, made once."""
    from pipelines import shards

    uri = str(out / "shards" / f"{corpus}-{split}")
    annotations = data / corpus / "annotations" / f"instances_{split}.json"
    shards.run(shards.ShardConfig(annotations=str(annotations), images=str(data / corpus / "images"), out=uri))
    return uri


def measure(name: str, data: Path, out: Path) -> dict[str, Any]:
    """One row: train (or find trained) and evaluate."""
    from jobs import options
    from pipelines import evaluate, train

    variant = VARIANTS[name]
    val = shard(data, out, variant.corpus, "val")
    argv = f"{variant.train} --shards {shard(data, out, variant.corpus, variant.labels)} --val {val} --name {name}"
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
    return {"name": name, "model": trained.model, "minutes": trained.seconds / 60, "steps": trained.steps, **figures}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one corpus as Markdown, under their baselines."""
    lines = ["| masks from | steps | minutes | mask IoU | mask AP | AP50 | box AP |", "|---|---|---|---|---|---|---|"]

    def line(about: str, steps: str, minutes: str, figures: dict[str, Any], prefix: str = "") -> None:
        cells = (f"{figures[prefix + m]:.3f}" if prefix + m in figures else "-" for m in METRICS)
        lines.append(f"| {about} | {steps} | {minutes} | " + " | ".join(cells) + " |")

    given = next((row for row in rows if "filled_box_mask_iou" in row), None)
    if given:
        line("the filled box", "-", "-", given, "filled_box_")
        line("the inscribed ellipse", "-", "-", given, "inscribed_ellipse_")
    for row in rows:
        line(VARIANTS[row["name"]].about, str(row["steps"]), f"{row['minutes']:.1f}", row)
    by_name = {row["name"]: row for row in rows}
    if {"nuclei-boxes", "nuclei-masks"} <= set(by_name):
        ratio = by_name["nuclei-boxes"]["mask_ap"] / by_name["nuclei-masks"]["mask_ap"]
        lines.append(f"\nBoxes alone reach {ratio:.3f} of the mask AP of all masks.")
    return "\n".join(lines)


def picture(model_folder: str, val: str, out: Path, image_ids: tuple[int, ...] = ()) -> None:
    """Boxes, our masks and true masks of some validation images, side by side: one row per image."""
    import torch

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
    parser.add_argument("--images", nargs="*", type=int, default=[], help="ids of the images in the picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["BOXINST_HOME"] = str(args.out.absolute())
    rows = []
    for name in args.only:
        measured = args.out / f"{name}.json"
        if not measured.exists():
            measured.write_text(json.dumps(measure(name, args.data, args.out), indent=2) + "\n")
        rows.append(json.loads(measured.read_text()))
    for corpus in ("nuclei", "coco128"):
        mine = [row for row in rows if VARIANTS[row["name"]].corpus == corpus]
        if mine:
            print(f"\n{corpus}, val, maxDets 1000\n\n{table(mine)}")
    boxes = next((row for row in rows if row["name"] == "nuclei-boxes"), None)
    if boxes:
        picture(boxes["model"], shard(args.data, args.out, "nuclei", "val"), args.out, tuple(args.images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
