"""One MLflow run as the stages see it: parameters, metrics, pictures and files, from any process of a job."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before the import: what is done here is nobody's business

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from mlflow.utils.time import get_current_time_millis
from torch import Tensor

from boxinst.errors import InputError
from pipelines import settings, storage
from pipelines.outbox import Outbox

_PARAMS_PER_BATCH = 100  # MLflow's own limit
_PARAM_LENGTH = 6000  # likewise
_TAG_LENGTH = 8000  # likewise

_outboxes: dict[str, Outbox] = {}
"""Of the servers whose runs this process has joined."""

# Creating the SQLite database prints a page of migrations, which tells a user nothing; a gate's table tells more.
for _name in ("alembic", "mlflow.store.db.utils", "mlflow.models.evaluation.validation"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Run:
    """One MLflow run, written through a client of its own: no global state, so any process may hold one.

    A Ray worker joins the run of its driver with ``Run.join(run_id, tracking_uri)``. The run stays RUNNING until
    ``close``.
    """

    def __init__(self, client: MlflowClient, run_id: str, tracking_uri: str, outbox: Outbox | None = None) -> None:
        self._client, self.run_id, self.tracking_uri, self._outbox = client, run_id, tracking_uri, outbox

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
            InputError: ``run_id`` is no run of this tracking server, or the server does not answer.
        """
        uri = tracking_uri or settings.mlflow_uri()
        check_answers(uri)
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

    @classmethod
    def join(cls, run_id: str, tracking_uri: str) -> Run:
        """The run of another process, by one that must not wait for the server: metrics and pictures are sent later.

        Call ``deliver`` before the process ends.
        """
        # The outbox tries again by itself, and does not sleep for minutes when the server is back.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        if tracking_uri not in _outboxes:
            _outboxes[tracking_uri] = Outbox(_hopeless)
        return cls(MlflowClient(tracking_uri=tracking_uri), run_id, tracking_uri, _outboxes[tracking_uri])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record ``values`` at ``step``; a value may be a Python number or a scalar tensor."""
        now = get_current_time_millis()
        metrics = [Metric(k, float(v), now, step) for k, v in values.items()]
        self._send(f"metrics of step {step}", lambda: self._client.log_batch(self.run_id, metrics=metrics))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, over those the run has."""
        cut = [RunTag(k, v[:_TAG_LENGTH]) for k, v in tags.items()]
        self._send(f"the tags {', '.join(tags)}", lambda: self._client.log_batch(self.run_id, tags=cut))

    def image(self, image: Tensor, path: str) -> None:
        """Record a picture (u8 [3, H, W], RGB) as the artifact ``path``, for example "validation/00100.png"."""
        pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        self._send(path, lambda: self._client.log_image(self.run_id, pixels, artifact_file=path))

    def _send(self, name: str, send: Callable[[], object]) -> None:
        if self._outbox is None:
            send()
        else:
            self._outbox.put(name, send)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Record a local file, or a folder with what it holds, under ``folder`` of the run's artifacts."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder)

    @property
    def address(self) -> str:
        """Where to look at the run: its page where there is a server, else its id and the database it is in."""
        if self.tracking_uri.startswith("http"):
            experiment = self._client.get_run(self.run_id).info.experiment_id
            return f"{storage.redact(self.tracking_uri)}/#/experiments/{experiment}/runs/{self.run_id}"
        return f"{self.run_id} in {storage.redact(self.tracking_uri)}"

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", *, failure: str = "") -> None:
        """End the run with ``status``, and ``failure`` as a tag. A server that is away must not hide how it ended."""
        try:
            if failure:
                self.tag({"failure": failure})
            self._client.set_terminated(self.run_id, status)
        except MlflowException as error:
            if _hopeless(error):
                raise
            where = storage.redact(self.tracking_uri)
            print(f"MLflow at {where} does not answer: it still shows {self.run_id} as RUNNING.", file=sys.stderr)


def artifacts(experiment: str) -> str:
    """Where MLflow keeps the files of an experiment; of one that is new, as far as it is known here.

    Raises:
        InputError: the server does not answer.
    """
    uri = settings.mlflow_uri()
    check_answers(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return settings.artifacts_uri()  # to ask would make the database
    found = MlflowClient(tracking_uri=uri).get_experiment_by_name(experiment)
    return found.artifact_location if found else settings.artifacts_uri()


def deliver(patience: float) -> str:
    """Send what the joined runs of this process have recorded, for at most ``patience`` seconds.

    Returns:
        What could not be sent, in one sentence; empty when all was.
    """
    gaps = []
    for uri, outbox in _outboxes.items():
        if lost := outbox.drain(patience):
            names = lost[0] if len(lost) == 1 else f"{len(lost)} entries, from {lost[0]} to {lost[-1]},"
            gaps.append(f"MLflow at {storage.redact(uri)} lacks {names} of this run ({outbox.error}).")
    return " ".join(gaps)


@contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Turn the absence of the MLflow server inside the block into an InputError."""
    try:
        yield
    except MlflowException as error:
        if _hopeless(error):
            raise
        raise InputError("MLflow", _in_brief(error), remedy) from error


def _in_brief(error: Exception) -> str:
    """In one line and without secrets."""
    return storage.redact(" ".join(str(error).split()))[:300]


def _hopeless(error: Exception) -> bool:
    """Whether the server, which has answered, will never take this. It may be busy (429)."""
    if not isinstance(error, MlflowException):
        return False
    return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() != 429


@functools.cache
def check_answers(uri: str) -> None:
    """Whether the MLflow server at ``uri`` answers; once it has, it is not asked again.

    Raises:
        InputError: nobody does.
    """
    if not uri.startswith("http"):
        return
    try:
        # MLflow's own way, with its certificates and passwords. Any answer will do: what the server allows, the first
        # request will tell.
        http_request(get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=20, raise_on_status=False)
    except MlflowException as error:
        remedy = "Start the MLflow server, correct MLFLOW_TRACKING_URI, or unset it."
        value = f"nobody answers at {storage.redact(uri)} ({_in_brief(error)})"
        raise InputError("MLflow", value, remedy) from None  # the error and its causes quote the password


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
