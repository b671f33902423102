"""Training from shards to a registered model: checks the input, runs the workers, follows them, keeps the result."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from tqdm import tqdm

import boxinst
from boxinst.config import ModelConfig
from boxinst.errors import InputError
from boxinst.tensors import load_strict
from pipelines import best, checkpoint, claims, cluster, inference, observe, registry, settings, storage, tracking
from pipelines.config import MAY_CHANGE, TrainConfig
from pipelines.control import Control
from pipelines.feed import Augment, ShardIndex, Stream, Tally
from pipelines.train_job import RECORD, Job

__all__ = ["TrainConfig", "TrainResult", "run"]

RESULT, MODEL = "result.json", "model"
"""Beside the checkpoints in a run's folder: what came of it, and the averaged model."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to."""

    status: Literal["finished", "stopped", "finished before"]
    """``stopped``: by Ctrl-C or the time limit; the same command goes on. ``finished before``: nothing was trained."""
    steps: int
    """Optimiser steps done in all."""
    resumed_from: int
    """Step of the checkpoint that this command last went on from, an earlier command's or one from before the death of
    a worker; 0 when it started afresh."""
    seconds: float
    """This command took, start-up included."""
    metrics: dict[str, float]
    """Of the last validation; empty without one."""
    run_id: str
    """MLflow's."""
    model: str
    """Folder of the model (averaged weights), as ``boxinst.load`` reads it."""
    version: str
    """Address of the registered version, models:/NAME/VERSION; empty where none was registered."""
    best: str = ""
    """Folder of the model that did best at a validation, which may be an earlier one; empty without a validation."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong at its end, and which option to change."""
    used: dict[str, float] = field(default_factory=dict)
    """By this command's workers: ``memory`` and ``gpu_memory``, the most of one in GB; ``data_wait``, mean share;
    ``store_requests`` and ``store_bytes``, all that its data tasks have asked of the store, validations left out."""


def run(config: TrainConfig) -> TrainResult:
    """Train, or go on training, or say that the run has finished before.

    The first Ctrl-C ends the run after its step with a checkpoint, the second at once.

    Raises:
        InputError: the shards, the model to start from or the run to resume do not fit the config; too few CPUs or
            GPUs; a loss or gradient that is not finite.
    """
    check_storage(config)
    folder = storage.join(settings.store(), "runs", config.name)
    with claims.held(folder, "--name") as claim:
        return _run(config, folder, claim)


def _run(config: TrainConfig, folder: str, claim: claims.Claim) -> TrainResult:
    """See ``run``; the output is claimed."""
    started = time.monotonic()
    index, val = open_shards(config)
    config, init = complete(config, index)
    previous, changes = _check_resumable(folder, config, index.manifest.hash)
    if storage.exists(storage.join(folder, RESULT)):
        before = json.loads(storage.read_bytes(storage.join(folder, RESULT)))
        return replace(TrainResult(**before), status="finished before")

    checkpoint.mend_list(folder, ray.__version__)
    cluster.start()
    cluster.check(config.workers_min or config.workers, max(config.cpus_per_worker, 1), int(config.gpu))
    tracker = _track(config, index, val, previous, changes)
    print(f"MLflow run: {tracker.address}", file=sys.stderr)
    record = {"config": asdict(config), "shards": index.manifest.hash, "run_id": tracker.run_id}
    storage.write_bytes(storage.join(folder, RECORD), json.dumps(record, indent=2).encode())
    control = cluster.actor_here(Control)
    job = Job(config, index.manifest.hash, val, init, tracker.run_id, tracker.tracking_uri, control)
    try:
        fitted = _follow(_trainer(job, index), control, config, claim)
        result = _keep(fitted, job, control, folder, started)
    except KeyboardInterrupt:
        tracker.close("KILLED")
        raise
    except Exception as error:
        if not isinstance(error, InputError) and checkpoint.is_no_room(error):  # met by Ray itself, or at the end
            error = checkpoint.no_room(folder, error)
        tracker.close("FAILED", failure=storage.redact(str(error)))
        if not isinstance(error, InputError):
            storage.check(config.shards, config.val, settings.store())  # did it go away?
        raise error
    tracker.close("FINISHED" if result.status == "finished" else "KILLED")
    return result


