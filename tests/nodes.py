"""A Ray cluster of several nodes in processes of their own, and commands on it that are killed: for tests of faults.

As a program, ``python nodes.py CPUS...`` starts a head and further nodes of so many CPUs, prints the address, and
then obeys lines of its input: ``kill N`` kills node N with all its processes, ``add CPUS`` adds a node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""The variable that is "0" where all of Ray listens on 127.0.0.1, as a cluster of this module and its commands do."""
LIMIT = 900.0
"""Seconds to wait for anything."""
START_ATTEMPTS = 5
"""Ray gives a node's servers 15 to 30 seconds to start, which is not enough on a machine that is busy otherwise."""


def wait_until(ready: Callable[[], Any], what: str) -> Any:
    """The first true value of ``ready``."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if value := ready():
            return value
        time.sleep(0.05)
    raise TimeoutError(what)


class Nodes:
    """The cluster as a test sees it."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address

    def tell(self, command: str) -> None:
        """Obeyed when this returns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        said = self.process.stdout.readline().strip()
        assert said == "done", said

    def processes(self, title: str) -> list[psutil.Process]:
        """The cluster's processes whose title holds ``title``, such as RayTrainWorker."""
        return [p for p in _below(self.process.pid) if title in _title(p)]

    def node_of(self, process: psutil.Process) -> int:
        """Number of the node that a worker belongs to, the head's being 0."""
        return int(process.environ()["TEST_NODE"])


@contextmanager
def running(*cpus: int) -> Iterator[Nodes]:
    """A cluster with a head and further nodes, gone at the end with all that belongs to it."""
    scratch = tempfile.mkdtemp(prefix="ray")  # short: names of sockets are limited
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, cpus)],
        env={**os.environ, "RAY_TMPDIR": scratch},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the cluster has not started"
        yield Nodes(process, address)
    finally:
        _kill([psutil.Process(process.pid), *_below(process.pid)])
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def command(
    *argv: str,
    home: Path,
    address: str = "",
    log: Path,
    env: dict[str, str] | None = None,
    before: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A ``boxinst`` command, on the cluster at ``address`` or on one within it; ``before`` are words before it."""
    variables = {**os.environ, "BOXINST_HOME": str(home), "RAY_ADDRESS": address, LOOPBACK_ONLY: "0", **(env or {})}
    with log.open("ab") as out:
        words = [*before, sys.executable, "-m", "jobs.cli", *argv]
        process = subprocess.Popen(words, stdout=out, stderr=out, env=variables, start_new_session=True)
    try:
        yield process
    finally:
        kill_all(process)


def run(*argv: str, home: Path, address: str = "", log: Path, env: dict[str, str] | None = None) -> str:
    """Run a command to its good end and return what it has said."""
    with command(*argv, home=home, address=address, log=log, env=env) as process:
        assert process.wait(LIMIT) == 0, log.read_text()[-4000:]
    return log.read_text()


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a command and whatever it has started."""
    below = _below(process.pid) if process.poll() is None else []
    with suppress(ProcessLookupError):
        process.kill()
    _kill(below)
    process.wait()


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def _serve(cpus: list[int]) -> None:
    """The program; see the module."""
    from pipelines import cluster

    cluster.prepare_local()
    from ray.cluster_utils import Cluster

    made = Cluster()
    nodes = []

    def add(slots: int) -> None:
        os.environ["TEST_NODE"] = str(len(nodes))  # which its processes inherit
        before = {process.pid for process in _below(os.getpid())}
        for attempt in range(START_ATTEMPTS):
            try:
                node = made.add_node(num_cpus=slots, node_ip_address="127.0.0.1", include_dashboard=False, wait=False)
            except Exception:  # Ray raises no other type where one of its servers was not up in time
                if attempt + 1 == START_ATTEMPTS:
                    raise
                _kill([process for process in _below(os.getpid()) if process.pid not in before])
            else:
                nodes.append(node)
                return

    for slots in cpus:
        add(slots)
    print(made.address, flush=True)
    for line in sys.stdin:
        verb, number = line.split()
        if verb == "add":
            add(int(number))
        else:
            raylet = nodes[int(number)].all_processes["raylet"][0].process.pid
            _kill([psutil.Process(raylet), *_below(raylet)])
        print("done", flush=True)


if __name__ == "__main__":
    _serve([int(argument) for argument in sys.argv[1:]])
