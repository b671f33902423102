"""Run any other command on a Ray cluster, follow its log, and end with its status. Ctrl-C only stops following.

boxinst submit --address http://HOST:8265 -- train --recipe coco_r50_1x --shards s3://bucket/shards/train
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boxinst.errors import InputError
from jobs import cli, options

JUNK = [".git", ".venv", "boxinst-home", "__pycache__", "*.egg-info", ".*_cache"]  # beside .gitignore and .rayignore
REGION = ("AWS_REGION", "AWS_DEFAULT_REGION")


@dataclass
class SubmitConfig:
    """Where to run the command, and with what."""

    address: str
    """The dashboard of the cluster's head node, http://HOST:8265."""
    working_dir: str = "."
    """Folder that is shipped and that the command runs in. Data is not: give paths that every node can read."""
    env: tuple[str, ...] = ("AWS_ENDPOINT_URL", *REGION, "MLFLOW_TRACKING_URI", "BOXINST_HOME", "BOXINST_STORE")
    """Variables for the job: NAME passes on this shell's value where it has one, NAME=VALUE sets it. The cluster's
    dashboard shows them, so name keys only where the nodes have no credentials of their own."""

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise InputError("--address", self.address, "Give the dashboard's address, such as http://HOST:8265.")


def main(argv: Sequence[str]) -> int:
    """Submit the command after ``--``; returns its exit status."""
    split = argv.index("--") if "--" in argv else len(argv)
    config, words = options.parse(SubmitConfig, argv[:split], command="submit", about=__doc__), argv[split + 1 :]
    if not words or words[0] not in cli.COMMANDS or words[0] in ("submit", "demo"):
        raise InputError("the command after --", shlex.join(words) or "missing", "Give one, such as -- train --help.")
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # a client sends its token only when told to
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    named = (e if "=" in e else f"{e}={os.environ.get(e, '')}" for e in config.env)
    env = {name: value for name, _, value in (e.partition("=") for e in named) if value}
    runtime_env = {"working_dir": config.working_dir, "excludes": JUNK, "env_vars": env}
    try:
        client = JobSubmissionClient(config.address)
        job = client.submit_job(entrypoint=shlex.join(["python", "-m", "jobs.cli", *words]), runtime_env=runtime_env)
    except (ConnectionError, AuthenticationError) as error:
        remedy = "Check that it runs, its address, and its token (RAY_AUTH_TOKEN; its head's ~/.ray/auth_token)."
        raise InputError("--address", f"{config.address}: {str(error).splitlines()[0]}", remedy) from error
    except ValueError as error:  # the folder is absent or larger than the cluster takes
        raise InputError("--working-dir", f"{config.working_dir} ({error})", "Give a folder of code alone.") from error
    print(f"Job {job} on {config.address}. Stop it: ray job stop {job} --address {config.address}", flush=True)

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        print("No longer following; the job goes on.", file=sys.stderr)
        return 130
    info = client.get_job_info(job)
    print(f"Job {job}: {info.status.value.lower()}")
    return 0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code or 1


if __name__ == "__main__":
    sys.exit(cli.main(["submit", *sys.argv[1:]]))
