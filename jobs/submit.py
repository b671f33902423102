"""Run any other command on a Ray cluster, follow its log, and end with its status. Ctrl-C only stops following.

  boxinst submit --address http://HOST:8265 -- train --recipe coco_r50_1x --shards s3://bucket/shards/train
  boxinst submit --address http://HOST:8265 --detach --secret AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY -- segment ...
  boxinst submit status [JOB]     this job, or all, one a line
  boxinst submit logs JOB         its log from the beginning, followed to its end
  boxinst submit stop JOB         as Ctrl-C: training ends with a checkpoint

RAY_API_SERVER_ADDRESS stands in for --address. The code that is shipped is that of this very program.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from boxinst.errors import InputError
from jobs import cli, options
from pipelines.launch import JobConfig, SubmitConfig


def main(argv: Sequence[str]) -> int:
    """Submit the command after ``--``, or ask about a job; returns the job's exit status."""
    if argv and argv[0] in ("status", "logs", "stop"):
        return ask(argv[0], list(argv[1:]))
    split = argv.index("--") if "--" in argv else len(argv)
    config, words = options.parse(SubmitConfig, argv[:split], command="submit", about=__doc__), argv[split + 1 :]
    if not words or words[0] not in cli.COMMANDS or words[0] in ("submit", "demo"):
        raise InputError("the command after --", shlex.join(words) or "missing", "Give one, such as -- train --help.")
    from pipelines import remote_jobs

    client = remote_jobs.connect(config.address)
    job = remote_jobs.submit(client, config, words)
    print(f"Job {job} on {config.address}. {how_to_go_on(job, config.address)}", flush=True)
    return 0 if config.detach else follow(client, job)


def ask(verb: str, argv: list[str]) -> int:
    """``status``, ``logs`` or ``stop``."""
    if argv and not argv[0].startswith("-"):
        argv = ["--job", *argv]
    config = options.parse(JobConfig, argv, command=f"submit {verb}", about=__doc__)
    from pipelines import remote_jobs

    client = remote_jobs.connect(config.address)
    if verb == "logs":
        return follow(client, config.job)
    if verb == "stop":
        print(remote_jobs.describe(remote_jobs.stop(client, config.job)))
        return 0
    for found in [remote_jobs.info(client, config.job)] if config.job else remote_jobs.jobs(client):
        print(remote_jobs.describe(found))
    return 0


def follow(client: Any, job: str) -> int:
    """Print the job's log to its end; returns its exit status."""
    from pipelines import remote_jobs

    try:
        ended = remote_jobs.follow(client, job)
    except KeyboardInterrupt:
        print(f"No longer following; the job goes on. {how_to_go_on(job, client.get_address())}", file=sys.stderr)
        return 130
    print(f"Job {job}: {ended.status.value.lower()}")
    return remote_jobs.exit_status(ended)


def how_to_go_on(job: str, address: str) -> str:
    """The commands for a job that runs."""
    return f"Next: boxinst submit status|logs|stop {job} --address {address}"


if __name__ == "__main__":
    sys.exit(cli.main(["submit", *sys.argv[1:]]))
