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
