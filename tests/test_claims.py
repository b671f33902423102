"""pipelines.claims: of two commands one works, the other is told who; the dead hold nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Request

from boxinst.errors import InputError
from pipelines import claims, s3, storage
from pipelines.claims import Claim, Owner

CONDITION = re.compile(rb"(?im)^if-(?:none-)?match:[^\n]*\n")


def without_conditions(store: str, request: Request) -> tuple[int, dict[str, str], bytes] | None:
    """How a store answers a write under a condition: it ``refuses`` what it does not know, or ``ignores`` it."""
    if request.operation == "PutObject" and CONDITION.search(request.head):
        if store == "refuses":
            return 501, {}, b"<Error><Code>NotImplemented</Code></Error>"
        request.head = CONDITION.sub(b"", request.head)
    return None


@pytest.fixture(params=["file", "s3", "swift", "refuses", "ignores"])
def folder(
    request: pytest.FixtureRequest, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """On a disk, on S3 servers, one of which (Swift) knows only half of the conditions, and on some that know none."""
    if request.param == "file":
        yield f"{tmp_path}/runs/cells"
    elif request.param in ("s3", "swift"):
        yield f"{request.getfixturevalue(request.param)}/runs/cells"
    else:
        bucket = request.getfixturevalue("s3")
        monkeypatch.setattr(claims, "SETTLE", 0.5)
        with FaultProxy(s3_proxy.upstream) as proxy, proxy.answering(partial(without_conditions, request.param)):
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
            yield f"{bucket}/runs/cells"


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
    time.sleep(2 * claims.STALE)
    with pytest.raises(InputError, match="process 8 of bob on elsewhere"), claims.held(folder, "--name"):
        pass
    living.__exit__(None, None, None)


def test_a_living_process_of_this_machine_keeps_its_claim_however_long_it_is_silent(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon(folder, lambda owner: owner)
    monkeypatch.setattr(claims, "STALE", -10.0)
    with pytest.raises(InputError, match=f"process {Owner.this().pid} of"), claims.held(folder, "--name"):
        pass


def test_where_no_kernel_tells_of_processes_the_age_decides(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_started", lambda pid: "")
    folder = str(tmp_path / "out")
    with claims.held(folder, "--name"), pytest.raises(InputError), claims.held(folder, "--name"):
        pass
    abandon(folder, lambda owner: owner)
    with claims.held(folder, "--name"):
        pass


def test_an_outage_that_a_command_outlives_does_not_cost_it_the_claim() -> None:
    assert claims.STALE > s3.PATIENCE + s3.LONGEST_PAUSE + claims.BEAT


def test_who_stood_still_and_lost_the_claim_is_told(folder: str, quick: None) -> None:
    with claims.held(folder, "--name") as claim:
        claim.check()
        other = abandon(folder, lambda owner: owner)
        claim._thread.join(30)
        with pytest.raises(InputError, match="taken over by another command"):
            claim.check()
    assert storage.read_bytes(f"{folder}.claim").startswith(other)  # not ours to remove


def take_at_once(folder: str, count: int) -> list[tuple[AbstractContextManager[Claim], Claim]]:
    """The claims of those of ``count`` who got one, with what ends them."""

    def take(_: int) -> tuple[AbstractContextManager[Claim], Claim] | None:
        holder = claims.held(folder, "--name")
        try:
            return holder, holder.__enter__()
        except InputError:
            return None

    with ThreadPoolExecutor(count) as pool:
        return list(filter(None, pool.map(take, range(count))))


def test_of_many_who_find_a_dead_claim_one_gets_it(tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    for _ in range(20):
        abandon(folder, lambda owner: replace(owner, started="long ago"))
        ((holder, _),) = take_at_once(folder, 8)
        holder.__exit__(None, None, None)


def test_of_two_who_begin_in_the_same_moment_one_gets_it(folder: str, quick: None) -> None:
    taken = take_at_once(folder, 2)
    time.sleep(10 * claims.BEAT)  # where a store passes over the condition, the other learns so at its next beat
    (kept,) = [claim for _, claim in taken if not claim._lost]
    kept.check()
    for holder, _ in taken:
        holder.__exit__(None, None, None)
    assert not storage.exists(f"{folder}.claim")


def test_a_bucket_itself_cannot_be_claimed() -> None:
    with pytest.raises(InputError, match="prefix within the bucket"), claims.held("s3://bucket", "--out"):
        pass
