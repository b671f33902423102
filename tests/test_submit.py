"""Commands on a Ray cluster: a real head node on this machine, its log and its exit status at the client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from boxinst.errors import InputError
from jobs import cli, submit

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a head node's dashboard and its temporary folder."""
    port, folder = free_port(), Path(f"/tmp/ray-head-{os.getpid()}")  # short: it holds sockets
    ray = Path(sys.executable).parent / "ray"
    command = f"{ray} start --head --block --node-ip-address=127.0.0.1 --port={free_port()} --num-cpus=2 "
    command += f"--dashboard-host=127.0.0.1 --dashboard-port={port} --include-dashboard=true "
    command += f"--dashboard-agent-listen-port={free_port()} --temp-dir={folder} --disable-usage-stats"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command.split(), env=environment, stdout=out, stderr=out, cwd=folder.parent, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=1)
                break
            except urllib.error.HTTPError:
                break  # it answers, and wants a token
            except OSError:
                time.sleep(0.5)
        yield address, folder
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the head and its children alone, not every Ray of this machine
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["rm", "-rf", str(folder)])


@pytest.mark.slow
def test_a_job_returns_its_log_and_its_status(head: tuple[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    address, folder = head
    words = ["submit", "--address", address, "--working-dir", str(ROOT), "--"]
    status = cli.main([*words, "shard", "--annotations", "/nowhere/a b.json", "--images", "/nowhere", "--out", "x"])
    shown = capfd.readouterr().out
    assert "/nowhere/a b.json" in shown, "the words must arrive unbroken, and the job's log here"
    assert status == 2, "bad input in the job is bad input here"
    (shipped,) = (p for p in folder.glob("session_2*/runtime_resources/working_dir_files/*") if p.is_dir())
    names = {p.name for p in shipped.iterdir()}
    assert {"jobs", "pipelines", "boxinst"} <= names
    assert not {".git", ".venv", "boxinst-home", ".mypy_cache", ".ruff_cache", ".pytest_cache"} & names


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
