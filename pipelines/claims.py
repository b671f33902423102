"""A claim on an output: while one command works on a folder, a second one of the same output is refused.

The claim is a small file beside the folder, ``FOLDER.claim``, made only where there is none. Its owner touches it every
few seconds, so that a claim whose owner has died is told from one that is held: at once on the same machine, and after
``STALE`` seconds elsewhere. Ages are told by the clock of the storage alone, so clocks that disagree do no harm.
"""

from __future__ import annotations

import fcntl
import functools
import getpass
import json
import os
import socket
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from boxinst.errors import InputError
from pipelines import s3, storage

BEAT = 5.0
"""Seconds between two signs of life."""
STALE = s3.PATIENCE + 60.0
"""Seconds without one after which an owner elsewhere counts as dead. The living may be silent for long: while storage
is away, which a command bears for ``s3.PATIENCE``, and while a JSON of some GB is parsed, which stops other threads."""
SETTLE = 2.0
"""Seconds until whoever found no claim has written its own, on a store that does not refuse the second."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim."""

    token: str
    """Of this claim alone."""
    machine: str
    """Name, boot and process namespace: where these agree, ``pid`` means the same process."""
    pid: int
    started: str
    """When the process started, by the kernel's count: process numbers come again."""
    about: str
    """For people: process, user, machine and time."""

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        pid, host = os.getpid(), socket.gethostname()
        boot = Path("/proc/sys/kernel/random/boot_id")
        namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        machine = f"{host} {boot.read_text().strip() if boot.exists() else ''} {namespace}"
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        about = f"process {pid} of {_user()} on {host} since {now}"
        return cls(uuid.uuid4().hex, machine, pid, _started(pid), about)

    def gone(self) -> bool | None:
        """Whether its process has ended; None where that cannot be seen from here, or no kernel tells of processes."""
        if self.machine != Owner.this().machine or not self.started:
            return None
        return _started(self.pid) != self.started


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may know no name
        return str(os.getuid())


def _started(pid: int) -> str:
    """Start of a process in clock ticks since the boot; empty when there is none, or only its remains."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


class _Place(ABC):
    """Where a claim lies."""

    @abstractmethod
    def make(self, data: bytes) -> bool:
        """Write it where there is none; False when there is one."""

    @abstractmethod
    def read(self) -> tuple[bytes, str, float] | None:
        """(content, version, age in seconds), or None when there is none."""

    @abstractmethod
    def touch(self, data: bytes) -> bool:
        """Make the claim ``data`` as young as new; False when it is there no more."""

    @abstractmethod
    def remove(self, version: str) -> bool:
        """Remove ``version``; False when it is there no more."""


class _File(_Place):
    """On a file system, which several machines may share. A version is the content: every owner has a token."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def _aside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")

    def make(self, data: bytes) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._aside()
        partial.write_bytes(data)
        try:
            os.link(partial, self.path)  # appears with its content, or not at all
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        return True

    def read(self) -> tuple[bytes, str, float] | None:
        now = self._aside()
        try:
            data = self.path.read_bytes()
            now.touch()
            age = now.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            now.unlink(missing_ok=True)
        return data, data.decode(), age

    def touch(self, data: bytes) -> bool:
        try:
            if self.path.read_bytes() != data:
                return False
            os.utime(self.path)
        except FileNotFoundError:
            return False
        return True

    def remove(self, version: str) -> bool:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            # Of several that find the same one dead, the later must not remove what the first has put in its place.
            fcntl.flock(folder, fcntl.LOCK_EX)
            if self.path.read_bytes().decode() != version:
                return False
            self.path.unlink()
        except FileNotFoundError:
            return False
        finally:
            os.close(folder)
        return True