# What is checked before any work.


def check_storage(config: TrainConfig) -> None:
    """See that every bucket that the training will read or write, or MLflow for it, lets us in."""
    storage.check(config.shards, config.val, config.init, settings.store(), tracking.artifacts(config.name))


def open_shards(config: TrainConfig) -> tuple[ShardIndex, ShardIndex | None]:
    """Training shards with boxes, and validation shards of the same classes."""
    index = ShardIndex.open(config.shards)
    if not len(index) or not index.manifest.counts.get("boxes"):
        raise InputError("--shards", f"{config.shards} has no boxes", "Give shards of a corpus with labelled boxes.")
    if not config.val:
        return index, None
    val = ShardIndex.open(config.val)
    ours, theirs = ([c.name for c in m.categories] for m in (index.manifest, val.manifest))
    if ours != theirs:
        value = f"{config.val} has the classes {', '.join(theirs)}"
        raise InputError("--val", value, f"{config.shards} has {', '.join(ours)}: give shards of the same classes.")
    if not len(val):
        raise InputError("--val", f"{config.val} has no images", "Give other shards, or leave --val empty.")
    return index, val


def complete(config: TrainConfig, index: ShardIndex) -> tuple[TrainConfig, dict[str, bytes] | None]:
    """The config with all that follows from the shards and the initial model, and that model, packed."""
    categories = index.manifest.categories
    names = tuple(c.name for c in categories)
    init = None
    if config.init:
        folder = registry.resolve(config.init)
        model = boxinst.load(folder).config
        if config.init_classes == "new":
            model = replace(model, classes=names)
        else:
            _check_initial_classes(model, index, config)
        for f in fields(ModelConfig):
            if f.name == "backbone_weights":
                continue  # the weights are the initial model's
            asked, has = getattr(config.model, f.name), getattr(model, f.name)
            if asked not in (getattr(ModelConfig(), f.name), has):
                remedy = f"{config.init} has {has}: leave the options of `model` alone, or train without --init."
                raise InputError(f"--model.{f.name.replace('_', '-')}", asked, remedy)
        init = inference.pack(folder)
    else:
        if config.model.classes not in ((), names):
            remedy = f"{config.shards} has {', '.join(names)}: leave it empty."
            raise InputError("--model.classes", ", ".join(config.model.classes), remedy)
        model = replace(config.model, classes=names)
    return (
        replace(
            config,
            model=model,
            augment=replace(config.augment, contrast_stretch=model.contrast_stretch),
            steps=config.steps or math.ceil(config.epochs * len(index) / config.batch_size),
            epochs=0,
        ),
        init,
    )


def _check_initial_classes(model: ModelConfig, index: ShardIndex, config: TrainConfig) -> None:
    categories = index.manifest.categories
    try:
        registry.check_classes(model.classes, categories, model=config.init, shards=config.shards)
    except InputError as error:
        remedy = f"Or give --init-classes new: a classifier of {len(categories)} classes then takes the place of its "
        raise InputError(error.item, error.value, f"{error.remedy} {remedy}{len(model.classes)}.") from error


def _check_resumable(folder: str, config: TrainConfig, shards: str) -> tuple[str | None, dict[str, str]]:
    """The MLflow run of an earlier command of this name, None for a new name; and what is asked otherwise now."""
    if not storage.exists(storage.join(folder, RECORD)):
        if next(storage.walk(folder), None):
            raise InputError("--name", f"{folder} holds something else", "Give another name, or remove that folder.")
        return None, {}
    record = json.loads(storage.read_bytes(storage.join(folder, RECORD)))
    asked = json.loads(json.dumps(asdict(config)))
    changes = {}
    for name, before, now in checkpoint.differences(record["config"], asked):
        changes[name] = f"{before} → {now}"
        if name.split(".")[0] not in (*MAY_CHANGE, "shards"):  # shards may have moved; what they hold counts
            option = f"--{name.replace('_', '-')}"
            value = f"{now}, but the run {config.name} has {before}"
            raise InputError(option, value, f"Give {option} {before} to go on with that run, or another --name.")
    if record["shards"] != shards:
        value = f"{config.shards} has the hash {shards}, but the run {config.name} has {record['shards']}"
        raise InputError("--shards", value, "Give the shards that run was started with, or another --name.")
    return record["run_id"], changes


