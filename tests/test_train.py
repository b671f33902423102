"""pipelines.train: a run trains, tracks and registers; broken and resumed it ends where an unbroken one does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

import boxinst
from boxinst.config import AugmentConfig, LossConfig, ModelConfig
from boxinst.errors import InputError
from pipelines import registry, settings, storage
from pipelines.control import Control
from pipelines.feed import ShardIndex, Stream, Tally
from pipelines.guards import collapsed_masks
from pipelines.schema import Category
from pipelines.train import TrainConfig, TrainResult, _stream, run
from pipelines.train_job import Job

STEPS = 5

TINY = ModelConfig(
    backbone="resnet18",
    width=16,
    fpn_channels=16,
    detect=False,
    mask_stride=4,
    mask_branch_channels=16,
    mask_branch_layers=1,
    contrast_stretch=(1.0, 99.0),
)


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder that the trained runs of this module share."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("BOXINST_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="module")
def config(shards: dict[str, str], module_home: Path) -> TrainConfig:
    """5 steps on 12 images in batches of 4, so that it ends in the middle of the second epoch."""
    return TrainConfig(
        shards=shards["train"],
        name="whole",
        model=TINY,
        loss=LossConfig(warmup_steps=3),
        augment=AugmentConfig(crop=64),
        steps=STEPS,
        batch_size=4,
        lr_warmup_steps=1,
        log_every=2,
        precision="fp32",
        cpus_per_worker=1,
        checkpoint_every=1,
        data_workers=1,
    )


@pytest.fixture(scope="module")
def whole(config: TrainConfig, shards: dict[str, str]) -> TrainResult:
    """An unbroken run, validated in the middle and at the end."""
    return run(replace(config, val=shards["val"], eval_every=3))


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(Path(result.model) / "model.safetensors")


def once(ready: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Calls ``act`` in a thread as soon as ``ready`` is true."""

    def wait() -> None:
        deadline = time.monotonic() + 800
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_ends_with_a_model_that_segments(whole: TrainResult, config: TrainConfig, shards: dict[str, str]) -> None:
    assert (whole.status, whole.steps, whole.resumed_from) == ("finished", STEPS, 0)
    model = boxinst.load(whole.model)
    categories = storage.read_manifest(shards["train"]).categories
    assert model.config == replace(TINY, classes=tuple(c.name for c in categories))
    (found,) = model.segment([torch.zeros(3, 64, 64, dtype=torch.uint8)], [torch.tensor([[8.0, 8, 40, 40]])])
    assert found.masks.shape == (1, 64, 64)
    assert all(tensor.isfinite().all() for tensor in weights(whole).values())
    assert whole.version == "models:/whole/1"
    registered = load_file(registry.resolve(whole.version) / "model.safetensors")
    assert all(torch.equal(tensor, registered[name]) for name, tensor in weights(whole).items())