class _Object(_Place):
    """On S3, by conditional writes. A version is the ETag, which a sign of life changes, as it is written anew.

    Not every store knows the conditions: some say so (501), some pass over them. Of two that find no claim there in the
    same moment, the one that writes last has it; the other learns so after ``SETTLE`` seconds, or at its next beat.
    """

    def __init__(self, uri: str) -> None:
        self.bucket, self.key = s3.split(uri)

    def _put(self, data: bytes, **condition: str) -> bool:
        # What follows the JSON is for the ETag.
        body = data + b"\n" + uuid.uuid4().hex.encode()
        put: Callable[..., object] = s3.client().put_object
        put = functools.partial(put, Bucket=self.bucket, Key=self.key, Body=body)
        try:
            s3.patiently(lambda: put(**condition))
        except ClientError as error:
            if s3.status(error) == 501:
                s3.patiently(put)
                time.sleep(SETTLE if "IfNoneMatch" in condition else 0)
            elif s3.status(error) not in (404, 409, 412):
                raise
        # Whatever was said: the answer to a write that was done may have been lost before it was tried again, and a
        # store that does not know the condition writes in any case. Whose claim is there holds it.
        found = self.read()
        return found is not None and found[0] == data

    def make(self, data: bytes) -> bool:
        # A store that does not know the condition would write over the one that is there.
        return self.read() is None and self._put(data, IfNoneMatch="*")

    def read(self) -> tuple[bytes, str, float] | None:
        def once() -> tuple[Any, bytes]:
            found = s3.client().get_object(Bucket=self.bucket, Key=self.key)
            return found, found["Body"].read()

        try:
            found, body = s3.patiently(once)
        except ClientError as error:
            if s3.status(error) == 404:
                return None
            raise
        said = found["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(said) if said else datetime.now(UTC)
        age = (now - found["LastModified"]).total_seconds()
        return body.rpartition(b"\n")[0], found["ETag"], age

    def touch(self, data: bytes) -> bool:
        found = self.read()
        return found is not None and found[0] == data and self._put(data, IfMatch=found[1])

    def remove(self, version: str) -> bool:
        found = self.read()
        if found is None or found[1] != version:
            return False
        s3.delete(f"s3://{self.bucket}/{self.key}")
        return True


class Claim:
    """A claim that is held; see ``held``."""

    def __init__(self, folder: str, item: str, place: _Place, data: bytes) -> None:
        self._folder, self._item, self._place, self._data = folder, item, place, data
        self._lost, self._end = False, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Before the output is changed for good.

        Raises:
            InputError: another command has taken the folder over, while this one gave no sign of life.
        """
        if self._lost:
            value = f"{storage.redact(self._folder)} was taken over by another command while this one stood still"
            raise InputError(self._item, value, "Leave it to that one, or give another name.")

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            try:
                self._lost = not self._place.touch(self._data)
            except (OSError, BotoCoreError, ClientError):
                continue  # the storage is away; so it is for those who would take the claim
            if self._lost:
                return

    def release(self) -> None:
        """Let others have the folder."""
        self._end.set()
        self._thread.join()
        with suppress(OSError, BotoCoreError, ClientError):  # it goes stale
            found = self._place.read()
            if found is not None and found[0] == self._data:
                self._place.remove(found[1])


@contextmanager
def held(folder: str, item: str) -> Iterator[Claim]:
    """Hold the claim on ``folder`` within the block. Where the owner of another claim may be dead, waits to see.

    Args:
        folder: local path or ``s3://`` prefix; it need not exist, and the claim lies beside it.
        item: the option that named it, for the error.

    Raises:
        InputError: another command works on it.
    """
    claim = Claim(folder, item, *_take(folder, item))
    try:
        yield claim
    finally:
        claim.release()


def _take(folder: str, item: str) -> tuple[_Place, bytes]:
    if storage.is_s3(folder) and "/" not in folder.removeprefix("s3://").strip("/"):
        raise InputError(item, storage.redact(folder), "Give a prefix within the bucket.")
    place: _Place
    if storage.is_s3(folder):
        place = _Object(f"{folder.rstrip('/')}.claim")
    else:
        place = _File(f"{storage.fs_path(folder)[1]}.claim")
    owner = Owner.this()
    data = json.dumps(asdict(owner)).encode()
    with storage.explained(folder):
        while not place.make(data):
            _wait_for_death(place, folder, item)
    return place, data


def _wait_for_death(place: _Place, folder: str, item: str) -> None:
    """Return when the claim may be made anew.

    Raises:
        InputError: its owner is alive.
    """
    first: tuple[str, float] | None = None
    while (found := place.read()) is not None:
        data, version, age = found
        try:
            owner = Owner(**json.loads(data))
        except (ValueError, TypeError):
            owner = Owner("", "", 0, "", "an unknown command")
        gone = owner.gone()
        if gone or (gone is None and age > STALE):
            place.remove(version)
            return
        beaten = first is not None and (version != first[0] or age < first[1])
        if gone is False or beaten:
            value = f"{storage.redact(folder)} is being written by {owner.about} (sign of life {max(age, 0):.0f} s ago)"
            remedy = "Wait until it has ended, or stop it, or give another name. A dead command's claim ends by itself."
            raise InputError(item, value, remedy)
        if first is None:
            first = version, age
            print(f"{owner.about} was writing {folder}: waiting to see whether it lives.", file=sys.stderr)
        time.sleep(min(1.0, BEAT / 2))
