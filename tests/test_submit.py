"""Commands on a Ray cluster: a real head node on this machine; logs, statuses and secrets on their way."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray.job_submission import JobSubmissionClient
from swift_server import free_port

from boxinst.errors import InputError
from jobs import cli, submit
from pipelines import launch, remote_jobs, secrets, storage
from pipelines.launch import SubmitConfig
from pipelines.schema import SHARD_SCHEMA, Category, Manifest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a head node's dashboard and its temporary folder."""
    port, folder = free_port(), Path(f"/tmp/ray-head-{os.getpid()}")  # short: it holds sockets
    ray = Path(sys.executable).parent / "ray"
    command = f"{ray} start --head --block --node-ip-address=127.0.0.1 --port={free_port()} --num-cpus=4 "
    command += f"--dashboard-host=127.0.0.1 --dashboard-port={port} --include-dashboard=true "
    command += f"--dashboard-agent-listen-port={free_port()} --temp-dir={folder} --disable-usage-stats"
    command += f" --ray-client-server-port={free_port()}"  # else two heads on one machine want the same
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # A machine that is busy with something else takes its time, and the workers do not stand back behind it for ever.
    environment |= {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180", "RAY_agent_register_timeout_ms": "180000"}
    environment["RAY_worker_niceness"] = "0"
    environment.pop("RAY_ADDRESS", None)
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command.split(), env=environment, stdout=out, stderr=out, cwd=folder.parent, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()
            try:
                remote_jobs.connect(address).submit_job(entrypoint="true")
                break
            except (InputError, RuntimeError):  # the server comes up in parts
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield address, folder
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the head and its children alone, not every Ray of this machine
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["rm", "-rf", str(folder)])


def submitted(address: str, code: str, **options: object) -> str:
    """Starts a Python script on the cluster as ``boxinst submit`` starts a command; returns the job's id."""
    config = SubmitConfig(address=address, **options)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as private:
        package = secrets.pack(launch.secret_values(config), Path(private)) if config.secret else None
        environment = launch.runtime_env(config, package)
        client = remote_jobs.connect(address)
        return client.submit_job(entrypoint=shlex.join(["python", "-c", code]), runtime_env=environment)