def test_mlflow_holds_all_that_makes_the_run_repeatable(
    whole: TrainResult, config: TrainConfig, shards: dict[str, str], module_home: Path
) -> None:
    client = MlflowClient(tracking_uri=settings.mlflow_uri())
    kept = client.get_run(whole.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params["learning_rate"] == str(config.learning_rate)
    assert kept.data.params["loss.warmup_steps"] == "3"
    assert kept.data.params["shards_hash"] == storage.read_manifest(shards["train"]).hash

    def steps_of(metric: str) -> list[int]:
        return [m.step for m in client.get_metric_history(whole.run_id, metric)]

    for term in (
        "loss",
        "projection",
        "pairwise",
        "dice",
        "grad_norm",
        "learning_rate",
        "images_per_second",
        "data_wait",
        "memory",
    ):
        assert steps_of(f"train/{term}") == [2, 4, STEPS], term
    assert 0 <= kept.data.metrics["train/data_wait"] <= 1
    assert 0 <= whole.used["data_wait"] <= 1
    assert 0.1 < whole.used["memory"] < 10, "GB"
    tally = Tally()
    Stream(ShardIndex.open(config.shards), config.seed).read(0, STEPS * config.batch_size, tally)
    assert whole.used["store_requests"] == tally.requests > 0
    assert whole.used["store_bytes"] == tally.bytes > 10_000
    for name in ("mask_iou", "mask_ap", "box_iou", "spill", "fill_over_95", "fill_under_05"):
        assert steps_of(f"val/{name}") == [3, STEPS], name
        assert whole.metrics[name] == kept.data.metrics[f"val/{name}"]
    warnings = collapsed_masks(whole.metrics, STEPS, config)
    assert whole.warnings == list(warnings.values()) == kept.data.tags.get("warnings", "").splitlines()
    pictures = [a.path for a in client.list_artifacts(whole.run_id, "validation")]
    assert pictures == [f"validation/{step:07d}.png" for step in (3, STEPS)]


def test_the_best_model_and_the_latest_checkpoints_are_kept_and_none_is_pickled(whole: TrainResult) -> None:
    run_folder = settings.home() / "runs" / "whole"
    folders = sorted(run_folder.glob("checkpoint_0*"))
    assert [f.name for f in folders] == [f"checkpoint_{step:08d}" for step in (STEPS - 1, STEPS)]
    assert {p.suffix for f in folders for p in f.iterdir()} == {".json", ".safetensors"}
    assert Path(whole.best) in [run_folder / f"best_{step:08d}" for step in (3, STEPS)]
    assert boxinst.load(whole.best).config == boxinst.load(whole.model).config


def test_a_finished_run_says_so_and_trains_nothing(whole: TrainResult, config: TrainConfig) -> None:
    started = time.monotonic()
    again = run(replace(config, eval_every=1, minutes=5))
    assert again == replace(whole, status="finished before")
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_killed_before_it_wrote_its_result_a_run_is_registered_once(
    whole: TrainResult, config: TrainConfig, shards: dict[str, str]
) -> None:
    written = settings.home() / "runs" / "whole" / "result.json"
    before = written.read_bytes()
    written.unlink()
    again = run(replace(config, val=shards["val"], eval_every=3))
    assert (again.status, again.resumed_from, again.version) == ("finished", STEPS, whole.version)
    assert registry.find("models:/whole/latest").version == 1
    written.write_bytes(before)


def stopped_at_once(config: TrainConfig) -> TrainResult:
    """What comes of Ctrl-C before the first step."""
    before = signal.getsignal(signal.SIGINT)
    thread = once(lambda: signal.getsignal(signal.SIGINT) is not before, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = run(config)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    return result


def ends_like(whole: TrainResult, stopped: TrainResult, resumed: TrainResult) -> None:
    """Check that the run that was stopped after its first step has ended as an unbroken one does."""
    client = MlflowClient(tracking_uri=settings.mlflow_uri())
    assert (resumed.status, resumed.steps, resumed.resumed_from) == ("finished", STEPS, stopped.steps)
    assert resumed.run_id == stopped.run_id
    assert resumed.version == ""
    assert client.get_run(stopped.run_id).info.status == "FINISHED"
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_stopped_a_run_goes_on_and_ends_where_an_unbroken_one_does(whole: TrainResult, config: TrainConfig) -> None:
    halted = replace(config, name="halted", register=False)
    stopped = stopped_at_once(halted)
    assert (stopped.status, stopped.steps) == ("stopped", 1)
    client = MlflowClient(tracking_uri=settings.mlflow_uri())
    assert client.get_run(stopped.run_id).info.status == "KILLED"
    assert boxinst.load(stopped.model).config.backbone == "resnet18"
    ends_like(whole, stopped, run(halted))


@pytest.mark.long
def test_a_run_whose_weights_were_lost_goes_on_from_before(whole: TrainResult, config: TrainConfig) -> None:
    """Ctrl-C after the first step; far too high a rate, whose second checkpoint is of no use; and then as before."""
    broken = replace(config, name="broken", register=False)
    stopped = stopped_at_once(broken)
    client = MlflowClient(tracking_uri=settings.mlflow_uri())

    # The second step is sound, and breaks the weights; the third one shows it.
    with pytest.raises(InputError) as caught:
        run(replace(broken, learning_rate=1e37))
    good, stale = (settings.home() / "runs" / "broken" / f"checkpoint_{step:08d}" for step in (1, 2))
    assert "not finite in step 3: " in str(caught.value.value)
    assert re.search(r"loss (nan|inf).*grad_norm nan with the images \d+, \d+, \d+, \d+$", str(caught.value.value))
    assert f"The last good checkpoint is {good}. Remove {stale}, which leads straight" in caught.value.remedy
    lost = client.get_run(stopped.run_id)
    assert lost.info.status == "FAILED"
    assert lost.data.tags["failure"] == str(caught.value)
    assert lost.data.tags["changed.learning_rate"] == "0.001 → 1e+37"
    assert all(tensor.isfinite().all() for tensor in load_file(good / "tensors.safetensors").values())
    shutil.rmtree(stale)
    ends_like(whole, stopped, run(broken))


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_takes_the_same_batches_of_a_ragged_corpus(
    workers: int, config: TrainConfig, ray_session: None
) -> None:
    """12 images in batches of 8: an epoch ends within a batch, and no worker has a step more than another."""
    asked = replace(config, workers=2, workers_min=1, batch_size=8)
    index = ShardIndex.open(asked.shards)
    control = ray.remote(num_cpus=0)(Control).remote()
    ray.get(control.resume_at.remote(2))
    job = Job(asked, "hash", None, None, "run", "", control)
    data = _stream(job, index)()
    data.context.execution_options.preserve_order = True
    parts = data.streaming_split(workers, equal=True)  # as Ray Train does

    def steps(part: ray.data.DataIterator) -> list[list[int]]:
        batches = part.iter_batches(batch_size=8 // workers, batch_format="pyarrow")
        return [batch["image_id"].to_pylist() for batch in batches]

    with ThreadPoolExecutor(workers) as pool:
        got = list(pool.map(steps, parts))
    together = [sorted(i for rank in ranks for i in rank) for ranks in zip(*got, strict=True)]
    whole = Stream(index, asked.seed).read(0, asked.steps * 8)["image_id"].to_pylist()
    assert together == [sorted(whole[8 * step : 8 * (step + 1)]) for step in range(2, asked.steps)]


@pytest.mark.long
def test_two_workers_stay_in_step_and_end_alike_when_one_dies(config: TrainConfig, shards: dict[str, str]) -> None:
    pair = replace(config, name="pair", workers=2, steps=8, register=False)
    unbroken = run(pair)
    assert (unbroken.status, unbroken.steps, unbroken.metrics) == ("finished", 8, {})
    client = MlflowClient(tracking_uri=settings.mlflow_uri())
    written = {key: client.get_metric_history(unbroken.run_id, key) for key in ("train/loss", "train/data_wait")}
    for key, entries in written.items():
        assert [entry.step for entry in entries] == [2, 4, 6, 8], f"{key}: one entry a step, by the first worker alone"

    def kill_a_worker() -> None:
        below = {p.pid for p in psutil.Process().children(recursive=True)}
        # By their titles; a process may end while it is asked.
        titles = {p.pid: "".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]) if p.pid in below}
        workers = [pid for pid, title in titles.items() if "RayTrainWorker" in title]
        os.kill(workers[1], signal.SIGKILL)

    folder = settings.home() / "runs" / "killed"
    # The checkpoint before is registered once a later one is there.
    thread = once(lambda: (folder / "checkpoint_00000002" / "state.json").exists(), kill_a_worker)
    killed = run(replace(pair, name="killed", val=shards["val"]))
    thread.join()
    assert (killed.status, killed.steps) == ("finished", 8)
    assert 1 <= killed.resumed_from < 8
    assert killed.metrics["instances"] == storage.read_manifest(shards["val"]).counts["boxes"], "of both workers"
    for name, tensor in weights(unbroken).items():
        assert torch.equal(tensor, weights(killed)[name]), name


@pytest.mark.slow
def test_fine_tuning_takes_the_network_over_and_the_time_limit_stops(
    whole: TrainResult, config: TrainConfig, shards: dict[str, str]
) -> None:
    tuned = replace(
        config,
        name="tuned",
        init=whole.version,
        shards=shards["train_boxes"],
        model=ModelConfig(),
        minutes=1e-6,
        learning_rate=1e-9,
        weight_decay=0,
        ema_decay=0,
    )
    result = run(tuned)
    assert (result.status, result.steps, result.version) == ("stopped", 1, "")
    before = weights(whole)
    for name, tensor in weights(result).items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, before[name], atol=1e-6), name


