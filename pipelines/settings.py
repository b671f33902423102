"""Where things live when nobody says otherwise: the home folder, the store and the MLflow addresses."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Absolute path of the home folder: ``BOXINST_HOME``, or ``boxinst-home`` in the working directory."""
    return Path(os.environ.get("BOXINST_HOME") or "boxinst-home").expanduser().absolute()


def store() -> str:
    """Where runs, models, shards, masks and reports go: ``BOXINST_STORE``, a folder or s3://bucket/prefix, or the home.

    The home itself stays on this machine: it holds databases and a cache.
    """
    given = os.environ.get("BOXINST_STORE", "").rstrip("/")
    if given.startswith("s3://"):
        return given
    return str(Path(given).expanduser().absolute()) if given else str(home())


def mlflow_uri() -> str:
    """MLflow's tracking address: ``MLFLOW_TRACKING_URI``, or an SQLite file in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def artifacts_uri() -> str:
    """Where MLflow's artifacts go when the SQLite file in the home folder is used."""
    root = store()
    return f"{root}/mlartifacts" if root.startswith("s3://") else Path(root, "mlartifacts").as_uri()
