"""pipelines.train_loop: a slow store delays no training, and a checkpoint is visible only when it is whole.

And what is done of it where something fails.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

PATIENCE = 240.0
"""Seconds; it is only waited for as long when the test fails."""


def training(folder: Path) -> Callable[[], None]:
    """What the one worker does. A function within another travels to it whole; this module is unknown there."""

    def train() -> None:
        """One rank: two checkpoints; the upload of the first stands still, half done, until the next step is done."""
        import threading

        import torch

        from boxinst.condinst import CondInst
        from boxinst.config import ModelConfig
        from pipelines import checkpoint, train_loop
        from pipelines.best import Best
        from pipelines.config import TrainConfig
        from pipelines.journal import Journal
        from pipelines.learner import Learner
        from pipelines.optimization import make_average, make_optimizer, make_schedule
        from pipelines.train_job import Job

        half, go, upload = threading.Event(), threading.Event(), checkpoint.upload

        def slow(made: str, fs: Any, target: str) -> None:
            Path(target).mkdir()
            (Path(target) / checkpoint.TENSORS).write_bytes(b"half")
            half.set()
            assert go.wait(PATIENCE)
            upload(made, fs, target)

        checkpoint.upload = slow  # in this worker
        asked = TrainConfig(shards="s", steps=2, model=ModelConfig(classes=("a",), backbone="resnet18", width=16))
        torch.manual_seed(0)
        model = CondInst(asked.model)
        optimizer = make_optimizer(model, asked)
        learner = Learner(model, make_average(model, 0.5), optimizer, make_schedule(optimizer, asked))
        job, journal = Job(asked, "hash", None, None, "run", "", None), Journal(asked, None, None, None)
        best = Best(ray.train.get_context().get_storage().storage_filesystem, str(folder))
        seen = {}
        for step, value in ((1, 0.5), (2, 0.4)):
            learner.step = step
            best.offer(model, step, {"mask_iou": value})
            if step == 2:  # the training has come here while the first is on its way
                assert half.wait(PATIENCE)
                seen["on the way"] = sorted(p.name for p in folder.glob("checkpoint_0*/*"))
                seen["listed"] = (folder / checkpoint.LIST).exists()
                go.set()
            train_loop._save(job, learner, journal, {}, best.take(), rank=0)
        train_loop._wait_for_upload()
        (folder / "seen.json").write_text(json.dumps(seen))

    return train


@pytest.mark.long
def test_training_goes_on_while_a_checkpoint_is_on_its_way(ray_session: None, tmp_path: Path) -> None:
    from pipelines import best, checkpoint, storage

    folder = tmp_path / "run"
    result = TorchTrainer(
        training(folder),
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path)),
    ).fit()
    seen = json.loads((folder / "seen.json").read_text())
    assert seen == {"on the way": [checkpoint.TENSORS], "listed": False}
    listed = json.loads((folder / checkpoint.LIST).read_text())
    assert [r["checkpoint_dir_name"] for r in listed["checkpoint_results"]] == [
        "checkpoint_00000001",
        "checkpoint_00000002",
    ]
    assert checkpoint.load(result.checkpoint.path)["learner"]["step"] == 2
    assert best.recorded(*storage.fs_path(str(folder)))["step"] == 1


# Failures


def failing(control: Any = None) -> Any:
    """A job of one step."""
    from pipelines.config import TrainConfig
    from pipelines.train_job import Job

    return Job(TrainConfig(shards="s", steps=1), "hash", None, None, "run", "http://127.0.0.1:9", control)


def test_half_a_checkpoint_does_not_stay_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import checkpoint, train_loop

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = train_loop._set_aside(failing(), {"step": 1, "tensor": torch.ones(9)})
    assert checkpoint.load(whole)["step"] == 1
    monkeypatch.setattr(checkpoint, "STATE", "no-such-folder/state.json")  # after the tensors were written
    with pytest.raises(FileNotFoundError):
        train_loop._set_aside(failing(), {"step": 2, "tensor": torch.ones(9)})
    assert [str(path) for path in tmp_path.iterdir()] == [whole]


@pytest.mark.parametrize(("error", "patience"), [(RuntimeError("a GPU fell off"), "LAST_DELIVERY"), (None, "DELIVERY")])
def test_what_mlflow_lacks_is_told_however_a_training_ends(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, error: Exception | None, patience: str
) -> None:
    from pipelines import tracking, train_loop
    from pipelines.control import Control

    def train(job: Any) -> None:
        tracking.Run.join(job.run_id, job.tracking_uri).metrics({"loss": 1.0}, step=3)
        if error:
            raise error

    monkeypatch.setattr(tracking, "_outboxes", {})
    monkeypatch.setattr(train_loop, "_train", train)
    monkeypatch.setattr(train_loop, "DELIVERY", 1000.0)
    monkeypatch.setattr(train_loop, "LAST_DELIVERY", 1000.0)
    monkeypatch.setattr(train_loop, patience, 0.1)
    job = failing(ray.remote(num_cpus=0)(Control).remote())
    with pytest.raises(RuntimeError, match="a GPU fell off") if error else nullcontext():
        train_loop.train_loop(job)
    (note,) = ray.get(job.control.notes.remote())
    assert "MLflow at http://127.0.0.1:9 lacks metrics of step 3 of this run" in note