def _track(
    config: TrainConfig, index: ShardIndex, val: ShardIndex | None, run_id: str | None, changes: dict[str, str]
) -> tracking.Run:
    """The MLflow run, with all that makes it repeatable; its parameters are the first command's, changes are tags."""
    params = {**asdict(config), "shards_hash": index.manifest.hash, "shards_counts": index.manifest.counts}
    if val is not None:
        params["val_hash"] = val.manifest.hash
    tags = {f"changed.{name}": change for name, change in changes.items()}
    return tracking.Run.start(config.name, experiment=config.name, params=params, tags=tags, run_id=run_id)


# The workers.


def _trainer(job: Job, index: ShardIndex) -> TorchTrainer:
    config = job.config

    def work(loop_config: dict[str, Job]) -> None:
        # Here, so that it is the workers that load it and not every process that passes this function on.
        from pipelines.train_loop import train_loop  # noqa: PLC0415

        train_loop(loop_config["job"])

    options = ray.data.ExecutionOptions(preserve_order=True)
    fs, runs = storage.fs_path(storage.join(settings.store(), "runs"))
    return TorchTrainer(
        work,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.workers_min, config.workers) if config.workers_min else config.workers,
            use_gpu=config.gpu,
            resources_per_worker={"CPU": max(config.cpus_per_worker, 1), **({"GPU": 1} if config.gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=runs,
            storage_filesystem=fs,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.num_to_keep),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
        datasets={"train": _stream(job, index)},
        dataset_config=ray.train.DataConfig(execution_options=options),
    )


def _stream(job: Job, index: ShardIndex) -> Callable[[], ray.data.Dataset]:
    """What makes the dataset of augmented samples, from the step that training begins at to the last.

    A task reads a stretch of the stream; its rows are cut into equal parts of a batch, which are augmented one by one.
    Ray hands blocks of equal size to the workers in turn, so each gets the same rows however often it is resumed, and
    all together get the same batches however many they are.
    """
    config, control = job.config, job.control
    stream = Stream(index, config.seed)
    augment = Augment(
        asdict(config.augment),
        {
            "seed": config.seed,
            "exif": index.manifest.exif,
            "with_masks": config.mask_labels == "use",
            "bottom_pixels": config.loss.bottom_pixels,
        },
    )
    # Plain numbers: a task that held the config would import all that it is made of.
    batch_size, part, at_once = config.batch_size, config.batch_size // config.batch_parts, index.rows_at_once
    end, data_workers = config.steps * batch_size, cluster.data_workers(config.data_workers, gpu=config.gpu)

    def read(number: pa.Table) -> pa.Table:
        first = ray.get(control.start.remote()) * batch_size + number["id"][0].as_py() * at_once
        tally = Tally()
        table = stream.read(first, min(first + at_once, end), tally)
        # Under a name of its own: a task that is done again has asked the store again.
        if tally.requests:
            share = {"store_requests": tally.requests, "store_bytes": tally.bytes}
            ray.get(control.use.remote(uuid.uuid4().hex, share))
        return table

    def augment_behind(table: pa.Table) -> pa.Table:
        # Ray decodes ahead as fast as it can. On the same cores the training goes first: where it has to wait for
        # samples it leaves the cores to this process anyway. Not the lowest priority: beside other work on the machine
        # that would hardly ever run, and the training would wait for it.
        os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), 5))
        return augment(table)

    def make() -> ray.data.Dataset:
        # This runs in a process of Ray's, with a context of its own.
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        # Counted from step 0, as the step to begin at is not known yet; tasks beyond the end read nothing.
        tasks = math.ceil(end / at_once)
        return (
            ray.data.range(tasks, override_num_blocks=tasks)
            .map_batches(read, batch_size=None, batch_format="pyarrow")
            .repartition(target_num_rows_per_block=part, strict=True)
            .map_batches(augment_behind, batch_size=None, batch_format="pyarrow", concurrency=data_workers)
        )

    return make


