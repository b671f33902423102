"""Shards and a model become figures: AP, mask IoU and consistency, beside baselines that need no model."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict

import ray
import ray.data

import boxinst
from boxinst.errors import InputError
from pipelines import cluster, inference, registry, storage
from pipelines.config import EvaluateConfig, Resolution
from pipelines.scorecard import Evaluator, Scorecard
from pipelines.tracking import Run


def run(config: EvaluateConfig) -> dict[str, float]:
    """Score the model on every image of the shards.

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

    rows = ray.data.read_parquet(
        storage.shard_files(config.shards, shards), filesystem=storage.filesystem(config.shards)
    )
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
    if images != shards.counts["images"]:
        raise RuntimeError(f"the shards hold {shards.counts['images']} images, {images} were scored")
    figures = card.compute() | {"images": float(images)}
    if seconds:
        figures["images_per_second"] = images / (seconds / config.workers)
    if config.experiment:
        _record(config, shards.hash, figures)
    return figures


def _record(config: EvaluateConfig, shards_hash: str, figures: dict[str, float]) -> None:
    label = registry.identify(config.model)
    tags = {"job": "evaluate", "model": label, "shards_hash": shards_hash}
    tracked = Run.start(f"evaluate {label}", experiment=config.experiment, params=asdict(config), tags=tags)
    tracked.metrics(figures)
    tracked.close()
    print(f"Recorded as run {tracked.run_id} of {config.experiment}.", file=sys.stderr)
