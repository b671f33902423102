"""Faults on a cluster of several nodes: whatever is killed, a run ends where an unbroken one does."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nodes
import pytest
import torch
from mlflow import MlflowClient
from nodes import Nodes, wait_until
from rows import masks_of
from safetensors.torch import load

from pipelines import checkpoint, maskrows, storage

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

CPUS = (1, 3, 3)
"""Of the head and two more nodes. A training worker takes 2, so each of two is on a node of its own, not the head."""

TRAIN = shlex.split(
    """--model.backbone resnet18 --model.width 16 --model.fpn-channels 16 --model.no-detect --model.mask-stride 4
    --model.mask-branch-channels 16 --model.mask-branch-layers 1 --loss.warmup-steps 3 --augment.crop 64 --steps 16
    --batch-size 4 --lr-warmup-steps 1 --log-every 1 --precision fp32 --checkpoint-every 3 --data-workers 1
    --no-register"""
)
INTERVAL = 3
"""Steps between two checkpoints."""
PAIR = shlex.split("--workers 2 --cpus-per-worker 2")
SEGMENT = shlex.split("--short-side 384 --checkpoint-images 1 --batch-size 1 --workers 2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every command of this module."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Three nodes; a test that kills one adds another."""
    with nodes.running(*CPUS) as made:
        yield made


def train(name: str, shards: dict[str, str], *more: str) -> list[str]:
    return ["train", "--shards", shards["train"], "--val", shards["val"], "--name", name, *TRAIN, *(more or PAIR)]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, home: Path) -> str:
    """Where a command's output goes: its home, and a bucket."""
    return str(home) if request.param == "local" else f"{request.getfixturevalue('s3')}/store"


def result(store: str | Path, name: str) -> dict[str, Any]:
    return json.loads(storage.read_bytes(f"{store}/runs/{name}/result.json"))


def checkpointed(store: str | Path, name: str, least: int = 1) -> int:
    """The step of the last checkpoint that a run would go on from; 0 when there is none or it is below ``least``."""
    try:
        snapshot = json.loads(storage.read_bytes(f"{store}/runs/{name}/{checkpoint.LIST}"))
        step = int(snapshot["latest_checkpoint_result"]["checkpoint_dir_name"].rpartition("_")[2])
    except (FileNotFoundError, ValueError, TypeError):  # not yet, or just being written
        return 0
    return step if step >= least else 0


def reached(store: str | Path, home: Path, name: str) -> int:
    """The last step that MLflow was told of."""
    run_id = json.loads(storage.read_bytes(f"{store}/runs/{name}/run.json"))["run_id"]
    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    return max(entry.step for entry in client.get_metric_history(run_id, "train/loss"))


@pytest.fixture(scope="module")
def unbroken(home: Path, cluster: Nodes, shards: dict[str, str]) -> dict[str, Any]:
    """Result of a run that nothing disturbed."""
    nodes.run(*train("unbroken", shards), home=home, address=cluster.address, log=home / "log")
    return result(home, "unbroken")


def assert_same_end(store: str | Path, name: str, unbroken: dict[str, Any], kept: int, last: int | None = None) -> None:
    """Not less than the last checkpoint was kept, and the rest was done as in the unbroken run.

    Args:
        store: where the run is.
        name: of the run.
        unbroken: result of a run that nothing disturbed.
        kept: step of the last checkpoint before the kill.
        last: the last step before the kill.
    """
    ended = result(store, name)
    assert (ended["status"], ended["steps"]) == ("finished", unbroken["steps"])
    assert kept <= ended["resumed_from"] < unbroken["steps"]
    if last is not None:
        # One interval, and another while the upload of a checkpoint is under way: the next one waits for it.
        assert 0 <= last - ended["resumed_from"] <= 2 * INTERVAL
    assert ended["metrics"] == pytest.approx(unbroken["metrics"], abs=1e-6)
    wanted = load(storage.read_bytes(f"{unbroken['model']}/model.safetensors"))
    for key, tensor in load(storage.read_bytes(f"{ended['model']}/model.safetensors")).items():
        assert torch.allclose(tensor, wanted[key], atol=1e-6), key