def files_with(text: str, folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


@pytest.mark.slow
def test_an_installed_copy_ships_itself_and_returns_log_and_status(head: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = head
    site = tmp_path / "site-packages"  # no source tree, no repository: as a wheel is installed
    for name in launch.PACKAGES:
        shutil.copytree(ROOT / name, site / name)
    (site / "jobs" / "__init__.py").write_text('"""Says which copy runs."""\nprint("from the copy", flush=True)\n')
    words = ["shard", "--annotations", "/nowhere/a b.json", "--images", "/nowhere", "--out", "x"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "submit", "--address", address, "--secret", "THE_SECRET", "--", *words],
        env=os.environ | {"PYTHONPATH": str(site), "THE_SECRET": "hunter2hunter2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "/nowhere/a b.json" in done.stdout, f"{done.stderr}\nthe words must arrive unbroken, and the job's log here"
    assert done.returncode == 2, "bad input in the job is bad input here"
    assert done.stdout.count("from the copy") == 2, "once here, once in the job"
    shipped = [p for p in folder.glob("session_2*/runtime_resources/py_modules_files/*/*") if p.is_dir()]
    assert {p.name for p in shipped} == {*launch.PACKAGES, "boxinst_secrets"}
    assert files_with("hunter2hunter2", folder) == [], "the command has ended, so its secrets are removed"


@pytest.mark.long
def test_a_secret_reaches_driver_and_workers_and_no_record(
    head: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    address, folder = head
    secret = "correct horse battery staple"
    monkeypatch.setenv("THE_SECRET", secret)
    code = """
import hashlib, os, ray
from pipelines import cluster, secrets
secrets.load()  # as the console script does
def digest():
    return hashlib.sha256(os.environ["THE_SECRET"].encode()).hexdigest()
cluster.start()
print("driver", digest())
print("worker", ray.get(ray.remote(digest).remote()))
cluster.remove_secrets()
"""
    job = submitted(address, code, secret=("THE_SECRET",))
    client = remote_jobs.connect(address)
    assert remote_jobs.follow(client, job).status == "SUCCEEDED"
    shown = capfd.readouterr().out
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert f"driver {digest}" in shown
    assert f"worker {digest}" in shown
    assert f"Ray dashboard: {address}\n" in shown, "as on every cluster that was started by others"
    records = repr(client.list_jobs()) + repr(client.get_job_info(job)) + client.get_job_logs(job)
    assert "THE_SECRET" in records, "its name may be seen"
    assert "setup hook" not in records, "no process starts that misses its secrets"
    assert secret not in records
    assert files_with(secret, folder) == [], "neither in Ray's logs, nor left behind"


WAIT = """
import time
from pathlib import Path

def main(argv):
    print("at work", flush=True)
    while not Path(argv[0]).exists():
        time.sleep(0.2)
    print("seen", flush=True)
    return 3
"""


@pytest.mark.long
def test_a_detached_job_goes_on_alone(
    head: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, _ = head
    site, file = tmp_path / "site-packages", tmp_path / "file"
    for name in launch.PACKAGES:
        shutil.copytree(ROOT / name, site / name)
    (site / "jobs" / "shard.py").write_text(WAIT)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "submit", "--address", address, "--detach", "--", "shard", str(file)],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job = re.fullmatch(
        rf"Job (\S+) on {address}\. Next: boxinst submit status\|logs\|stop \1 --address {address}\n", done.stdout
    )
    assert job, f"{done.stdout!r} is not how to go on, or the log was followed"
    client = remote_jobs.connect(address)
    assert remote_jobs.info(client, job[1]).status in ("PENDING", "RUNNING")
    deadline = time.monotonic() + 120
    while "at work" not in client.get_job_logs(job[1]) and time.monotonic() < deadline:
        time.sleep(0.2)
    file.touch()
    assert cli.main(["submit", "logs", job[1], "--address", address]) == 3
    assert re.search(r"at work\s+seen", capfd.readouterr().out)


TINY = "--steps 1 --batch-size 2 --precision fp32 --cpus-per-worker 1 --data-workers 1 --augment.crop 64"
TINY += " --model.backbone resnet18 --model.width 16 --model.fpn-channels 16 --model.no-detect --model.mask-stride 4"
TINY += " --model.mask-branch-channels 16 --model.mask-branch-layers 1"


def drawn_shards(out: str) -> str:
    """Two noisy images with a box each."""
    rows = []
    for number in (1, 2):
        png = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(png, "png")
        row = {"image_id": number, "file_name": f"{number}.png", "image": png.getvalue(), "width": 96, "height": 96}
        row |= {"annotation_ids": [number], "boxes": [[10.0, 10.0, 60.0, 60.0]], "labels": [0], "crowd": [False]}
        rows.append(row | {"masks": [None]})
    file = storage.write_parquet(f"{out}/a.parquet", [pa.Table.from_pylist(rows, SHARD_SCHEMA)], SHARD_SCHEMA)
    storage.write_manifest(out, Manifest("shards", [Category(1, "a")], [file], {"images": 2, "boxes": 2}))
    return out


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_mlflow_and_all_that_is_kept_know_nothing_of_a_secret(
    head: tuple[str, Path],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    address, folder = head
    secret = "correct horse battery staple"
    monkeypatch.setenv("THE_SECRET", secret)
    shards, masks = drawn_shards(str(tmp_path / "shards")), str(home / "masks")
    options = ["--address", address, "--secret", "THE_SECRET", "--env", f"BOXINST_HOME={home}"]
    for words in (
        ["train", "--shards", shards, "--name", "discreet", *TINY.split()],
        ["segment", "--shards", shards, "--model", "models:/discreet/1", "--out", masks],
    ):
        status = cli.main(["submit", *options, "--", *words])
        shown = capfd.readouterr()
        assert status == 0, shown.out
        assert secret not in shown.out + shown.err
    assert storage.read_manifest(masks, "masks").counts["boxes"] == 2
    assert [p.name for p in files_with("discreet", home) if p.name == "mlflow.db"], "the search does find what is there"
    assert list(home.glob("mlartifacts/**/model.safetensors"))
    assert files_with(secret, home) == files_with(secret, folder) == []


@pytest.mark.long
def test_a_broken_connection_is_made_anew_and_ctrl_c_leaves_the_job_running(
    head: tuple[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address, _ = head
    code = """
import time
try:
    for number in range(10000):
        print(f"line {number}.")
        time.sleep(0.2)
except KeyboardInterrupt:
    print("asked to stop")
"""
    job = submitted(address, code)
    told = tmp_path / "stderr"
    with cut_now_and_then(address) as through, told.open("w") as errors:
        words = [sys.executable, "-m", "jobs.cli", "submit", "logs", job, "--address", through]
        following = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert following.stdout is not None
        shown = "".join(iter(following.stdout.readline, "line 100.\n"))  # five connections, about
        following.send_signal(signal.SIGINT)
        assert following.wait(60) == 130
        following.stdout.close()
    assert [int(n) for n in re.findall(r"line (\d+)\.", shown)] == list(range(100)), "each line once"
    assert "trying again" in told.read_text()
    assert f"boxinst submit status|logs|stop {job}" in told.read_text()

    assert cli.main(["submit", "status", "--address", address]) == 0
    assert re.search(rf"{job}  running", capfd.readouterr().out)
    assert cli.main(["submit", "stop", job, "--address", address]) == 0
    assert f"{job}  stopped" in capfd.readouterr().out
    assert cli.main(["submit", "logs", job, "--address", address]) == 130
    assert "asked to stop" in capfd.readouterr().out, "it is asked as Ctrl-C asks"
    for words, said in (([], "job: not given"), (["nobody"], "the cluster knows no such job")):
        assert cli.main(["submit", "stop", *words, "--address", address]) == 2
        assert said in capfd.readouterr().err


def test_ctrl_c_that_comes_together_with_a_line_is_not_lost() -> None:
    class Client:
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            for number in range(100):
                if number == 10:
                    signal.raise_signal(signal.SIGINT)
                yield f"line {number}.\n"
                if number == 50:
                    await asyncio.sleep(0)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(remote_jobs._Log().follow(cast(JobSubmissionClient, Client()), "job"))


@contextmanager
def cut_now_and_then(address: str) -> Iterator[str]:
    """The same dashboard behind a proxy, which drops every connection after four seconds."""
    port = int(address.rsplit(":", 1)[1])

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def drop(*ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, do not end
                end.shutdown(socket.SHUT_RDWR)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", port))
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()
                threading.Timer(4, drop, (here, there)).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_command_takes_up_its_secrets_and_removes_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (file,) = secrets.pack({"THE_SECRET": "hunter2hunter2"}, tmp_path).iterdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(secrets.NAMES, "THE_SECRET")
    monkeypatch.setenv("THE_SECRET", "")  # so that it is taken away again
    with pytest.raises(SystemExit):  # a command that fails, too
        cli.main(["submit", "--nonsense"])
    assert os.environ["THE_SECRET"] == "hunter2hunter2"
    assert not file.exists()


def test_no_cluster_at_the_address() -> None:
    with pytest.raises(InputError) as error:
        submit.main(["--address", f"http://127.0.0.1:{free_port()}", "--", "train", "--help"])
    assert "--address" in str(error.value)
    assert "RAY_AUTH_TOKEN" in str(error.value)


@pytest.mark.parametrize("words", [[], ["--"], ["--", "trian"], ["--", "submit"]])
def test_there_must_be_a_command(words: list[str]) -> None:
    with pytest.raises(InputError, match="the command after --"):
        submit.main(["--address", "http://127.0.0.1:1", *words])


def test_the_address_is_the_dashboards(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        submit.main(["--address", "ray://127.0.0.1:10001", "--", "train"])
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--address: ray://127.0.0.1:10001. Give the dashboard's address" in shown