# Bad input: refused before Ray starts, by item, value and remedy.


def other(shards: str, out: Path, **changes: object) -> str:
    """A copy of a shard set whose manifest says something else."""
    shutil.copytree(shards, out)
    storage.write_manifest(str(out), replace(storage.read_manifest(shards), **changes))  # type: ignore[arg-type]
    return str(out)


def refused(config: TrainConfig, item: str, value: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        run(config)
    assert caught.value.item == item
    assert value in str(caught.value.value)
    assert remedy in caught.value.remedy


def test_more_workers_than_the_cluster_has(config: TrainConfig) -> None:
    refused(replace(config, name="many", workers=50, batch_size=50), "--workers", "50", "Give at most 3")


def test_shards_that_are_not_there(config: TrainConfig, tmp_path: Path) -> None:
    refused(replace(config, shards=str(tmp_path / "none")), "shards folder", "does not exist", "Correct the path")
    (tmp_path / "empty").mkdir()
    refused(replace(config, shards=str(tmp_path / "empty")), "shards folder", "no manifest", "boxinst shard")


def test_shards_of_a_newer_version(config: TrainConfig, tmp_path: Path) -> None:
    newer = other(config.shards, tmp_path / "s", schema_version=99)
    refused(replace(config, shards=newer), f"{newer}/manifest.json", "schema version 99", "Upgrade")


def test_shards_without_boxes(config: TrainConfig, tmp_path: Path) -> None:
    manifest = storage.read_manifest(config.shards)
    bare = other(config.shards, tmp_path / "s", counts={**manifest.counts, "boxes": 0})
    refused(replace(config, shards=bare), "--shards", "no boxes", "labelled boxes")


def test_validation_shards_of_other_classes(config: TrainConfig, shards: dict[str, str], tmp_path: Path) -> None:
    foreign = other(shards["val"], tmp_path / "s", categories=[Category(1, "mouse")])
    refused(replace(config, val=foreign), "--val", "mouse", "shards of the same classes")


def test_a_model_that_does_not_exist(config: TrainConfig) -> None:
    refused(replace(config, name="x", init="models:/nobody@champion"), "model", "nobody", "boxinst train")


def test_an_initial_model_of_another_network_or_class_list(config: TrainConfig, tmp_path: Path) -> None:
    classes = tuple(c.name for c in storage.read_manifest(config.shards).categories)
    for name, its_classes in (("same", classes), ("less", classes[:-1])):
        boxinst.save(boxinst.CondInst(replace(TINY, classes=its_classes)), tmp_path / name)
    wider = replace(config, name="x", init=str(tmp_path / "same"), model=replace(TINY, width=32))
    refused(wider, "--model.width", "32", "leave the options of `model` alone")
    refused(replace(config, name="x", init=str(tmp_path / "less")), "model", classes[0], "trained on these classes")
    resized = (
        f"--init-classes new: a classifier of {len(classes)} classes then takes the place of its {len(classes) - 1}"
    )
    refused(replace(config, name="x", init=str(tmp_path / "less")), "model", classes[0], resized)


def test_class_names_that_are_not_those_of_the_shards(config: TrainConfig) -> None:
    foreign = replace(config, name="x", model=replace(TINY, classes=("mouse",)))
    refused(foreign, "--model.classes", "mouse", "leave it empty")


def test_a_run_is_not_resumed_with_another_network_schedule_or_corpus(
    whole: TrainResult, config: TrainConfig, shards: dict[str, str]
) -> None:
    refused(replace(config, steps=9), "--steps", "9, but the run whole has 5", "--steps 5")
    wider = replace(config, model=replace(TINY, width=32))
    refused(wider, "--model.width", "32, but the run whole has 16", "another --name")
    refused(replace(config, shards=shards["train_boxes"]), "--shards", "hash", "another --name")


def test_a_name_whose_folder_holds_something_else(config: TrainConfig, module_home: Path) -> None:
    (module_home / "runs" / "mine").mkdir(parents=True)
    (module_home / "runs" / "mine" / "notes.txt").write_text("")
    refused(replace(config, name="mine"), "--name", "something else", "another name")
