"""Faults on a cluster of several nodes: whatever is killed, a run ends where an unbroken one does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes
import pytest
import torch
from nodes import Nodes, wait_until
from safetensors.torch import load_file

from pipelines import maskrows, storage

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

CPUS = (1, 3, 3)
"""Of the head and two more nodes. A training worker takes 2, so each of two is on a node of its own, not the head."""

TRAIN = """--model.backbone resnet18 --model.width 16 --model.fpn-channels 16 --model.no-detect --model.mask-stride 4
--model.mask-branch-channels 16 --model.mask-branch-layers 1 --loss.warmup-steps 3 --augment.crop 64 --steps 16
--batch-size 4 --lr-warmup-steps 1 --log-every 1 --precision fp32 --checkpoint-every 3 --data-workers 1 --no-register
--workers 2 --cpus-per-worker 2""".split()
SEGMENT = "--short-side 384 --checkpoint-images 1 --batch-size 1 --workers 2".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every command of this module."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Three nodes; a test that kills one adds another."""
    with nodes.running(*CPUS) as made:
        yield made


def train(name: str, shards: dict[str, str]) -> list[str]:
    return ["train", "--shards", shards["train"], "--val", shards["val"], "--name", name, *TRAIN]


def result(home: Path, name: str) -> dict[str, Any]:
    return json.loads((home / "runs" / name / "result.json").read_text())


def checkpointed(home: Path, name: str) -> int:
    """The step of the last checkpoint that a run would go on from; 0 when there is none."""
    try:
        snapshot = (home / "runs" / name / "checkpoint_manager_snapshot.json").read_text()
        return int(json.loads(snapshot)["latest_checkpoint_result"]["checkpoint_dir_name"].rpartition("_")[2])
    except (FileNotFoundError, ValueError, TypeError):  # not yet, or just being written
        return 0


@pytest.fixture(scope="module")
def unbroken(home: Path, cluster: Nodes, shards: dict[str, str]) -> dict[str, Any]:
    """Result of a run that nothing disturbed."""
    nodes.run(*train("unbroken", shards), home=home, address=cluster.address, log=home / "log")
    return result(home, "unbroken")


def assert_same_end(home: Path, name: str, unbroken: dict[str, Any], killed_at: int) -> None:
    """Not less than the last checkpoint was kept, and the rest was done as in the unbroken run."""
    ended = result(home, name)
    assert (ended["status"], ended["steps"]) == ("finished", unbroken["steps"])
    assert killed_at <= ended["resumed_from"] < unbroken["steps"]
    assert ended["metrics"] == pytest.approx(unbroken["metrics"], abs=1e-6)
    wanted = load_file(Path(unbroken["model"]) / "model.safetensors")
    for key, tensor in load_file(Path(ended["model"]) / "model.safetensors").items():
        assert torch.allclose(tensor, wanted[key], atol=1e-6), key


def test_a_training_worker_is_killed(
    home: Path, cluster: Nodes, shards: dict[str, str], unbroken: dict[str, Any]
) -> None:
    with nodes.command(*train("worker", shards), home=home, address=cluster.address, log=home / "log") as command:
        at = wait_until(lambda: checkpointed(home, "worker"), "a checkpoint")
        os.kill(cluster.processes("RayTrainWorker")[1].pid, signal.SIGKILL)
        assert command.wait(nodes.LIMIT) == 0, (home / "log").read_text()
    assert_same_end(home, "worker", unbroken, at)


def test_a_node_is_killed_in_training(
    home: Path, cluster: Nodes, shards: dict[str, str], unbroken: dict[str, Any]
) -> None:
    with nodes.command(*train("node", shards), home=home, address=cluster.address, log=home / "log") as command:
        at = wait_until(lambda: checkpointed(home, "node"), "a checkpoint")
        homes = {cluster.node_of(worker) for worker in cluster.processes("RayTrainWorker")}
        assert len(homes) == 2
        cluster.tell(f"kill {max(homes)}")
        cluster.tell("add 3")
        assert command.wait(nodes.LIMIT) == 0, (home / "log").read_text()
    assert_same_end(home, "node", unbroken, at)


def test_the_driver_of_a_training_is_killed(
    home: Path, cluster: Nodes, shards: dict[str, str], unbroken: dict[str, Any]
) -> None:
    words = train("driver", shards)
    with nodes.command(*words, home=home, address=cluster.address, log=home / "log") as command:
        at = wait_until(lambda: checkpointed(home, "driver"), "a checkpoint")
        with nodes.command(*words, home=home, address=cluster.address, log=home / "second") as second:
            assert second.wait(nodes.LIMIT) == 2
        said = (home / "second").read_text()
        assert "boxinst train: --name: " in said
        assert f"is being written by process {command.pid}" in said
        nodes.kill_group(command)
    assert not (home / "runs" / "driver" / "result.json").exists()
    wait_until(lambda: not cluster.processes("RayTrainWorker"), "the end of the workers")
    nodes.run(*words, home=home, address=cluster.address, log=home / "log")
    assert_same_end(home, "driver", unbroken, at)


# Segmentation


def rows(out: Path) -> list[dict[str, Any]]:
    manifest = storage.read_manifest(str(out), "masks")
    return [row for batch in maskrows.read(str(out), manifest) for row in batch.to_pylist()]


def segment(out: Path, shards: dict[str, str], model: str) -> list[str]:
    return ["segment", "--model", model, "--shards", shards["train"], "--out", str(out), *SEGMENT]


@pytest.fixture(scope="module")
def wanted(home: Path, cluster: Nodes, shards: dict[str, str], tiny_model: str) -> list[dict[str, Any]]:
    """Mask rows of a run that nothing disturbed."""
    out = home / "masks" / "unbroken"
    nodes.run(*segment(out, shards, tiny_model), home=home, address=cluster.address, log=home / "log")
    return rows(out)


@pytest.mark.parametrize("victim", ["actor", "node", "driver"])
def test_a_part_of_a_segmentation_is_killed(
    victim: str,
    home: Path,
    cluster: Nodes,
    shards: dict[str, str],
    tiny_model: str,
    wanted: list[dict[str, Any]],
) -> None:
    out = home / "masks" / victim
    words = segment(out, shards, tiny_model)
    with nodes.command(*words, home=home, address=cluster.address, log=home / "log") as command:
        wait_until(lambda: len(list(out.glob("checkpoint/*.parquet"))) >= 2, "two parts")
        actors = cluster.processes("MapWorker(MapBatches(Segmenter))")
        if victim == "actor":
            actors[0].kill()
        elif victim == "node":
            cluster.tell(f"kill {max(map(cluster.node_of, actors))}")
            cluster.tell("add 3")
        else:
            nodes.kill_group(command)
        assert not (out / "manifest.json").exists()
        if victim == "driver":
            nodes.run(*words, home=home, address=cluster.address, log=home / "log")
        assert victim == "driver" or command.wait(nodes.LIMIT) == 0, (home / "log").read_text()
    assert rows(out) == wanted
