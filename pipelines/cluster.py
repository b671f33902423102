"""Ray's start: a cluster inside this process that only listens on the loopback address, or the cluster asked for."""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import Any

import ray
import ray.data
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from boxinst.errors import InputError
from pipelines import secrets

LOCAL_SLOTS = 4
"""Least number of CPU slots of a local cluster. Slots only limit how many tasks run at once; with fewer, a training
worker, its data tasks and the coordinator would wait for each other for ever on a small machine."""

START_ATTEMPTS = 3
"""Ray gives its servers 30 seconds to start, which is not enough on a machine that is busy with something else."""


def start(*, cpus: int | None = None) -> None:
    """Connect to the cluster at ``RAY_ADDRESS`` or, where that is not set, start one in this process.

    Does nothing when Ray is already running here. What the workers print stays in Ray's logs; what they have to say
    to the user reaches the driver as results.

    Args:
        cpus: CPU slots of a local cluster; the number of cores, and at least ``LOCAL_SLOTS``, when not given.

    Raises:
        InputError: no cluster answers at ``RAY_ADDRESS``.
    """
    if not ray.is_initialized():
        # It warns that token authentication is on, which is how we want it.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        # To read a Parquet file's footer Ray Data starts 32 processes unless told otherwise; one reads 128 at a time.
        os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
        if elsewhere():
            _connect(os.environ["RAY_ADDRESS"])
        else:
            _start_local(cpus or max(LOCAL_SLOTS, os.cpu_count() or 1))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that there are no progress bars, which are of no use in a log file.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    # Storage is patient itself; ten times over would take half an hour to say that a server is gone.
    context.retried_io_errors = ["SLOW_DOWN", "NO_SUCH_UPLOAD"]


def elsewhere() -> bool:
    """Whether the cluster is one that was started by others, as RAY_ADDRESS says."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def _connect(address: str) -> None:
    remedy = "No Ray cluster answers there: start it, or unset the variable."
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        # Ray itself tries for minutes and then ends the whole process.
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        joined = ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError("RAY_ADDRESS", address, remedy) from error
    if joined.dashboard_url:
        print(f"Ray dashboard: http://{joined.dashboard_url}", file=sys.stderr)


def prepare_local() -> None:
    """Set what Ray reads from the environment, before it starts any process on this machine for this one's use."""
    # Without this, Ray's servers listen on every interface of the machine, whatever the node's address is. The variable
    # is for the processes that it starts; here it has been read already, when Ray was imported.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray starts another worker for each that is not up within a minute, which makes a busy machine busier.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    # Ray starts its workers at niceness 15. From 0, the data tasks of a training can step back behind it.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Nobody takes this machine away with a warning, so no process needs to listen for one.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray hides the GPUs of tasks that ask for none, and warns that it will not do so for ever.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _start_local(cpus: int) -> None:
    prepare_local()
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
            return
        except Exception as error:  # Ray raises no other type here
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise
            ray.shutdown()


def check(workers: int, cpus: float = 1, gpus: float = 0) -> None:
    """Make sure that the cluster can run ``workers`` workers beside the tasks that feed them.

    An actor pool that reserves every CPU waits for ever without an error, so one CPU must stay free. The same holds
    where nodes come on demand: what has begun takes those that are there, and waits for the others without an end.

    Args:
        workers: number of workers that run at the same time.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.

    Raises:
        InputError: there are too few CPUs or GPUs.
    """
    if workers < 1:
        raise InputError("--workers", workers, "Give 1 or more.")
    have = ray.cluster_resources()
    have_cpus, have_gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    most = max(0, int((have_cpus - 1) // cpus)) if cpus else workers
    if gpus:
        most = min(most, int(have_gpus // gpus))
    if workers > most:
        remedy = f"Give at most {most}, or add nodes." if most else "Add nodes to the cluster, or ask for less."
        if not have_cpus:
            remedy = "No worker has joined: wait until `ray status` shows them; ask for those that come on demand."
        need = f"{workers} (each {cpus:g} CPU, {gpus:g} GPU, and 1 CPU for the data)"
        raise InputError("--workers", f"{need}; the cluster has {have_cpus:g} CPU, {have_gpus:g} GPU", remedy)


def data_workers(asked: int, *, gpu: bool) -> int | None:
    """How many processes may decode for a training at once, see ``TrainConfig.data_workers``; None for no limit.

    Each costs seconds to start, and memory.
    """
    if asked:
        return asked
    return None if gpu or elsewhere() else max(1, (os.cpu_count() or 1) // 4)


def actor_here(kind: type) -> Any:
    """Handle of an actor on the driver's node: its run then survives the loss of any other node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote()


def remove_secrets() -> None:
    """At the end of a job that was submitted with secrets: remove their file from every node."""
    if ray.is_initialized():
        remove = ray.remote(num_cpus=0, max_retries=0)(secrets.remove)
        nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
        removing = [remove.options(scheduling_strategy=node).remote() for node in nodes]
        ray.wait(removing, num_returns=len(nodes), timeout=30)
    secrets.remove()  # last, as a process that starts on this node to do the same takes the file up first


def stop() -> None:
    """End the local cluster, or leave the one connected to."""
    ray.shutdown()
