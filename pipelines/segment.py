"""Shards and a model become mask rows: one for every given box, whatever happens to the run or to an image."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

import boxinst
from boxinst.condinst import CondInst
from boxinst.errors import InputError
from pipelines import claims, cluster, inference, maskrows, observe, registry, storage
from pipelines.config import Resolution, SegmentConfig
from pipelines.control import Control
from pipelines.records import Records
from pipelines.schema import Manifest
from pipelines.segmenter import COLUMNS, Segmenter


def run(
    config: SegmentConfig,
    *,
    load: Callable[..., CondInst] = inference.unpack,
    report: Callable[[dict[str, float]], None] = lambda used: None,
) -> Manifest:
    """Write one mask row for every box of the shards, and the manifest last.

    A killed run goes on where it was when it is started again; a finished one is left as it is.

    Args:
        config: what to segment, by which model.
        load: gives a worker the model, as ``inference.unpack`` does. Measurements of all but the network give another.
        report: is told what the workers have used, once they have worked; see ``observe.used``.

    Returns:
        The manifest. Its counts: images, boxes, and of these ok, empty and errors.

    Raises:
        InputError: something about the model, the shards, the output or the cluster that its owner has to change.
    """
    storage.check(config.shards, config.output, config.coco, config.model)
    with claims.held(config.output, "--out") as claim:
        return _run(config, claim, load, report)


def _run(
    config: SegmentConfig,
    claim: claims.Claim,
    load: Callable[..., CondInst],
    report: Callable[[dict[str, float]], None],
) -> Manifest:
    """See ``run``; the output is claimed."""
    out = config.output
    shards = storage.read_manifest(config.shards, "shards")
    folder = registry.resolve(config.model)
    model = boxinst.load(folder).config
    inference.check_prompted(model, config.model)
    registry.check_classes(model.classes, shards.categories, model=config.model, shards=config.shards)
    label = registry.identify(config.model)
    source = {
        "shards": storage.absolute(config.shards),
        "shards_hash": shards.hash,
        "model": label,
        "model_hash": registry.fingerprint(folder),
        "short_side": config.short_side,
        "max_side": config.max_side,
    }
    _refuse_other(out, source, config.overwrite)
    manifest = storage.ensure_output(out, "masks", source, overwrite=config.overwrite)
    if manifest is not None:
        print(f"{out} holds the masks of these boxes by this model already: nothing to do.", file=sys.stderr)
        maskrows.drop_parts(out)  # a run that was killed at the very end leaves them
    else:
        with storage.explained(out):
            report(_segment_images(config, shards, folder, load))
            claim.check()
            manifest = maskrows.publish(out, config.shards, shards, source)
    if config.coco:
        maskrows.write_coco(config.coco, out, manifest)
    return manifest


def _refuse_other(out: str, source: dict[str, Any], overwrite: bool) -> None:
    """Keep the hours of work of an unfinished run from being cleared by one with other inputs.

    Raises:
        InputError: the folder was begun with another model, other shards or another resolution.
    """
    if overwrite or not storage.exists(storage.join(out, storage.CLAIM)):
        return
    begun = json.loads(storage.read_bytes(storage.join(out, storage.CLAIM)))
    differs = [name for name in source if begun["source"].get(name) != source[name]] if begun["kind"] == "masks" else []
    if differs:
        was = ", ".join(f"{name} {begun['source'].get(name)}" for name in differs)
        raise InputError("--out", f"{out} was begun with {was}", "Give another folder, or `--overwrite`.")


def _segment_images(
    config: SegmentConfig, shards: Manifest, folder: Path, load: Callable[..., CondInst]
) -> dict[str, float]:
    """Run the model over every image that has no part yet. The rows stay one per image, so none is half written.

    Returns:
        What the workers have used, empty where there was no work; see ``observe.used``.
    """
    files = maskrows.unfinished(config.output, config.shards, shards)
    if not files:
        return {}
    cluster.start()
    cluster.check(config.workers, 1, int(config.gpu))
    slots = int(ray.cluster_resources()["CPU"])
    if slots < config.workers + 2:
        # One to read and write, and one that leaves out the images already done when a run goes on.
        raise InputError("--workers", f"{config.workers}; the cluster has {slots} CPU", f"Give at most {slots - 2}.")
    control = cluster.actor_here(Control)
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = _checkpoints(config.output)
    try:
        rows = ray.data.read_parquet(files, filesystem=storage.filesystem(config.shards)).select_columns(COLUMNS)
        # A part is written when a worker has done its block, so the blocks set how much a killed run repeats.
        masks = rows.repartition(target_num_rows_per_block=config.checkpoint_images).map_batches(
            Segmenter,
            fn_constructor_kwargs={
                "load": functools.partial(
                    load,
                    functools.partial(ray.get, ray.put(inference.pack(folder))),
                    device="cuda" if config.gpu else "cpu",
                    threads=inference.threads(config.workers),
                ),
                "resolution": Resolution(config.short_side, config.max_side),
                "exif": shards.exif,
                "count": functools.partial(_count, control),
            },
            batch_size=config.batch_size,
            batch_format="pyarrow",
            # Two blocks at a time in each, so that the model need not wait while images are decoded or masks encoded.
            compute=ray.data.ActorPoolStrategy(
                size=config.workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            num_cpus=1,
            num_gpus=int(config.gpu),
        )
        fs, path = storage.fs_path(storage.join(config.output, maskrows.PARTS))
        written = storage.join(config.output, maskrows.DONE)  # a file for every block of images
        with observe.progress(
            "segment", lambda: len(storage.list_files(written)) * config.checkpoint_images, shards.counts["images"]
        ):
            masks.write_parquet(path, filesystem=fs)
        return observe.used(ray.get(control.used.remote()))
    finally:
        context.checkpoint_config = None


def _count(control: Any, **amounts: float) -> None:
    """What a worker does when it has done a batch."""
    observe.count("segment", **amounts)
    observe.use(control)


def _checkpoints(out: str) -> CheckpointConfig:
    fs, path = storage.fs_path(storage.join(out, maskrows.DONE))
    return CheckpointConfig(
        id_column="image_id",
        checkpoint_path=path,
        override_filesystem=fs,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=Records,
    )
