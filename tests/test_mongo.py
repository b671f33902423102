"""The review's database: started once, shared, stopped by the last that leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pymongo
import pytest
from commands import BIN, ROOT, compose
from pymongo.errors import OperationFailure
from swift_server import free_port

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


# --- a database that asks for a password, as in compose.yaml ---

PASSWORD = "hunter2-of-the-database"
REVIEW = """
from pipelines import mongo
mongo.connect()
import fiftyone as fo
dataset = fo.Dataset("cells", persistent=True)
dataset.add_sample(fo.Sample("a.png", boxes=fo.Detections(detections=[fo.Detection(label="cell")])))
dataset.reload()
print([(s.filename, s.boxes.detections[0].label) for s in dataset])
"""


@contextmanager
def _asking(folder: Path) -> Iterator[str]:
    """HOST:PORT of a MongoDB that knows one user, made as the image of compose.yaml makes it."""
    user = compose()["services"]["mongo"]["environment"]["MONGO_INITDB_ROOT_USERNAME"]
    port = free_port()
    command = [mongo._mongod(), "--auth", "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1"]
    server = subprocess.Popen([*command, "--nounixsocket"], stdout=subprocess.DEVNULL)
    try:
        with pymongo.MongoClient[Any](f"mongodb://127.0.0.1:{port}", serverSelectionTimeoutMS=60_000) as client:
            client.admin.command("createUser", user, pwd=PASSWORD, roles=["root"])  # allowed to the first from here
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _as_in_compose(place: str, password: str = PASSWORD) -> str:
    address = str(compose()["services"]["fiftyone"]["environment"][mongo.ADDRESS])
    return address.replace("mongo:27017", place).replace(":secret@", f":{password}@")


@pytest.mark.slow
@pytest.mark.timeout(900)  # FiftyOne alone takes minutes to import where many things run
def test_a_review_is_kept_where_a_password_is_asked_for(tmp_path: Path) -> None:
    with _asking(tmp_path) as place:
        address = _as_in_compose(place)
        environment = os.environ | {mongo.ADDRESS: address}
        words = [sys.executable, "-c", REVIEW]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "[('a.png', 'cell')]", done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        with pymongo.MongoClient[Any](address) as user:
            assert [dataset["name"] for dataset in user["fiftyone"]["datasets"].find()] == ["cells"]
        with (
            pytest.raises(OperationFailure, match="requires authentication"),
            pymongo.MongoClient[Any](f"mongodb://{place}") as nobody,
        ):
            nobody.list_database_names()


def test_a_wrong_password_is_named_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with _asking(tmp_path) as place:
        monkeypatch.setenv(mongo.ADDRESS, _as_in_compose(place, password="wrong-hunter2"))
        with pytest.raises(InputError) as error:
            mongo.connect()
    assert place in str(error.value)
    assert "hunter2" not in str(error.value) + "".join(capfd.readouterr())


@pytest.mark.long
@pytest.mark.timeout(1800)  # it takes minutes where many things run
def test_the_app_of_compose_answers(tmp_path: Path) -> None:
    service, port = compose()["services"]["fiftyone"], free_port()
    here = {
        "fiftyone": str(BIN / "fiftyone"),
        "--address=0.0.0.0": "--address=127.0.0.1",
        "--port=5151": f"--port={port}",
    }
    words = [here.get(word, word) for word in service["command"]]
    assert service["restart"] == "unless-stopped"  # FiftyOne gives up where its own server takes too long to start
    (tmp_path / "database").mkdir()
    log = tmp_path / "app.log"
    with _asking(tmp_path / "database") as place, log.open("wb") as out:
        environment = os.environ | {mongo.ADDRESS: _as_in_compose(place), "FIFTYONE_DO_NOT_TRACK": "true"}
        start = partial(subprocess.Popen, words, env=environment, cwd=tmp_path, stdout=out, stderr=out, process_group=0)
        apps = [start()]
        try:
            while True:  # until the test's own limit
                if apps[-1].poll() is not None:
                    assert "failed to bind to port" in log.read_text(), log.read_text()
                    apps.append(start())
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert b"FiftyOne" in answer.read()
                    break
                time.sleep(0.5)
        finally:
            for app in apps:
                with suppress(ProcessLookupError):
                    os.killpg(app.pid, signal.SIGKILL)
                app.wait()
    assert PASSWORD not in log.read_text()
