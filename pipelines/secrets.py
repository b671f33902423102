"""Secrets of a submitted job: shipped as a file, put into the environment of each of its processes, removed at its end.

Ray shows and logs the variables of a job, but not what is in the code that is shipped with it. Light, as every process
of the job calls ``load`` before anything else: Ray does so in its workers, the console script where the command starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

NAMES = "BOXINST_SECRETS"
"""Variable of a job with secrets: their names."""

HOOK = f"{__name__}.load"
"""What Ray is to call in each worker process."""

_MODULE, _FILE = "boxinst_secrets", "values.json"


def pack(values: Mapping[str, str], folder: Path) -> Path:
    """Write the secrets where no other user can read them.

    Args:
        values: by the name of the variable.
        folder: a private, empty folder.

    Returns:
        The folder within it to ship as a Python module.
    """
    module = folder / _MODULE
    module.mkdir(mode=0o700)
    # Ray names what it ships by its content: with a number of its own, nobody finds the file by guessing the secret,
    # and no job loses it when another one removes its own.
    content = json.dumps({"values": dict(values), "number": uuid.uuid4().hex})
    with open(os.open(module / _FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    return module


def load() -> None:
    """Put the secrets shipped with this job into the environment of this process and its children."""
    path = _shipped()
    if path is None:
        raise FileNotFoundError(f"The job was submitted with secrets, but {_MODULE}/{_FILE} is not in its path.")
    os.environ.update(json.loads(path.read_text())["values"])


def remove() -> None:
    """Remove the file from this machine. Processes that started before keep their environment."""
    if path := _shipped():
        path.unlink(missing_ok=True)


def _shipped() -> Path | None:
    spec = importlib.util.find_spec(_MODULE)
    places = [Path(place) / _FILE for place in (spec.submodule_search_locations or ())] if spec else []
    return next((path for path in places if path.is_file()), None)
