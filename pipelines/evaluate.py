"""Shards and a model become figures: AP, mask IoU and consistency, beside baselines that need no model."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict

import pyarrow as pa
import ray
import ray.data

import boxinst
from boxinst.errors import InputError
from pipelines import cluster, feed, inference, registry, storage
from pipelines.config import EvaluateConfig, Resolution
from pipelines.schema import Manifest
from pipelines.scorecard import Evaluator, Scorecard
from pipelines.tracking import Run

READ_TOGETHER = 64
"""Rows of a sample that a task reads."""
MANY_BOXES = 5_000_000
"""More than this, and the user is told what they take; GIB_ and MINUTES_PER_MILLION boxes and set of masks are measured
by tests/benchmarks/scale.py."""
GIB_PER_MILLION = 3.3
MINUTES_PER_MILLION = 6


def run(config: EvaluateConfig) -> dict[str, float]:
    """Score the model on every image of the shards, or on an even sample of them.

    Returns:
        Prompt mode: mask_iou and mask_ap (with its usual variants) where there are mask labels, box_iou, spill, fill,
        fill_over_95, fill_under_05 always, and the baselines' mask_iou and mask_ap behind their names. Detect mode:
        mask_ap and box_ap with their variants. In both: images, and images_per_second of the model alone.

    Raises:
        InputError: something about the model, the shards or the cluster that its owner has to change.
    """
    storage.check(config.shards, config.model)
    shards = storage.read_manifest(config.shards, "shards")
    folder = registry.resolve(config.model)
    model = boxinst.load(folder).config
    if not getattr(model, config.mode):
        other = "detect" if config.mode == "prompt" else "prompt"
        remedy = f"Give `--mode {other}`, or train a model with model.{config.mode} on."
        raise InputError("--mode", f"{config.mode} is switched off in {config.model}", remedy)
    registry.check_classes(model.classes, shards.categories, model=config.model, shards=config.shards)
    cluster.start()
    cluster.check(config.workers, 1, int(config.gpu))

    expected = min(config.max_images or shards.counts["images"], shards.counts["images"])
    _warn(expected, shards)
    rows = _rows(config.shards, shards, expected)
    files = ray.put(inference.pack(folder))
    device, threads = "cuda" if config.gpu else "cpu", inference.threads(config.workers)
    scores = rows.map_batches(
        Evaluator,
        fn_constructor_kwargs={
            "load": functools.partial(
                inference.unpack, functools.partial(ray.get, files), device=device, threads=threads
            ),
            "resolution": Resolution(config.short_side, config.max_side),
            "exif": shards.exif,
            "mode": config.mode,
            "score_threshold": config.score_threshold,
            "max_detections": config.max_detections,
            "baselines": config.baselines,
        },
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=1,
        num_gpus=int(config.gpu),
    )
    card = Scorecard(model.classes, config.mode, config.max_detections, config.baselines)
    images, seconds = 0, 0.0
    with storage.explained(config.shards):
        for row in scores.iter_rows():
            card.merge(row["scores"])
            images += row["images"]
            seconds += row["seconds"]
    if images != expected:
        raise RuntimeError(f"{expected} images were to be scored, {images} were")
    figures = card.compute() | {"images": float(images)}
    if seconds:
        figures["images_per_second"] = images / (seconds / config.workers)
    if config.experiment:
        _record(config, shards.hash, figures)
    return figures


def _rows(uri: str, shards: Manifest, count: int) -> ray.data.Dataset:
    """The rows to score: all, or ``count`` of them by way of the row groups that hold one."""
    if count == shards.counts["images"]:
        return ray.data.read_parquet(storage.shard_files(uri, shards), filesystem=storage.filesystem(uri))
    index = feed.ShardIndex.open(uri)
    chosen = index.spread(count)
    lots = [pa.table({"row": chosen[k : k + READ_TOGETHER]}) for k in range(0, count, READ_TOGETHER)]
    # By a function of feed, as this module would have every task wait for torch and MLflow.
    return ray.data.from_arrow(lots).map_batches(
        feed.read_lot, batch_size=None, batch_format="pyarrow", fn_kwargs={"index": index}
    )


def _warn(images: int, shards: Manifest) -> None:
    """Say what the scoring of very many boxes takes, before it begins."""
    boxes = round(shards.counts["boxes"] * images / max(shards.counts["images"], 1))
    if boxes > MANY_BOXES:
        need = f"at least {boxes * GIB_PER_MILLION / 1e6:,.0f} GiB of memory in this process"
        need += f" and {boxes * MINUTES_PER_MILLION / 1e6:,.0f} minutes of one core"
        remedy = "--max-images scores an even sample, of which some 10,000 images say as much."
        print(f"Scoring {boxes:,} boxes takes {need}. {remedy}", file=sys.stderr, flush=True)


def _record(config: EvaluateConfig, shards_hash: str, figures: dict[str, float]) -> None:
    label = registry.identify(config.model)
    tags = {"job": "evaluate", "model": label, "shards_hash": shards_hash}
    tracked = Run.start(f"evaluate {label}", experiment=config.experiment, params=asdict(config), tags=tags)
    tracked.metrics(figures)
    tracked.close()
    print(f"Recorded as run {tracked.run_id} of {config.experiment}.", file=sys.stderr)
