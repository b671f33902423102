"""Commands that run on a cluster, by Ray's Jobs API: submitted, followed through broken connections, asked, stopped."""

from __future__ import annotations

import asyncio
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

import aiohttp
from ray._private.authentication import authentication_token_setup
from ray._private.runtime_env import packaging
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from boxinst.errors import InputError
from pipelines import launch, secrets
from pipelines.launch import SubmitConfig

PATIENCE = 600
"""Seconds without an answer from the cluster after which following a job is given up."""

SILENCE = 300
"""Seconds without a line after which the connection is made anew: it may have died without a word."""

_BROKEN = (aiohttp.ClientError, ConnectionError, RuntimeError, TimeoutError, OSError)
"""What a client of Ray raises when the way to the cluster is interrupted."""


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster at ``address``.

    Raises:
        InputError: no cluster answers there, or it refuses us.
    """
    for name in (
        sdk.__name__,
        dashboard_sdk.__name__,
        packaging.__name__,
    ):  # a line for every package
        logging.getLogger(name).setLevel(logging.WARNING)
    # A client sends its token, RAY_AUTH_TOKEN or the one in ~/.ray, only when told to; then it says so at length.
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, AuthenticationError) as error:
        remedy = (
            "Check that the cluster runs, its address, and its token (RAY_AUTH_TOKEN; its head's ~/.ray/auth_token)."
        )
        raise InputError("--address", f"{address}: {str(error).splitlines()[0].rstrip('.')}", remedy) from error


def submit(client: JobSubmissionClient, config: SubmitConfig, words: Sequence[str]) -> str:
    """Ship the code and start ``boxinst WORDS`` on the cluster; returns the job's id.

    Raises:
        InputError: the working folder is absent, or larger than the cluster takes; the cluster does not take the job.
    """
    with tempfile.TemporaryDirectory() as private:
        package = secrets.pack(launch.secret_values(config), Path(private)) if config.secret else None
        try:
            return client.submit_job(
                entrypoint=shlex.join(["python", "-m", "jobs.cli", *words]),
                runtime_env=launch.runtime_env(config, package),
            )
        except ValueError as error:
            remedy = "Give a folder of code and settings alone."
            raise InputError("--working-dir", f"{config.working_dir} ({error})", remedy) from error
        except RuntimeError as error:  # Ray's word for an answer that is no success, with the server's traceback
            reason = str(error).rstrip(" .\n").splitlines()[-1]
            value = f"{client.get_address()} did not take the job ({reason})"
            raise InputError("--address", value, "See the cluster's dashboard, or try again.") from error


def follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Print the job's log until it ends, each line once even when the connection breaks in between.

    Raises:
        InputError: the cluster does not answer any more, or does not know the job.
    """
    log, answered = _Log(), time.monotonic()
    info(client, job)
    while True:
        try:
            asyncio.run(log.follow(client, job))
            found = client.get_job_info(job)
            if found.status.is_terminal():
                return found
            answered = time.monotonic()
        except _BROKEN as error:
            if log.came > answered:
                answered = log.came
            if time.monotonic() - answered > PATIENCE:
                value = f"no answer for {PATIENCE} seconds ({str(error).splitlines()[0]})"
                remedy = f"The job may go on: boxinst submit logs {job} --address {client.get_address()}"
                raise InputError("--address", value, remedy) from error
            print("The connection to the cluster broke; trying again.", file=sys.stderr)
        time.sleep(2)


class _Log:
    """What has been printed of a job's log. A new connection tells it from the beginning."""

    def __init__(self) -> None:
        self._printed = 0
        self.came = 0.0
        """When the last of it came."""

    async def follow(self, client: JobSubmissionClient, job: str) -> None:
        """Print what is new until the job or the connection ends."""
        position = 0
        async with aclosing(client.tail_job_logs(job)) as lines:
            while True:
                try:
                    async with asyncio.timeout(SILENCE):  # wait_for loses a Ctrl-C that comes together with a line
                        text = await anext(lines)
                except (StopAsyncIteration, TimeoutError):
                    return
                self.came = time.monotonic()
                new = text[max(self._printed - position, 0) :]
                position += len(text)
                self._printed = max(self._printed, position)
                print(new, end="", flush=True)


def info(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of a job.

    Raises:
        InputError: nothing.
    """
    remedy = f"`boxinst submit status --address {client.get_address()}` lists its jobs."
    if not job:
        raise InputError("job", "not given", remedy)
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        raise InputError("job", f"{job}: the cluster knows no such job", remedy) from error


def stop(client: JobSubmissionClient, job: str) -> JobDetails:
    """Ask a job to stop, as Ctrl-C would, and wait until it has ended."""
    found = info(client, job)
    if not found.status.is_terminal():
        client.stop_job(job)
        while not (found := client.get_job_info(job)).status.is_terminal():
            time.sleep(1)
    return found


def exit_status(job: JobDetails) -> int:
    """That of the command; 130 where it was stopped."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return 130 if job.status == JobStatus.STOPPED else job.driver_exit_code or 1


def describe(job: JobDetails) -> str:
    """One line: id, status, start, minutes, command."""
    began = datetime.fromtimestamp(job.start_time / 1000) if job.start_time else None
    ended = datetime.fromtimestamp(job.end_time / 1000) if job.end_time else datetime.now()
    minutes = f"{(ended - began).total_seconds() / 60:.1f} min" if began else "-"
    command = job.entrypoint.replace("python -m jobs.cli", "boxinst")
    began_at = f"{began:%Y-%m-%d %H:%M}" if began else "-"
    return f"{job.submission_id}  {job.status.value.lower():9}  {began_at}  {minutes:>10}  {command}"


def jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """All jobs that were submitted to the cluster, the latest last."""
    submitted = [job for job in client.list_jobs() if job.submission_id]
    return sorted(submitted, key=lambda job: job.start_time or 0)
