"""One MLflow run as the stages see it: parameters, metrics, pictures and files, from any process of a job."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import: what is done here is nobody's business

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis
from torch import Tensor

from boxinst.errors import InputError
from pipelines import settings, storage

_PARAMS_PER_BATCH = 100  # MLflow's own limit
_PARAM_LENGTH = 6000  # likewise
_TAG_LENGTH = 8000  # likewise

# Creating the SQLite database prints a page of migrations, which tells a user nothing; a gate's table tells more.
for _name in ("alembic", "mlflow.store.db.utils", "mlflow.models.evaluation.validation"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Run:
    """One MLflow run, written through a client of its own: no global state, so any process may hold one.

    A Ray worker joins the run of its driver with ``Run.start(..., run_id=..., tracking_uri=...)``, or through
    the same BOXINST_HOME or MLFLOW_TRACKING_URI. The run stays RUNNING until ``close``.
    """

    def __init__(self, client: MlflowClient, run_id: str, tracking_uri: str) -> None:
        self._client, self.run_id, self.tracking_uri = client, run_id, tracking_uri

    @classmethod
    def start(
        cls,
        name: str,
        *,
        experiment: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
        tracking_uri: str | None = None,
    ) -> Run:
        """Create a run, or join the one named by ``run_id``.

        Args:
            name: of the run, in MLflow's list.
            experiment: created when it does not exist.
            params: nested mappings are flattened with dots. A parameter the run has already is left as it is.
            tags: written over those the run has.
            run_id: an existing run, which is set to RUNNING again.
            tracking_uri: of the MLflow server or database; from the settings by default.

        Raises:
            InputError: ``run_id`` is no run of this tracking server.
        """
        uri = tracking_uri or settings.mlflow_uri()
        client = MlflowClient(tracking_uri=uri)
        known: Mapping[str, str] = {}
        if run_id is None:
            run_id = client.create_run(_experiment(client, experiment), run_name=name).info.run_id
            if git := revision():
                tags = {"mlflow.source.git.commit": git, **(tags or {})}
        else:
            try:
                known = client.get_run(run_id).data.params
            except MlflowException as error:
                raise InputError("run", run_id, f"It is not in {storage.redact(uri)}: give one that is.") from error
            client.update_run(run_id, status="RUNNING")
        new = [Param(k, str(v)[:_PARAM_LENGTH]) for k, v in flatten(params or {}).items() if k not in known]
        for start in range(0, len(new), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=new[start : start + _PARAMS_PER_BATCH])
        client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in (tags or {}).items()])
        return cls(client, run_id, uri)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record ``values`` at ``step``; a value may be a Python number or a scalar tensor."""
        now = get_current_time_millis()
        self._client.log_batch(self.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, over those the run has."""
        self._client.log_batch(self.run_id, tags=[RunTag(k, v[:_TAG_LENGTH]) for k, v in tags.items()])

    def image(self, image: Tensor, path: str) -> None:
        """Record a picture (u8 [3, H, W], RGB) as the artifact ``path``, for example "validation/00100.png"."""
        self._client.log_image(self.run_id, image.permute(1, 2, 0).contiguous().cpu().numpy(), artifact_file=path)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record a local file, or a folder with what it holds, under ``folder`` of the run's artifacts."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run with ``status``."""
        self._client.set_terminated(self.run_id, status)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, keys joined with dots: {"loss": {"theta": 2}} becomes {"loss.theta": 2}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def revision() -> str | None:
    """The git commit of this code, with "+changes" where files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment ``name``, created when it does not exist."""
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    # A server decides itself where artifacts go; a database file leaves it to us.
    location = None if client.tracking_uri.startswith("http") else settings.artifacts_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # created by another process in between
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise
