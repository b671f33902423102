"""The training loop, as every worker runs it."""

from __future__ import annotations

import functools
import math
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
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
from torch import Tensor, nn

from boxinst.condinst import CondInst
from boxinst.criterion import Criterion
from boxinst.errors import InputError
from boxinst.structures import Batch
from boxinst.weights import with_classes
from pipelines import checkpoint, inference, tracking
from pipelines.augmentation import batch_from_table
from pipelines.best import Best
from pipelines.config import TrainConfig
from pipelines.optimization import bf16_pays, make_average, make_optimizer, make_schedule
from pipelines.train_job import RECORD, Job
from pipelines.validation import Validation, stack

DELIVERY = 120.0
"""Seconds that the end of a training waits for an MLflow server that is away."""


@dataclass
class Learner:
    """What training changes, and a checkpoint holds."""

    model: nn.Module
    """The network, wrapped for distributed training where there are several workers."""
    average: torch.optim.swa_utils.AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0
    """Optimiser steps done."""

    @property
    def network(self) -> CondInst:
        """The bare network."""
        return unwrapped(self.model)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {
            "step": self.step,
            "model": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.random.get_rng_state(),
        }

    def restore(self, state: dict[str, Any], *, rank: int) -> None:
        """Inverse of ``state``."""
        self.step = state["step"]
        self.network.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:  # the optimiser's fast path wants the parameter's memory order
                    moments[name] = torch.empty_like(parameter).copy_(moment)
        self.schedule.load_state_dict(state["schedule"])
        if rank == 0:  # the state is of rank 0; the others keep the seed they started from
            torch.random.set_rng_state(state["random"])


def train_loop(job: Job) -> None:
    """Train from the last checkpoint, if there is one, to the last step, the stop signal or the time limit."""
    if ray.get(job.control.failure.remote()):
        return  # one rank has met it, and Ray has started all again
    try:
        _train(job)
    except InputError as error:  # every rank meets it, and starting again would not help
        ray.get(job.control.fail.remote(error.item, str(error.value), error.remedy))
    if gap := tracking.deliver(DELIVERY):
        ray.get(job.control.note.remote(gap))


def _train(job: Job) -> None:
    config, context = job.config, ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    _set_threads(config, context.get_local_world_size())
    learner = _build(job, rank)
    device = next(learner.network.parameters()).device
    criterion = Criterion(config.model, config.loss)
    autocast = _autocast(config, device)
    cpu_group = _cpu_group() if ranks > 1 else None
    validation = _open_validation(job, rank, ranks)
    metrics = _resume(learner, rank)
    if rank == 0:
        _check_shared(job)
        ray.get(job.control.resume_at.remote(learner.step))
    journal, signal = Journal(job, rank, ranks), StopSignal(job, rank, cpu_group)

    batches = _batches(config, ranks, device)
    for _ in range(learner.step, config.steps):
        with journal.waiting():
            batch = next(batches)
        batch = batch.to(device)
        terms, norm = _step(learner, criterion, batch, config, autocast)
        journal.add(terms, norm, len(batch.sizes))
        step, last = learner.step, learner.step == config.steps
        if step % config.log_every == 0 or last:
            journal.write(step, float(learner.schedule.get_last_lr()[0]))
        stop = signal.agreed()
        if validation and (last or (config.eval_every and step % config.eval_every == 0)):
            with journal.pause(), autocast():
                metrics = _validate(validation, learner, rank, cpu_group, journal)
            if rank == 0:
                run = ray.train.get_context().get_storage()
                with journal.pause(), _no_room_explained(job, run.experiment_fs_path):
                    averaged: Any = learner.average.module
                    Best(run.storage_filesystem, run.experiment_fs_path).offer(averaged, step, metrics)
        if last or stop or step % config.checkpoint_every == 0:
            with journal.pause():
                _save(job, learner, metrics, rank)
        if stop:
            break
    _wait_for_upload()


def _check_shared(job: Job) -> None:
    """See that this node sees the run's folder, or its checkpoints would be lost here. By rank 0, which writes them."""
    run = ray.train.get_context().get_storage()
    path = f"{run.experiment_fs_path}/{RECORD}"
    if run.storage_filesystem.get_file_info(path).type != pafs.FileType.File:
        value = f"{run.experiment_fs_path} is not the same folder on the node {socket.gethostname()}"
        remedy = "Give a folder that all nodes of the cluster share."
        ray.get(job.control.fail.remote("BOXINST_HOME", value, remedy))
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


def unwrapped(model: nn.Module) -> CondInst:
    """The network itself: Ray wraps it only where there are several workers."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model  # type: ignore[return-value]


def _resume(learner: Learner, rank: int) -> dict[str, float]:
    """Go back to the last checkpoint, if there is one; returns the metrics of the last validation before it."""
    last = ray.train.get_checkpoint()
    if last is None:
        return {}
    with last.as_directory() as folder:
        state = checkpoint.load(folder)
    learner.restore(state["learner"], rank=rank)
    return state["metrics"]


def _step(
    learner: Learner,
    criterion: Criterion,
    batch: Batch,
    config: TrainConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step; returns the loss terms and the length of the gradient, still on the device."""
    with autocast():
        outputs = learner.model(batch.images, [t.boxes for t in batch.targets], batch.sizes)
    terms = criterion(outputs, batch, learner.step)
    learner.optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    norm = nn.utils.clip_grad_norm_(learner.model.parameters(), config.grad_clip or math.inf)
    learner.optimizer.step()
    learner.schedule.step()
    learner.average.update_parameters(learner.network)
    learner.step += 1
    return {name: term.detach() for name, term in terms.items()}, norm


def _validate(
    validation: Validation, learner: Learner, rank: int, group: dist.ProcessGroup | None, journal: Journal
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
    if journal.run is not None:
        journal.run.metrics({f"val/{name}": value for name, value in metrics.items()}, learner.step)
        if validation.pictures:
            journal.run.image(stack(validation.pictures), f"validation/{learner.step:07d}.png")
    return metrics


def _save(job: Job, learner: Learner, metrics: dict[str, float], rank: int) -> None:
    """Write a checkpoint and let it be uploaded while the training goes on.

    The one before must be registered by then: a failure loses one interval, and the time of one upload.
    """
    _wait_for_upload()
    reported = None
    if rank == 0:
        folder = tempfile.mkdtemp(prefix="checkpoint_")
        about = {"config": asdict(job.config), "shards": job.shards_hash, "run_id": job.run_id}
        with _no_room_explained(job, folder):
            checkpoint.save(folder, {**about, "metrics": metrics, "learner": learner.state()})
        reported = ray.train.Checkpoint.from_directory(folder)
    ray.train.report(
        {"step": learner.step},
        checkpoint=reported,
        checkpoint_dir_name=f"checkpoint_{learner.step:08d}",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=functools.partial(_upload, job, ray.train.get_context().get_storage()),
    )


def _wait_for_upload() -> None:
    """Until the last checkpoint is registered, so that no later failure falls back behind it."""
    ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)


def _upload(job: Job, run: Any, made: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Copy a checkpoint to the run's folder, as Ray asks for it in a thread."""
    target = f"{run.experiment_fs_path}/{name}"
    with _no_room_explained(job, target):
        try:
            checkpoint.upload(made.path, run.storage_filesystem, target)
        except BaseException:
            shutil.rmtree(made.path, ignore_errors=True)
            raise
    return ray.train.Checkpoint(target, run.storage_filesystem)


@contextmanager
def _no_room_explained(job: Job, folder: str) -> Iterator[None]:
    """Let a full disk end the run with what to do about it. Only rank 0 meets it, so the error must pass."""
    try:
        yield
    except Exception as error:
        if checkpoint.is_no_room(error):
            value = f"no room for {folder}: {' '.join(str(error).split())[:200]}"
            remedy = "Make room there, then run the same command again: it goes on from the checkpoint before."
            ray.get(job.control.fail.remote("checkpoint", value, remedy))
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


def _autocast(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A fresh context of the run's arithmetic at each call."""
    if config.precision == "bf16" or (config.precision == "auto" and bf16_pays(device)):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def _set_threads(config: TrainConfig, workers_here: int) -> None:
    share = max(1, len(sched_getaffinity(0)) // workers_here)
    torch.set_num_threads(config.cpus_per_worker or share)


class Journal:
    """What is written down of the training: means since the last entry, over all ranks, by rank 0.

    Loss terms stay on the device until an entry is written, so that no step waits for them.
    """

    def __init__(self, job: Job, rank: int, ranks: int) -> None:
        self.job, self.ranks = job, ranks
        self.run: tracking.Run | None = None
        if rank == 0:
            self.run = tracking.Run.join(job.run_id, job.tracking_uri)
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._images, self._waited, self._paused = 0, 0, 0.0, 0.0
        self._since = time.monotonic()

    def waiting(self) -> AbstractContextManager[None]:
        """Around the wait for data."""
        return _Stopwatch(self, "_waited")

    def pause(self) -> AbstractContextManager[None]:
        """Around what is no training; it does not count in the speed."""
        return _Stopwatch(self, "_paused")

    def add(self, terms: Mapping[str, Tensor], norm: Tensor, images: int) -> None:
        """One step's loss terms, gradient length and number of images."""
        for name, value in {**terms, "grad_norm": norm}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps, self._images = self._steps + 1, self._images + images

    def write(self, step: int, learning_rate: float) -> None:
        """Write the means and start anew.

        Raises:
            InputError: the loss is not finite.
        """
        means = torch.stack(list(self._sums.values())).double() / self._steps
        if self.ranks > 1:
            dist.all_reduce(means)
            means /= self.ranks
        values = dict(zip(self._sums, means.tolist(), strict=True))
        seconds = max(time.monotonic() - self._since - self._paused, 1e-9)
        values |= {
            "learning_rate": learning_rate,
            "images_per_second": self._images * self.ranks / seconds,
            "data_wait": self._waited / seconds,
        }
        if self.run is not None:
            self.run.metrics({f"train/{name}": value for name, value in values.items()}, step)
            self.job.control.show.remote(step, values)
        if not math.isfinite(values["loss"]):
            remedy = "Lower --learning-rate or --grad-clip, or lengthen --lr-warmup-steps; then give another --name."
            raise InputError("loss", f"{values['loss']} before step {step}", remedy)
        self._reset()


class _Stopwatch(AbstractContextManager[None]):
    """Adds the time spent inside to a field of the journal."""

    def __init__(self, journal: Journal, name: str) -> None:
        self.journal, self.name = journal, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = getattr(self.journal, self.name) + time.monotonic() - self.start
        setattr(self.journal, self.name, spent)
