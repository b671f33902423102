"""The training loop, as every worker runs it."""

from __future__ import annotations

import functools
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from os import sched_getaffinity
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.data.collate_fn import ArrowBatchCollateFn

from boxinst.condinst import CondInst
from boxinst.criterion import Criterion
from boxinst.errors import InputError
from boxinst.structures import Batch
from boxinst.weights import with_classes
from pipelines import checkpoint, guards, inference, observe, tracking
from pipelines.augmentation import batch_from_table
from pipelines.best import Best, Offer
from pipelines.config import TrainConfig
from pipelines.journal import Journal
from pipelines.learner import Learner, take_step, unwrapped
from pipelines.optimization import make_autocast, make_average, make_optimizer, make_schedule
from pipelines.s3 import patiently
from pipelines.train_job import RECORD, Job
from pipelines.validation import Validation, stack

DELIVERY = 120.0
"""Seconds that the end of a training waits for an MLflow server that is away."""
LAST_DELIVERY = 10.0
"""The same where a worker fails, which Ray then starts again."""


def train_loop(job: Job) -> None:
    """Train from the last checkpoint, if there is one, to the last step, the stop signal or the time limit."""
    if ray.get(job.control.failure.remote()):
        return  # one rank has met it, and Ray has started all again
    patience = LAST_DELIVERY
    try:
        _train(job)
        patience = DELIVERY
    except InputError as error:  # every rank meets it, and starting again would not help
        ray.get(job.control.fail.remote(error.item, str(error.value), error.remedy))
        patience = DELIVERY
    finally:
        if gap := tracking.deliver(patience):
            ray.get(job.control.note.remote(gap))


def _train(job: Job) -> None:
    config, context = job.config, ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    _set_threads(config, context.get_local_world_size())
    learner = _build(job, rank)
    device = next(learner.network.parameters()).device
    criterion = Criterion(config.model, config.loss)
    autocast = make_autocast(config, device)
    cpu_group = _cpu_group() if ranks > 1 else None
    validation = _open_validation(job, rank, ranks)
    run = tracking.Run.join(job.run_id, job.tracking_uri) if rank == 0 else None
    journal = Journal(config, run, job.control, cpu_group)
    metrics = _resume(learner, journal, rank)
    if rank == 0:
        _check_shared(job)
        ray.get(job.control.resume_at.remote(learner.step))
    run_folder = context.get_storage()
    best = Best(run_folder.storage_filesystem, run_folder.experiment_fs_path)
    signal = StopSignal(job, rank, cpu_group)

    batches = observe.steps(_batches(config, ranks, device))
    for _ in range(learner.step, config.steps):
        with journal.waiting():
            batch = next(batches)
        batch = batch.to(device)
        terms, norm = take_step(learner, criterion, batch, config, autocast)
        step, last, stop = learner.step, learner.step == config.steps, signal.agreed()
        journal.add(step, terms, norm, batch.image_ids)
        enter = last or step % config.log_every == 0
        validate = validation and (last or (config.eval_every and step % config.eval_every == 0))
        save = last or stop or step % config.checkpoint_every == 0
        # Before anything is written or kept. A CPU has done the step by now; a GPU would have to be waited for.
        if enter or validate or save or device.type == "cpu":
            _check(journal, config)
        if enter:
            journal.write(step, float(learner.schedule.get_last_lr()[0]))
        if validation and validate:
            with journal.pause(), autocast():
                metrics = _validate(validation, learner, cpu_group, journal)
                if rank == 0:
                    with _no_room_explained(job, tempfile.gettempdir()):
                        best.offer(learner.average.module, step, metrics)  # type: ignore[arg-type]
        if save:
            with journal.pause():
                _save(job, learner, journal, metrics, best.take(), rank)
        if stop:
            break
    _wait_for_upload()