def _follow(trainer: TorchTrainer, control: Any, config: TrainConfig, claim: claims.Claim) -> ray.train.Result:
    """Run the trainer to its end, with a progress bar; Ctrl-C asks it to stop.

    Raises:
        InputError: which a worker met, or another command has taken the run over.
        TrainingFailedError: of Ray, when workers failed for another reason.
    """
    outcome: list[ray.train.Result | BaseException] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)

    # In a thread: in the main one, Ray would install a handler of its own for Ctrl-C, which aborts.
    thread = threading.Thread(target=fit, daemon=True)
    seconds = 0.5 if sys.stderr.isatty() else 15  # lines of a log file are not overwritten
    told: set[str] = set()
    with (
        tqdm(total=config.steps, desc=f"train {config.name}", unit="step", mininterval=seconds) as bar,
        _interrupt_asks(control, bar),
    ):
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            claim.check()
            _show(bar, ray.get(control.shown.remote()))
            warnings = ray.get(control.warnings.remote())
            for kind in warnings.keys() - told:
                bar.write(f"Warning: {warnings[kind]}", file=sys.stderr)
            told = set(warnings)
    for note in ray.get(control.notes.remote()):
        print(note, file=sys.stderr)
    if failure := ray.get(control.failure.remote()):
        raise InputError(*failure)
    (got,) = outcome
    if isinstance(got, BaseException):
        raise got
    return got


def _show(bar: tqdm[Any], shown: tuple[int, dict[str, float]] | None) -> None:
    if shown is None or shown[0] == bar.n:
        return
    step, values = shown
    if not bar.n:  # so that the time left is not computed from steps of an earlier command
        bar.initial = step
    bar.n = step
    gpu: Any = {"gpu_gb": f"{values['gpu_memory']:.1f}"} if "gpu_memory" in values else {}
    bar.set_postfix(
        loss=f"{values['loss']:.3f}",
        lr=f"{values['learning_rate']:.1e}",
        images_per_s=f"{values['images_per_second']:.1f}",
        data_wait=f"{values['data_wait']:.0%}",
        **gpu,
    )


@contextmanager
def _interrupt_asks(control: Any, bar: tqdm[Any]) -> Iterator[None]:
    """Within, the first SIGINT asks the run to stop and the second raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bar.write("Stopping after this step, with a checkpoint. Ctrl-C again stops at once, without.", file=sys.stderr)
        control.stop.remote()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# What is kept.


def _keep(fitted: ray.train.Result, job: Job, control: Any, folder: str, started: float) -> TrainResult:
    """Write the averaged model beside the checkpoints and, at the end of the training, register it."""
    config = job.config
    if fitted.checkpoint is None:
        raise RuntimeError(f"Ray Train ended without a checkpoint in {folder}.")
    with fitted.checkpoint.as_directory() as path:
        state = checkpoint.load(path)
    learner, metrics, journal = state["learner"], state["metrics"], state.get("journal", {})
    model = boxinst.CondInst(config.model, pretrained=False)
    weights = {k.removeprefix("module."): v for k, v in learner["average"].items() if k.startswith("module.")}
    load_strict(model, weights, str(fitted.checkpoint.path))
    finished = learner["step"] == config.steps
    version, kept = "", storage.join(folder, MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        boxinst.save(model, scratch)
        storage.upload(scratch, kept)
        if finished and config.register:
            tags = {"shards": job.shards_hash, "steps": str(config.steps)}
            with tracking.explained(
                f"The model is in {kept}: the same command, when the server is back, registers it."
            ):
                # A command that was killed before it wrote its result may have registered it.
                made = registry.registered(job.run_id, config.name)
                made = made or registry.register(job.run_id, scratch, config.name, metrics=metrics, tags=tags)
                version = made.uri
    finest = best.recorded(*storage.fs_path(folder))
    result = TrainResult(
        status="finished" if finished else "stopped",
        steps=learner["step"],
        resumed_from=ray.get(control.start.remote()),
        seconds=time.monotonic() - started,
        metrics=metrics,
        run_id=job.run_id,
        model=kept,
        version=version,
        best=storage.join(folder, finest["folder"]) if finest else "",
        warnings=list(journal.get("warnings", {}).values()),
        used=observe.used(ray.get(control.used.remote())),
    )
    if finished:
        storage.write_bytes(storage.join(folder, RESULT), json.dumps(asdict(result), indent=2).encode())
    return result