def test_a_training_worker_is_killed(
    home: Path, cluster: Nodes, shards: dict[str, str], unbroken: dict[str, Any]
) -> None:
    with nodes.command(*train("worker", shards), home=home, address=cluster.address, log=home / "log") as command:
        at = wait_until(lambda: checkpointed(home, "worker", 2 * INTERVAL), "two checkpoints")
        os.kill(cluster.processes("RayTrainWorker")[1].pid, signal.SIGKILL)
        last = reached(home, home, "worker")
        assert command.wait(nodes.LIMIT) == 0, (home / "log").read_text()
    assert_same_end(home, "worker", unbroken, at, last)


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
    store: str, home: Path, cluster: Nodes, shards: dict[str, str], unbroken: dict[str, Any]
) -> None:
    name, variables = "driver-s3" if storage.is_s3(store) else "driver", {"BOXINST_STORE": store}
    words = train(name, shards)
    with nodes.command(*words, home=home, address=cluster.address, log=home / "log", env=variables) as command:
        wait_until(lambda: storage.exists(f"{store}/runs/{name}.claim"), "the run's claim")
        with nodes.command(*words, home=home, address=cluster.address, log=home / "second", env=variables) as second:
            assert second.wait(nodes.LIMIT) == 2
        said = (home / "second").read_text()
        assert "boxinst train: --name: " in said
        assert f"is being written by process {command.pid}" in said
        at = wait_until(lambda: checkpointed(store, name, 2 * INTERVAL), "two checkpoints")
        nodes.kill_all(command)
    assert not storage.exists(f"{store}/runs/{name}/result.json")
    wait_until(lambda: not cluster.processes("RayTrainWorker"), "the end of the workers")
    last = reached(store, home, name)
    nodes.run(*words, home=home, address=cluster.address, log=home / "log", env=variables)
    assert_same_end(store, name, unbroken, at, last)


def test_an_elastic_training_goes_on_with_the_workers_that_are_left(
    home: Path, cluster: Nodes, shards: dict[str, str], unbroken: dict[str, Any]
) -> None:
    words = train("elastic", shards, *PAIR, "--workers-min", "1")
    with nodes.command(*words, home=home, address=cluster.address, log=home / "log") as command:
        at = wait_until(lambda: checkpointed(home, "elastic"), "a checkpoint")
        workers = cluster.processes("RayTrainWorker")
        assert len(workers) == 2
        cluster.tell(f"kill {max(map(cluster.node_of, workers))}")
        assert command.wait(nodes.LIMIT) == 0, (home / "log").read_text()
    cluster.tell("add 3")
    ended = result(home, "elastic")
    assert (ended["status"], ended["steps"]) == ("finished", unbroken["steps"])
    assert at <= ended["resumed_from"] < unbroken["steps"]
    # Not to the digit, as each worker normalises by its own images.
    for name in ("mask_iou", "box_iou"):
        assert ended["metrics"][name] == pytest.approx(unbroken["metrics"][name], abs=0.25), name


def test_an_elastic_training_takes_in_a_worker_when_a_node_comes(
    home: Path, shards: dict[str, str], tmp_path: Path
) -> None:
    words = train("grown", shards, *PAIR, "--workers-min", "1")
    words[words.index("--steps") + 1] = "5000"  # more than it needs: it is stopped
    with (
        nodes.running(*CPUS[:2]) as small,
        nodes.command(*words, home=home, address=small.address, log=tmp_path / "log") as command,
    ):
        at = wait_until(lambda: checkpointed(home, "grown"), "a checkpoint")
        assert len(small.processes("RayTrainWorker")) == 1
        small.tell(f"add {CPUS[2]}")
        wait_until(lambda: len(set(map(small.node_of, small.processes("RayTrainWorker")))) == 2, "a second worker")
        before = checkpointed(home, "grown")
        wait_until(lambda: checkpointed(home, "grown", before + 2 * INTERVAL), "checkpoints of both")
        assert len(small.processes("RayTrainWorker")) == 2
        command.send_signal(signal.SIGINT)
        assert command.wait(nodes.LIMIT) == 0, (tmp_path / "log").read_text()
    assert at <= before