def _check_shared(job: Job) -> None:
    """See that this node sees the run's folder, or its checkpoints would be lost here. By rank 0, which writes them."""
    run = ray.train.get_context().get_storage()
    path = f"{run.experiment_fs_path}/{RECORD}"
    if run.storage_filesystem.get_file_info(path).type != pafs.FileType.File:
        value = f"{run.experiment_fs_path} is not the same folder on the node {socket.gethostname()}"
        remedy = "Give a folder that all nodes of the cluster share, or s3://bucket/prefix."
        ray.get(job.control.fail.remote("BOXINST_STORE", value, remedy))
        raise RuntimeError(value)  # the other ranks wait for this one


def _build(job: Job, rank: int) -> Learner:
    """Network, average, optimiser and schedule as they are before the first step."""
    config = job.config
    torch.manual_seed(config.seed)
    init = job.init
    model = inference.unpack(lambda: init) if init is not None else CondInst(config.model)
    if model.config.classes != config.model.classes:
        model = with_classes(model, config.model.classes)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    wrapped = ray.train.torch.prepare_model(model.train())
    bare = unwrapped(wrapped)
    torch.manual_seed(config.seed + 1 + rank)
    optimizer = make_optimizer(bare, config)
    return Learner(wrapped, make_average(bare, config.ema_decay), optimizer, make_schedule(optimizer, config))


def _resume(learner: Learner, journal: Journal, rank: int) -> dict[str, float]:
    """Go back to the last checkpoint, if there is one; returns the metrics of the last validation before it."""
    last = ray.train.get_checkpoint()
    if last is None:
        return {}
    with last.as_directory() as folder:
        state = checkpoint.load(folder)
    learner.restore(state["learner"], rank=rank)
    if "journal" in state:  # not in those of version 0.1
        journal.restore(state["journal"])
    return state["metrics"]


def _check(journal: Journal, config: TrainConfig) -> None:
    """See that all steps so far were sound.

    Raises:
        InputError: loss or gradient of one was not finite; on all ranks alike.
    """
    if found := journal.broken_step():
        kept = ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
        raise guards.not_finite(*found, [(c.metrics["step"], c.checkpoint.path) for c in kept], config)


def _validate(
    validation: Validation, learner: Learner, group: dist.ProcessGroup | None, journal: Journal
) -> dict[str, float]:
    """Metrics of the averaged weights over all ranks' images; rank 0 writes them down with a picture."""
    if group is not None:  # each rank has gathered normalisation statistics of its own; those of rank 0 are kept
        for buffer in learner.average.module.buffers():
            dist.broadcast(buffer, 0)
    states: list[Any] = [validation.score(learner.average.module)]  # type: ignore[arg-type]
    if group is not None:
        mine, states = states[0], [None] * dist.get_world_size()
        dist.all_gather_object(states, mine, group=group)
    metrics = validation.merge(states)
    journal.validated(learner.step, metrics)
    if journal.run is not None and validation.pictures:
        journal.run.image(stack(validation.pictures), f"validation/{learner.step:07d}.png")
    return metrics


def _save(
    job: Job, learner: Learner, journal: Journal, metrics: dict[str, float], offered: Offer | None, rank: int
) -> None:
    """Write a checkpoint and let it be uploaded while the training goes on, after the best model where there is one.

    The one before must be registered by then: a failure loses one interval, and the time of one upload.
    """
    _wait_for_upload()
    reported = None
    if rank == 0:
        about = {"config": asdict(job.config), "shards": job.shards_hash, "run_id": job.run_id}
        state = {"metrics": metrics, "journal": journal.state(), "learner": learner.state()}
        reported = ray.train.Checkpoint.from_directory(_set_aside(job, {**about, **state}))
    ray.train.report(
        {"step": learner.step},
        checkpoint=reported,
        checkpoint_dir_name=f"checkpoint_{learner.step:08d}",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=functools.partial(_upload, job, ray.train.get_context().get_storage(), offered),
    )


