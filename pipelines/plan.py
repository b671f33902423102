"""What a command will take, from the manifests and a trial on a few images in one worker of the cluster."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

import boxinst
from boxinst.errors import InputError
from pipelines import cluster, inference, registry, storage, trial
from pipelines.config import Resolution, SegmentConfig, TrainConfig
from pipelines.feed import ShardIndex, epoch_order
from pipelines.forecast import Forecast, PlanConfig, Trial, Work
from pipelines.schema import SHARD_SCHEMA
from pipelines.segmenter import COLUMNS
from pipelines.trial import Reading

WRITES = 3
"""Requests to write an object: begin, one part, complete."""
ASKED = 2
"""Requests by which Ray Data and Arrow ask what a file is before they open it."""
RECORDED = 12
"""Requests for the record of a part, and for making sure of the folders of both. These two numbers are counted by
tests/benchmarks/requests_s3.py."""


def segmenting(config: SegmentConfig, options: PlanConfig) -> Forecast:
    """The forecast for ``boxinst segment``.

    Raises:
        InputError: as the command itself would.
    """
    storage.check(config.shards, config.output, config.coco, config.model)
    index = _open(config.shards)
    counts = index.manifest.counts
    folder = registry.resolve(config.model)
    model = boxinst.load(folder).config
    inference.check_prompted(model, config.model)
    registry.check_classes(model.classes, index.manifest.categories, model=config.model, shards=config.shards)
    reading = trial.read(index, options.images, COLUMNS)
    began = time.time()
    cpus = _start(config.gpu, 1)
    load = functools.partial(
        inference.unpack,
        functools.partial(ray.get, ray.put(inference.pack(folder))),
        device="cuda" if config.gpu else "cpu",
        threads=inference.threads(config.workers),
    )
    resolution = Resolution(config.short_side, config.max_side)
    tried = _tried(
        trial.segmenting,
        reading.table,
        load,
        resolution,
        index.manifest.exif,
        cpus=1,
        gpu=config.gpu,
        batch_size=config.batch_size,
        seconds=options.seconds,
    )
    files, groups = len(index.manifest.files), len(index.groups)
    parts = math.ceil(counts["images"] / config.checkpoint_images)
    # A shard is opened to plan, for its images, and for their order when all is published; a part is opened and read
    # for its size and when it is published.
    shard = 3 * (reading.opening + ASKED)
    part = WRITES + 2 * (reading.opening + ASKED + 1) + RECORDED
    requests = files * shard + groups * 3 * reading.group + parts * part
    work = Work(
        images=counts["images"],
        boxes=counts["boxes"],
        workers=config.workers,
        threads=inference.threads(config.workers) or 1,
        data_processes=max(1, cpus - config.workers),
        decodes_in_worker=True,
        shares_cores=not (config.gpu or cluster.elsewhere()),
        requests=round(requests),
        bytes=round(groups * reading.group_bytes),
        outputs=counts["boxes"],
    )
    return Forecast("segment", work, _trial(tried, reading, began), options.price)


def training(
    config: TrainConfig, init: Any, index: ShardIndex, val: ShardIndex | None, options: PlanConfig
) -> Forecast:
    """The forecast for ``boxinst train``.

    Args:
        config: complete, as the training has it.
        init: the packed model to start from, or None.
        index: of the shards.
        val: of the validation shards.
        options: of the plan.

    Raises:
        InputError: the cluster has no CPU or GPU for one worker.
    """
    reading = trial.read(index, options.images, SHARD_SCHEMA.names)
    began = time.time()
    worker_cpus = max(config.cpus_per_worker, 1)
    cpus = _start(config.gpu, worker_cpus)
    nodes = sum(node["Alive"] for node in ray.nodes())
    tried = _tried(
        trial.training,
        reading.table,
        config,
        init,
        index.manifest.exif,
        val,
        cpus=worker_cpus,
        gpu=config.gpu,
        workers_here=math.ceil(config.workers / nodes),
        seconds=options.seconds,
    )
    shares = not (config.gpu or cluster.elsewhere())
    free = max(1, cpus - config.workers * worker_cpus)
    images = config.steps * config.batch_size
    opened = _groups_opened(index, config.seed) * images / len(index)
    validations = 1 + (config.steps - 1) // config.eval_every if config.eval_every else 1
    validated = min(len(val), config.eval_max_images or len(val)) * validations if val is not None else 0
    work = Work(
        images=images,
        boxes=round(images * index.manifest.counts["boxes"] / len(index)),
        workers=config.workers,
        threads=int(tried["threads"]),
        data_processes=cluster.data_workers(config.data_workers, gpu=config.gpu) or free,
        decodes_in_worker=False,
        shares_cores=shares,
        requests=round(opened * (reading.opening + reading.group)),
        bytes=round(opened * reading.group_bytes),
        validation_images=validated,
        outputs=min(config.num_to_keep, math.ceil(config.steps / config.checkpoint_every)),
    )
    return Forecast("train", work, _trial(tried, reading, began), options.price)


def _open(uri: str) -> ShardIndex:
    index = ShardIndex.open(uri)
    if not len(index):
        raise InputError("--shards", f"{storage.redact(uri)} has no images", "Give other shards.")
    return index


def _start(gpu: bool, worker_cpus: int) -> int:
    """Connect, make sure that one worker fits, and return the CPU slots of the cluster."""
    cluster.start()
    cluster.check(1, worker_cpus, int(gpu))
    return int(ray.cluster_resources()["CPU"])


def _tried(work: Callable[..., dict[str, float]], *args: Any, cpus: int, gpu: bool, **options: Any) -> dict[str, float]:
    """What a trial gives, from a worker of its own; as the stages' workers it has the GPU if one is asked for."""
    # One call and no more, so that the most memory of the process is that of the trial.
    task = ray.remote(num_cpus=cpus, num_gpus=int(gpu), max_calls=1, max_retries=0)(work)
    try:
        return ray.get(task.remote(*args, **options))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def _trial(tried: dict[str, float], reading: Reading, began: float) -> Trial:
    return Trial(
        read_seconds=reading.seconds,
        decode_seconds=tried["decode_seconds"],
        network_seconds=tried["network_seconds"],
        memory_bytes=int(tried["memory_bytes"]),
        gpu_bytes=int(tried["gpu_bytes"]),
        start_seconds=tried["ready"] - began,
        validation_seconds=tried.get("validation_seconds", 0.0),
        output_bytes=tried["output_bytes"],
    )


def _groups_opened(index: ShardIndex, seed: int) -> int:
    """Row groups that one epoch reads: a group is read once for every stretch of the stream with rows of it."""
    order = epoch_order(index.starts, index.rows_at_once, seed, 0)
    of_row = np.searchsorted(index.starts, order, side="right") - 1
    return sum(len(np.unique(of_row[k : k + index.rows_at_once])) for k in range(0, len(order), index.rows_at_once))