# What a run leans on goes away. One worker, in a cluster of the command's own.


@pytest.fixture(scope="module")
def alone(home: Path, shards: dict[str, str]) -> dict[str, Any]:
    """Result of such a run that nothing disturbed."""
    nodes.run(*train("alone", shards, "--workers", "1"), home=home, log=home / "log")
    return result(home, "alone")


def test_a_full_disk_ends_a_training_and_the_last_checkpoint_is_kept(
    tmp_path: Path, shards: dict[str, str], alone: dict[str, Any]
) -> None:
    runs = tmp_path / "home" / "runs"
    runs.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(runs)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        words = train("full", shards, "--workers", "1")
        with nodes.command(*words, home=tmp_path / "home", log=tmp_path / "log") as command:
            at = wait_until(lambda: checkpointed(tmp_path / "home", "full"), "a checkpoint")
            with (runs / "filler").open("ab", buffering=0) as filler:

                def ended_with_no_room() -> bool:
                    filler.write(bytes(shutil.disk_usage(runs).free))
                    return command.poll() is not None

                wait_until(ended_with_no_room, "the end")
            assert command.wait() == 2, (tmp_path / "log").read_text()
        said = (tmp_path / "log").read_text()
        assert f"boxinst train: checkpoint: no room for {runs}/full/checkpoint_" in said
        assert "Make room there, then run the same command again" in said
        kept = checkpointed(tmp_path / "home", "full")
        assert kept >= at
        (runs / "filler").unlink()
        nodes.run(*words, home=tmp_path / "home", log=tmp_path / "log")
        assert result(tmp_path / "home", "full")["resumed_from"] == kept
        assert_same_end(tmp_path / "home", "full", alone, at)
    finally:
        subprocess.run(["umount", "--lazy", str(runs)], check=True)


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A real one, once it answers."""
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen([sys.executable, "-m", "mlflow", *words], stdout=log, stderr=log)

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            return False
        return True

    try:
        wait_until(answers, "the MLflow server")
        yield
    finally:
        nodes.kill_all(server)


def test_the_tracking_server_is_away_for_a_while(tmp_path: Path, shards: dict[str, str], alone: dict[str, Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, words = tmp_path / "home", train("away", shards, "--workers", "1")
    variables = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with ExitStack() as stack:
        with mlflow_server(tmp_path, port):
            command = stack.enter_context(nodes.command(*words, home=home, log=tmp_path / "log", env=variables))
            at = wait_until(lambda: checkpointed(home, "away"), "a checkpoint")
        # It trains on without it.
        wait_until(lambda: checkpointed(home, "away") > at, "another checkpoint")
        time.sleep(30)
        stack.enter_context(mlflow_server(tmp_path, port))
        assert command.wait(nodes.LIMIT) == 0, (tmp_path / "log").read_text()
        client = MlflowClient(tracking_uri=variables["MLFLOW_TRACKING_URI"])
        ended = result(home, "away")
        assert (ended["status"], ended["resumed_from"]) == ("finished", 0)
        assert ended["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
        run_id = ended["run_id"]
        history = [metric.step for metric in client.get_metric_history(run_id, "train/loss")]
        assert history == list(range(1, 17))
        assert client.get_run(run_id).info.status == "FINISHED"
        assert [f.path for f in client.list_artifacts(run_id, "validation")] == ["validation/0000016.png"]


# Nodes with addresses of their own


def test_nodes_started_by_hand_in_a_network_of_their_own(tmp_path: Path, shards: dict[str, str]) -> None:
    name = f"boxinst{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True) if shutil.which("ip") else None
    if made is None or made.returncode:
        pytest.skip(f"no network namespace: {made.stderr.decode().strip() if made else 'there is no program ip'}")
    within = ["ip", "netns", "exec", name]
    scratch = tempfile.mkdtemp(prefix="ray")
    variables = {"RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0", nodes.LOOPBACK_ONLY: "1"}
    ray = [*within, str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    head = [*ray, "--head", "--node-ip-address", "127.0.0.1", "--port", "6379", "--include-dashboard", "false"]
    started = []
    try:
        subprocess.run([*within, "ip", "link", "set", "lo", "up"], check=True)
        with (tmp_path / "ray.log").open("wb") as log:
            for words in (
                [*head, "--num-cpus", "1"],
                [*ray, "--address", "127.0.0.1:6379", "--node-ip-address", "127.0.0.2", "--num-cpus", "3"],
                [*ray, "--address", "127.0.0.1:6379", "--node-ip-address", "127.0.0.3", "--num-cpus", "3"],
            ):
                wait_until(lambda: not started or _joined(within, len(started)), "the node before")
                started.append(
                    subprocess.Popen(
                        words, stdout=log, stderr=log, env={**os.environ, **variables}, start_new_session=True
                    )
                )
            wait_until(lambda: _joined(within, 3), "all nodes")
        argv = train("netns", shards)
        home = tmp_path / "home"
        with nodes.command(
            *argv, home=home, address="127.0.0.1:6379", log=tmp_path / "log", before=within, env=variables
        ) as command:
            at = wait_until(lambda: checkpointed(home, "netns"), "a checkpoint")
            nodes.kill_all(started.pop())  # with its workers
            started.append(subprocess.Popen(words, env={**os.environ, **variables}, start_new_session=True))
            assert command.wait(nodes.LIMIT) == 0, (tmp_path / "log").read_text()
        ended = result(home, "netns")
        assert (ended["status"], ended["steps"]) == ("finished", 16)
        assert ended["resumed_from"] >= at
    finally:
        for process in started:
            nodes.kill_all(process)
        subprocess.run(["ip", "netns", "del", name], check=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _joined(within: list[str], count: int) -> bool:
    """Whether so many nodes are alive."""
    code = "import ray; ray.init('127.0.0.1:6379', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    asked = subprocess.run([*within, sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    return asked.stdout.strip() == str(count)


# Segmentation


def segment(out: str, shards: dict[str, str], model: str) -> list[str]:
    return ["segment", "--model", model, "--shards", shards["train"], "--out", out, *SEGMENT]


def parts(out: str) -> list[str]:
    """Of a run under way, the records of the parts that are whole: that of another has a name that says so."""
    return [name for name in storage.list_files(f"{out}/{maskrows.DONE}") if not name.endswith(".pending.parquet")]


@pytest.fixture(scope="module")
def wanted(home: Path, cluster: Nodes, shards: dict[str, str], tiny_model: str) -> list[dict[str, Any]]:
    """Mask rows of a run that nothing disturbed."""
    out = str(home / "masks" / "unbroken")
    nodes.run(*segment(out, shards, tiny_model), home=home, address=cluster.address, log=home / "log")
    return masks_of(out)


@pytest.mark.parametrize(
    ("victim", "place"), [("actor", "local"), ("node", "local"), ("driver", "local"), ("driver", "s3")]
)
def test_a_part_of_a_segmentation_is_killed(
    victim: str,
    place: str,
    request: pytest.FixtureRequest,
    home: Path,
    cluster: Nodes,
    shards: dict[str, str],
    tiny_model: str,
    wanted: list[dict[str, Any]],
) -> None:
    out = f"{home if place == 'local' else request.getfixturevalue('s3')}/masks/{victim}"
    words = segment(out, shards, tiny_model)
    with nodes.command(*words, home=home, address=cluster.address, log=home / "log") as command:
        wait_until(lambda: len(parts(out)) >= 2, "two parts")
        actors = cluster.processes("MapWorker(MapBatches(Segmenter))")
        if victim == "actor":
            actors[0].kill()
        elif victim == "node":
            cluster.tell(f"kill {max(map(cluster.node_of, actors))}")
            cluster.tell("add 3")
        else:
            nodes.kill_all(command)
        assert not storage.exists(f"{out}/manifest.json")
        if victim == "driver":
            nodes.run(*words, home=home, address=cluster.address, log=home / "log")
        assert victim == "driver" or command.wait(nodes.LIMIT) == 0, (home / "log").read_text()
    assert masks_of(out) == wanted
