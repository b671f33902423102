"""Where things live when nobody says otherwise: the home folder and the MLflow addresses."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Absolute path of the home folder: ``BOXINST_HOME``, or ``boxinst-home`` in the working directory."""
    return Path(os.environ.get("BOXINST_HOME") or "boxinst-home").expanduser().absolute()


def mlflow_uri() -> str:
    """MLflow's tracking address: ``MLFLOW_TRACKING_URI``, or an SQLite file in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def artifacts_uri() -> str:
    """Where MLflow's artifacts go when the SQLite file in the home folder is used."""
    return (home() / "mlartifacts").as_uri()
