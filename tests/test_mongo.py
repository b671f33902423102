"""The review's database: started once, shared, stopped by the last that leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boxinst.errors import InputError
from pipelines import mongo

CLIENT = """
import sys
from pipelines import mongo
print(mongo.connect(), flush=True)
sys.stdin.read()
"""


def _client(home: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FIFTYONE_")} | {"BOXINST_HOME": str(home)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CLIENT], env=environment, stdin=pipe, stdout=pipe, text=True)


def _says(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    return client.stdout.readline().strip()


def _leaves(client: subprocess.Popen[str]) -> None:
    client.communicate(timeout=60)
    assert client.returncode == 0


def test_processes_that_start_at_once_share_one_database(tmp_path: Path) -> None:
    first, second, other = _client(tmp_path / "a"), _client(tmp_path / "a"), _client(tmp_path / "b")
    address = _says(first)
    assert address.startswith("mongodb://127.0.0.1:")
    assert _says(second) == address
    assert _says(other) != address  # another home has another database
    _leaves(first)
    assert mongo._ask(address, "ping") is not None  # the second still uses it
    _leaves(second)
    assert mongo._ask(address, "ping", seconds=0.5) is None
    _leaves(other)


def test_a_killed_process_leaves_a_database_that_the_next_one_finds(tmp_path: Path) -> None:
    killed = _client(tmp_path)
    address = _says(killed)
    killed.kill()
    killed.wait()
    after = _client(tmp_path)
    assert _says(after) == address
    _leaves(after)
    deadline = time.monotonic() + 20
    while (gone := mongo._ask(address, "ping", seconds=0.5)) is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert gone is None


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mongo.ADDRESS, "mongodb://someone:secret@127.0.0.1:1/")
    monkeypatch.setattr(mongo, "_ask", lambda *_: None)
    with pytest.raises(InputError, match="nobody answers") as error:
        mongo.connect()
    assert error.value.item == mongo.ADDRESS
    assert "127.0.0.1:1" in str(error.value)
    assert "secret" not in str(error.value)
    assert "unset" in error.value.remedy


def test_without_mongodb_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mongo, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no mongod program") as error:
        mongo._mongod()
    assert "boxinst[mongo]" in error.value.remedy


def test_a_database_that_does_not_start_names_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mongo, "_mongod", lambda: "/bin/false")
    with pytest.raises(InputError, match="does not start") as error:
        mongo._start(tmp_path)
    assert "mongod.log" in error.value.remedy