def _set_aside(job: Job, state: Mapping[str, Any]) -> str:
    """Write a checkpoint into a new temporary folder, which is gone again where that fails: it may fill the disk."""
    folder = tempfile.mkdtemp(prefix="checkpoint_")
    try:
        with _no_room_explained(job, folder):
            checkpoint.save(folder, state)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _wait_for_upload() -> None:
    """Until the last checkpoint is registered, so that no later failure falls back behind it."""
    ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)


def _upload(job: Job, run: Any, offered: Offer | None, made: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Copy a checkpoint to the run's folder, as Ray asks for it in a thread."""
    target = f"{run.experiment_fs_path}/{name}"
    with _no_room_explained(job, target):
        try:
            if offered is not None:
                offered.keep()
            patiently(lambda: checkpoint.upload(made.path, run.storage_filesystem, target))
        except BaseException as error:
            shutil.rmtree(made.path, ignore_errors=True)
            if "AWS Error" in str(error):
                # By these words Ray knows what to try again. That has been done here, and without the files it would
                # end with an error of theirs.
                raise OSError(str(error).replace("AWS Error", "S3 error")) from error
            raise
    return ray.train.Checkpoint(target, run.storage_filesystem)


@contextmanager
def _no_room_explained(job: Job, folder: str) -> Iterator[None]:
    """Let a full disk end the run with what to do about it. Only rank 0 meets it, so the error must pass."""
    try:
        yield
    except Exception as error:
        if checkpoint.is_no_room(error):
            told = checkpoint.no_room(folder, error)
            ray.get(job.control.fail.remote(told.item, told.value, told.remedy))
        raise


class StopSignal:
    """Whether to stop after this step: rank 0 knows, and all ranks must do the same."""

    def __init__(self, job: Job, rank: int, group: dist.ProcessGroup | None) -> None:
        self.job, self.rank, self.group = job, rank, group
        self.started = time.monotonic()
        self._answer = job.control.stopping.remote()

    def agreed(self) -> bool:
        """Asks all ranks, which must call it after the same step."""
        stop = False
        if self.rank == 0:
            # No step waits for the driver: an answer that is late counts after the next one.
            if ray.wait([self._answer], timeout=0)[0]:
                stop = bool(ray.get(self._answer))
                self._answer = self.job.control.stopping.remote()
            stop |= 0 < self.job.config.minutes <= (time.monotonic() - self.started) / 60
        if self.group is not None:
            flag = torch.tensor(stop)
            dist.broadcast(flag, 0, group=self.group)
            stop = bool(flag)
        return stop


class Collate(ArrowBatchCollateFn):
    """Pads samples into a batch, in the threads that fetch ahead of the training."""

    def __init__(self, *, pin: bool) -> None:
        self.pin = pin

    def __call__(self, batch: pa.Table) -> Batch:
        made = batch_from_table(batch)
        if self.pin:
            made.images, made.valid = made.images.pin_memory(), made.valid.pin_memory()
        return made


def _batches(config: TrainConfig, ranks: int, device: torch.device) -> Iterator[Batch]:
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    return iter(
        shard.iter_torch_batches(
            batch_size=config.batch_size // ranks,
            collate_fn=Collate(pin=device.type == "cuda"),
            prefetch_batches=2,
            device="cpu",
        )
    )


def _open_validation(job: Job, rank: int, ranks: int) -> Validation | None:
    if job.val is None:
        return None
    return Validation.open(
        job.val,
        max_images=job.config.eval_max_images,
        rank=rank,
        ranks=ranks,
        short_side=max(job.config.augment.short_sides, default=0),
        max_side=job.config.augment.max_side,
    )


def _cpu_group() -> dist.ProcessGroup:
    """Talks between CPUs, so that an agreement does not wait for the GPU. A validation may keep the others waiting."""
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _set_threads(config: TrainConfig, workers_here: int) -> None:
    share = max(1, len(sched_getaffinity(0)) // workers_here)
    torch.set_num_threads(config.cpus_per_worker or share)
