"""Ray's start: on the loopback address alone, and errors where the cluster is too small or absent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import ray  # before pipelines.cluster: the order of imports must not open a port

from boxinst.errors import InputError


def test_only_loopback_listens(ray_session: None) -> None:
    processes = psutil.Process().children(recursive=True)
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")  # an IPv4 address on an IPv6 socket
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert any("raylet" in process.name() for process in processes)
    assert listening <= {"127.0.0.1", "::1"}
    assert listening


def test_start_twice_is_one_cluster(ray_session: None) -> None:
    from pipelines import cluster

    before = ray.get_runtime_context().get_node_id()
    cluster.start()
    assert ray.get_runtime_context().get_node_id() == before


def test_check_keeps_a_cpu_for_the_data(ray_session: None) -> None:
    from pipelines import cluster

    cluster.check(3)
    with pytest.raises(InputError, match=r"--workers: 4 .* the cluster has 4 CPU, 0 GPU\. Give at most 3"):
        cluster.check(4)
    with pytest.raises(InputError, match=r"2 CPU, 0 GPU.*Give at most 1"):
        cluster.check(2, cpus=2)
    with pytest.raises(InputError, match=r"1 GPU.*Add nodes"):
        cluster.check(1, gpus=1)
    with pytest.raises(InputError, match=r"--workers: 0\. Give 1 or more"):
        cluster.check(0)


@pytest.mark.parametrize("alone", [{}, {"GPU": 1.0}, {"CPU": 0.0}])
def test_a_head_alone_has_room_for_nobody(alone: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import cluster

    monkeypatch.setattr(ray, "cluster_resources", lambda: alone)  # of a head that coordinates and runs nothing else
    with pytest.raises(
        InputError, match=r"has 0 CPU, \d GPU\. No worker has joined: wait until `ray status` shows them"
    ) as error:
        cluster.check(2)
    assert "-1" not in str(error.value)


@pytest.mark.parametrize("cpus", [1.0, 2.0])
def test_one_cpu_for_the_data_leaves_none(cpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import cluster

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(InputError, match=r"has 1 CPU, 0 GPU\. Add nodes to the cluster, or ask for less"):
        cluster.check(1, cpus=cpus)


def test_no_cluster_at_the_address() -> None:
    with socket.socket() as probe:  # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = "from pipelines import cluster\ntry: cluster.start()\nexcept ValueError as error: print(repr(error))"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert f"InputError('RAY_ADDRESS: {address}. No Ray cluster answers there: start it" in done.stdout
    assert time.monotonic() - began < 60  # Ray alone takes minutes
