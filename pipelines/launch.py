"""What is sent to a cluster with a job: the command, the code, variables for all to see and secrets for nobody.

Imports nothing heavy: a command line is read at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from boxinst.errors import InputError
from pipelines import redaction, secrets

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's variable for the address of the dashboard."""

PACKAGES = ("boxinst", "pipelines", "jobs")

JUNK = [".git", ".venv", "boxinst-home", "__pycache__", "*.egg-info", ".*_cache"]
"""Never shipped, beside what .gitignore and .rayignore name."""

STOP_SECONDS = 600
"""What a job that is asked to stop has to finish its step and write a checkpoint; then it is killed."""


@dataclass(frozen=True)
class SubmitConfig:
    """Where to run the command, and with what."""

    address: str = field(default_factory=lambda: os.environ.get(ADDRESS, ""))
    """The dashboard of the cluster's head node, http://HOST:8265; else RAY_API_SERVER_ADDRESS says it."""
    working_dir: str = ""
    """Folder to ship beside the code of this program, for the command to run in: for a recipe of yours, or a source
    tree of this program, which is then used. Not for data: give paths that every node can read."""
    env: tuple[str, ...] = (
        *("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"),
        *("MLFLOW_TRACKING_URI", "BOXINST_STORE"),
    )
    """Variables for the job: NAME passes on this shell's value where it has one, NAME=VALUE sets it. The cluster shows
    and logs them."""
    secret: tuple[str, ...] = ()
    """Variables for the job that the cluster neither shows nor logs, such as AWS_SECRET_ACCESS_KEY: names alone, the
    values are this shell's. Only where the nodes have no credentials of their own."""
    detach: bool = False
    """Do not follow the job: end as soon as it is submitted."""

    def __post_init__(self) -> None:
        check_address(self.address)
        for name in self.secret:
            if "=" in name:
                remedy = "Set it in this shell and give its name alone: command lines are seen and remembered."
                raise InputError("--secret", f"{name.partition('=')[0]}=...", remedy)
            if not os.environ.get(name):
                raise InputError("--secret", f"{name} is not set", "Set it in this shell, or leave it out.")
        for name, value in variables(self).items():
            if _SECRET_NAME.search(name) or redaction.holds_secret(value):
                remedy = f"The cluster would show and log it. Give it by `--secret {name}`."
                raise InputError("--env", f"{name} holds a secret", remedy)


@dataclass(frozen=True)
class JobConfig:
    """Which job to ask about."""

    job: str = ""
    """Its id, as `boxinst submit` has printed it."""
    address: str = field(default_factory=lambda: os.environ.get(ADDRESS, ""))
    """The dashboard of the cluster's head node, http://HOST:8265; else RAY_API_SERVER_ADDRESS says it."""

    def __post_init__(self) -> None:
        check_address(self.address)


_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!IZ)|PASSW|PASSPHRASE|PASSCODE|CREDENTIAL|AUTHORIZATION"
    r"|CREDS?(_|$)|(?<!COM)(?<!BY)PASS(_|$)|(?<=\w)(?<!OLD)PWD(_|$)|(?<!MON)KEYS?(_|$)|(^|_)(PAT|PRIVATE)$"
    r"|AUTH(?!_(ENABLED|HOST|METHOD|MODE|PORT|PROVIDER|SOCK|TYPE|UR[IL])$)(_|$)",
    re.IGNORECASE,
)
"""Rather one name too many than a secret for all to see: what is refused can be given by `--secret`."""


def check_address(address: str) -> None:
    """Make sure that an address can be that of a dashboard.

    Raises:
        InputError: it cannot.
    """
    if not address.startswith(("http://", "https://")):
        remedy = f"Give the dashboard's address, such as http://HOST:8265, or set {ADDRESS}."
        raise InputError("--address", address or "not given", remedy)


def variables(config: SubmitConfig) -> dict[str, str]:
    """The variables that all may see."""
    named = (e if "=" in e else f"{e}={os.environ.get(e, '')}" for e in config.env)
    pairs = (e.partition("=") for e in named)
    return {name: value for name, _, value in pairs if value and name not in config.secret}


def runtime_env(config: SubmitConfig, package: Path | None) -> dict[str, Any]:
    """Ray's description of what the job needs.

    The code is that of this very program, from wherever it is installed, unless the working folder has its own.

    Args:
        config: what was asked for.
        package: what ``secrets.pack`` made, where there are secrets.
    """
    root = Path(__file__).parent.parent
    own = config.working_dir and all((Path(config.working_dir) / name).is_dir() for name in PACKAGES)
    modules = [] if own else [str(root / name) for name in PACKAGES]
    # So that `stop` is what Ctrl-C is: training ends after its step, with a checkpoint.
    env = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **variables(config)}
    wanted: dict[str, Any] = {"py_modules": modules, "excludes": JUNK, "env_vars": env}
    if config.working_dir:
        wanted["working_dir"] = config.working_dir
    if package is not None:
        modules.append(str(package))
        env[secrets.NAMES] = ",".join(config.secret)
        wanted["worker_process_setup_hook"] = secrets.HOOK
    return wanted


def secret_values(config: SubmitConfig) -> Mapping[str, str]:
    """The secrets, from the environment of this process."""
    return {name: os.environ[name] for name in config.secret}
