"""pipelines.claims: of two commands one works, the other is told who; the dead hold nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from boxinst.errors import InputError
from pipelines import claims, storage
from pipelines.claims import Claim, Owner


@pytest.fixture(params=["file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/runs/cells" if request.param == "file" else f"{request.getfixturevalue('s3')}/runs/cells"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.2)
    monkeypatch.setattr(claims, "STALE", 2.5)  # S3 tells times in whole seconds


def abandon(folder: str, change: Callable[[Owner], Owner]) -> bytes:
    """Leave the claim of an owner who gives no sign of life."""
    data = json.dumps(asdict(change(Owner.this()))).encode()
    storage.write_bytes(f"{folder}.claim", data + b"\nx" * storage.is_s3(folder))
    return data


def test_the_second_is_refused_and_told_who_until_the_first_has_ended(folder: str) -> None:
    with claims.held(folder, "--name"):
        with pytest.raises(InputError) as caught, claims.held(folder, "--name"):
            pytest.fail("two hold it")
        assert caught.value.item == "--name"
        assert f"process {Owner.this().pid} of " in str(caught.value.value)
        assert "another name" in caught.value.remedy
        with claims.held(folder + "2", "--name"):
            pass
    assert not storage.exists(f"{folder}.claim")
    with claims.held(folder, "--name"):
        pass


def test_a_killed_command_holds_nothing(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    code = f"from pipelines import claims\nwith claims.held({folder!r}, 'x'): print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:  # type: ignore[call-overload]
        other.stdout.readline()
        with pytest.raises(InputError, match=f"process {other.pid} of"), claims.held(folder, "--name"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with claims.held(folder, "--name"):
        pass


def test_another_machine_is_given_time_to_show_that_it_lives(folder: str, quick: None) -> None:
    abandon(folder, lambda owner: replace(owner, machine="elsewhere", about="process 7 of ann on elsewhere"))
    with claims.held(folder, "--name"):
        pass  # it was dead

    with pytest.MonkeyPatch.context() as patch:
        elsewhere = replace(Owner.this(), machine="elsewhere", about="process 8 of bob on elsewhere")
        patch.setattr(Owner, "this", lambda: elsewhere)
        living = claims.held(folder, "--name")
        living.__enter__()
    with pytest.raises(InputError, match="process 8 of bob on elsewhere"), claims.held(folder, "--name"):
        pass
    living.__exit__(None, None, None)


def test_who_stood_still_and_lost_the_claim_is_told(folder: str, quick: None) -> None:
    with claims.held(folder, "--name") as claim:
        claim.check()
        other = abandon(folder, lambda owner: owner)
        claim._thread.join(30)
        with pytest.raises(InputError, match="taken over by another command"):
            claim.check()
    assert storage.read_bytes(f"{folder}.claim").startswith(other)  # not ours to remove


def test_of_many_who_find_a_dead_claim_one_gets_it(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")

    def take(_: int) -> AbstractContextManager[Claim] | None:
        holder = claims.held(folder, "--name")
        try:
            holder.__enter__()
        except InputError:
            return None
        return holder

    for _ in range(20):
        abandon(folder, lambda owner: replace(owner, started="long ago"))
        with ThreadPoolExecutor(8) as pool:
            (holder,) = filter(None, pool.map(take, range(8)))
        holder.__exit__(None, None, None)


def test_a_bucket_itself_cannot_be_claimed() -> None:
    with pytest.raises(InputError, match="prefix within the bucket"), claims.held("s3://bucket", "--out"):
        pass
