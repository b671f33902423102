"""What a walk has found, as the demo's table and as its report."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import boxinst
from boxinst.transforms import eval_resize
from boxinst.visualize import overlay, to_png
from jobs import options
from jobs.report import Quality, Report
from jobs.walk import Outcome, Walk
from pipelines import inference, registry, settings, storage, tracking
from pipelines.config import Resolution
from pipelines.samples import sample_from_row

PICTURES = 4
"""Validation images in the report."""
SIDE = 320
"""Least shorter side of a picture in pixels, so that outlines stay thin on small images."""
LOSSES = ("loss", "projection", "pairwise", "dice", "cls", "box", "centerness")


def table(walk: Walk, out: Outcome) -> str:
    """The result in a dozen lines."""
    figures, speed = out.figures, _history(out.trained.run_id, "train/images_per_second")
    rows = [
        ("images", f"{out.shards.counts['images']:,} to train on, {out.val.counts['images']:,} held out"),
        ("boxes", f"{out.shards.counts['boxes']:,} to train on, {out.val.counts['boxes']:,} held out"),
        ("images/s, training", f"{speed[-1][1]:.1f}" if speed else "-"),
        ("images/s, segmenting", f"{figures['images_per_second']:.1f}" if "images_per_second" in figures else "-"),
    ]
    for quality in _quality(figures):
        if quality.mask_iou is not None:
            rows.append((f"mask IoU, {quality.name}", f"{quality.mask_iou:.3f}"))
    rows += [
        ("consistency with boxes", f"{figures['box_iou']:.3f}"),
        ("verdicts", ", ".join(f"{number:,} {verdict}" for verdict, number in out.verdicts.most_common())),
        ("model", f"models:/{out.champion.label}, alias champion"),
        ("time", f"{sum(step.seconds for step in walk.steps):.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows)


def report(walk: Walk, out: Outcome) -> Report:
    """The result as a page."""
    counts, figures = out.shards.counts, out.figures
    seconds = sum(step.seconds for step in walk.steps)
    headline = [("Consistency with the boxes", f"{figures['box_iou']:.3f}")]
    if "mask_iou" in figures:
        headline = [("Mean mask IoU, held out", f"{figures['mask_iou']:.3f}"), ("Mask AP", f"{figures['mask_ap']:.3f}")]
    truth = "the true masks" if "mask_iou" in figures else "and nothing to compare with: this corpus has no masks"
    taught = ", and not one mask," if not counts["masks"] else f" and {counts['masks']:,} masks"
    return Report(
        title=f"From boxes to masks: {walk.name}",
        lead=f"{counts['images']:,} images with {counts['boxes']:,} boxes{taught} became a registered model, "
        f"{out.masks.counts['ok']:,} masks and a reviewed corpus in {seconds / 60:.1f} minutes "
        f"on {len(os.sched_getaffinity(0))} cores.",
        figures=[
            *headline,
            ("Images", f"{counts['images']:,}"),
            ("Boxes", f"{counts['boxes']:,}"),
            ("Images per second", f"{figures.get('images_per_second', 0):.1f}"),
            ("Champion", out.champion.label),
        ],
        pictures_note=f"Held-out images, which training has not seen: the boxes given, our masks, {truth}.",
        pictures=pictures(walk, out),
        quality_note=f"One mask for every given box on {out.val.counts['images']:,} held-out images. The ellipse and "
        "the box need no learning: they are what a model has to beat.",
        quality=_quality(figures),
        curves=_curves(out.trained.run_id),
        steps=walk.steps,
        commands=_commands(walk),
        environment=_environment(walk),
    )


def pictures(walk: Walk, out: Outcome) -> list[list[tuple[str, bytes]]]:
    """Rows of (caption, PNG) for a few validation images, spread evenly: boxes, our masks and the true masks."""
    model = boxinst.load(registry.resolve(out.trained.version))
    asked = options.recipe_section(walk.recipe, "evaluate")
    resolution = Resolution(asked.get("short_side", 0), asked.get("max_side", 1333))
    count = out.val.counts["images"]
    chosen = {k * count // PICTURES for k in range(min(PICTURES, count))}
    rows = (row for table in storage.row_groups(walk.at("shards", "val"), out.val) for row in table.to_pylist())
    return [_picture(model, row, resolution, out.val.exif) for k, row in enumerate(rows) if k in chosen]


def _picture(
    model: boxinst.CondInst, row: Mapping[str, Any], resolution: Resolution, exif: Literal["stored", "applied"]
) -> list[tuple[str, bytes]]:
    image, targets, _ = sample_from_row(row, exif=exif)
    targets = targets[~targets.crowd]
    pieces = inference.segment(model, [image], [targets.boxes], resolution)
    masks = torch.cat([*(piece.masks for _, _, piece in pieces), torch.zeros(0, *image.shape[1:], dtype=torch.bool)])
    shown, scale = eval_resize(image, SIDE, 2 * SIDE)

    def tinted(masks: Tensor) -> bytes:
        resized = F.interpolate(masks[None].float(), size=shown.shape[1:])[0] > 0 if len(masks) else masks
        return to_png(overlay(shown, masks=resized))

    made = [("boxes given", to_png(overlay(shown, targets.boxes * scale))), ("our masks", tinted(masks))]
    return made if targets.masks is None else [*made, ("true masks", tinted(targets.masks))]


def _quality(figures: Mapping[str, float]) -> list[Quality]:
    baselines = {"inscribed ellipse": "inscribed_ellipse_", "filled box": "filled_box_"}
    rows = [Quality("our masks", figures.get("mask_iou"), figures.get("mask_ap"), ours=True)]
    for name, key in baselines.items():
        rows.append(Quality(name, figures.get(f"{key}mask_iou"), figures.get(f"{key}mask_ap")))
    return rows


def _curves(run_id: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    curves = {
        "Training loss": {name: _history(run_id, f"train/{name}") for name in LOSSES},
        "Validation": {name: _history(run_id, f"val/{name}") for name in ("mask_iou", "mask_ap", "box_iou")},
        "Learning rate": {"learning rate": _history(run_id, "train/learning_rate")},
    }
    # A term that is always 0, such as dice without mask labels, was not trained on.
    return {t: {name: p for name, p in lines.items() if any(v for _, v in p)} for t, lines in curves.items()}


def _history(run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in registry.client().get_metric_history(run_id, metric)]


def _commands(walk: Walk) -> list[tuple[str, str]]:
    train, val, masks, corpus = (
        walk.at("shards", "train"),
        walk.at("shards", "val"),
        walk.at("masks"),
        walk.at("next.json"),
    )
    second, again = walk.at("shards", "next"), f"{walk.name}-2"
    return [
        (
            "Look at the masks, give verdicts, correct some",
            f"boxinst review --masks {masks} --shards {train} --dataset {walk.name} --app",
        ),
        (
            "Turn the verdicts into the next corpus",
            f"boxinst feedback --dataset {walk.name} --out {corpus} --overwrite",
        ),
        (
            "Train on accepted masks and boxes together, and compare",
            f"boxinst shard --annotations {corpus} --images {walk.corpus.images} --out {second}\n"
            f"boxinst train --recipe {walk.recipe} --shards {second} --val {val} --name {again} "
            f"--init models:/{walk.name}@champion\n"
            f"boxinst evaluate --recipe {walk.recipe} --model models:/{again}/1 --shards {val}",
        ),
        (
            "See every run, curve and model",
            f"mlflow ui --host 127.0.0.1 --backend-store-uri {storage.redact(settings.mlflow_uri())}",
        ),
    ]


def _environment(walk: Walk) -> dict[str, str]:
    packages = ("boxinst", "torch", "torchvision", "ray", "mlflow", "fiftyone")
    return {
        "packages": ", ".join(f"{name} {version(name)}" for name in packages),
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "git revision": tracking.revision() or "not in a repository",
        "recipe": walk.recipe,
        "home": str(settings.home()),
    }
