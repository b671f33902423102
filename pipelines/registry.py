"""Models by name: where a model's folder is, how a trained one is registered, and which version is the champion."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import EvaluationResult, MetricThreshold, Model, ModelSignature
from mlflow.models.evaluation.validation import ModelValidationFailedException
from mlflow.types.schema import AnyType, ColSpec, DataType, Schema

import boxinst
from boxinst.errors import InputError
from boxinst.tensors import CONFIG_FILE, WEIGHTS_FILE
from pipelines import settings, storage, tracking
from pipelines.promotion import PromoteConfig, Promotion, check_name, limits, replay, table
from pipelines.schema import Category

_SCIENCE, _HERE = (Path(file).resolve().parent for file in (boxinst.__file__, __file__))
"""The packages that a model needs, each by itself: in a submitted job they do not lie beside each other."""
_REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pycocotools", "safetensors", "torch", "torchvision")
_SIGNATURE = ModelSignature(
    # AnyType for the boxes: MLflow refuses whole numbers in an array of doubles.
    inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(AnyType(), "boxes")]),
    outputs=Schema([ColSpec(AnyType(), "masks"), ColSpec(AnyType(), "scores")]),
)


@dataclass(frozen=True)
class Version:
    """A registered model version."""

    name: str
    version: int

    @property
    def uri(self) -> str:
        """What every option that takes a model accepts."""
        return f"models:/{self.name}/{self.version}"

    @property
    def label(self) -> str:
        """As mask rows name it."""
        return f"{self.name}/{self.version}"


# Finding a model.


def resolve(uri: str) -> Path:
    """The local folder, as ``boxinst.load`` reads it, of the model that ``uri`` names.

    Args:
        uri: "models:/NAME@ALIAS", "models:/NAME/VERSION", "runs:/ID" with or without "/MODEL", a folder, or an
            s3:// folder. The folder may be one of ``boxinst.save`` or a model that MLflow has logged. What is not on
            this machine is downloaded to BOXINST_HOME/cache/models, once.

    Raises:
        InputError: there is no such model, version, alias, run or folder, or the folder holds no model.
    """
    if uri.startswith("models:/"):
        found = find(uri)
        folder = _fetch(client().get_model_version_download_uri(found.name, str(found.version)), uri)
    elif uri.startswith("runs:/"):
        folder = _fetch(_run_model(uri), uri)
    elif storage.is_s3(uri):
        folder = _fetch(uri.rstrip("/"), uri)
    elif "://" in uri:
        raise InputError("model", uri, "Give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID, s3:// or a folder.")
    else:
        folder = Path(uri)
        if not folder.is_dir():
            raise InputError("model", uri, "There is no such folder. Registered models are written models:/NAME@ALIAS.")
    if (folder / "MLmodel").is_file():
        artifacts = Model.load(str(folder)).flavors.get("python_function", {}).get("artifacts", {})
        folder = folder / artifacts.get("model", {}).get("path", "")
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError("model", uri, f"It has no {' and no '.join(missing)}: give a folder that training wrote.")
    return folder


def find(uri: str) -> Version:
    """The version that "models:/NAME@ALIAS", "models:/NAME/VERSION" or "models:/NAME/latest" names.

    Raises:
        InputError: there is none; the message names those that exist.
    """
    match = re.fullmatch(r"models:/+(?P<name>[^/@]+)(?:@(?P<alias>[^/]+)|/(?P<version>\d+|latest))", uri)
    if not match:
        raise InputError("model", uri, "Write models:/NAME@ALIAS or models:/NAME/VERSION.")
    name, alias, version = match["name"], match["alias"], match["version"]
    numbers, aliases = _known(name, uri)
    if alias is not None and alias not in aliases:
        there = ", ".join(f"{a} (version {v})" for a, v in aliases.items()) or "none"
        raise InputError("model", uri, f"{name} has no alias {alias}; there is: {there}. `boxinst promote` sets it.")
    if alias is not None:
        return Version(name, aliases[alias])
    if version == "latest":
        return Version(name, numbers[-1])
    if int(version) not in numbers:
        raise InputError("model", uri, f"{name} has no version {version}; there is: {_listed(numbers)}.")
    return Version(name, int(version))


def identify(uri: str) -> str:
    """A short name of the model for the rows it makes: "nuclei/3", "run 1a2b3c4d", or the folder's name."""
    if uri.startswith("models:/"):
        return find(uri).label
    if uri.startswith("runs:/"):
        run_id = uri.removeprefix("runs:/").strip("/").split("/")[0]
        versions = client().search_model_versions(f"run_id = '{run_id}'")
        return f"{versions[0].name}/{versions[0].version}" if versions else f"run {run_id[:8]}"
    return uri.rstrip("/").rsplit("/", 1)[-1]


def fingerprint(folder: Path) -> str:
    """Hex digest of a model's weights and configuration, whatever it is called."""
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    with (folder / WEIGHTS_FILE).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def check_classes(classes: Sequence[str], categories: Sequence[Category], *, model: str, shards: str) -> None:
    """Hold a model and a corpus to the same class list, since labels are positions in it.

    Raises:
        InputError: the lists differ, in names or in order.
    """
    wanted = [c.name for c in categories]
    if list(classes) != wanted:
        raise InputError(
            "model",
            f"{model} has the classes {_listed(classes)}",
            f"{shards} has {_listed(wanted)}: give a model that was trained on these classes, in this order.",
        )


def client() -> MlflowClient:
    """A client of the tracking server (and registry) that the settings name, and that answers."""
    tracking.check_answers(uri := settings.mlflow_uri())  # MLflow itself would try for minutes
    return MlflowClient(tracking_uri=uri)


def _known(name: str, uri: str) -> tuple[list[int], dict[str, int]]:
    """The versions of a registered model in rising order, and its aliases."""
    try:
        model = client().get_registered_model(name)
    except MlflowException as error:
        names = _listed([m.name for m in client().search_registered_models()])
        remedy = f"No model of that name is registered; there is: {names}. `boxinst train` registers one."
        raise InputError("model", uri, remedy) from error
    numbers = sorted(int(v.version) for v in _versions(name))
    if not numbers:
        raise InputError("model", uri, f"{name} has no version yet. `boxinst train` registers one.")
    return numbers, {alias: int(version) for alias, version in model.aliases.items()}


def _versions(name: str) -> list[ModelVersion]:
    found, token = [], None
    while True:
        page = client().search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        if not (token := page.token):
            return found


def _run_model(uri: str) -> str:
    """The location of the model that a run has logged: "runs:/ID" (its only or last one) or "runs:/ID/PATH"."""
    run_id, _, path = uri.removeprefix("runs:/").strip("/").partition("/")
    try:
        run = client().get_run(run_id)
    except MlflowException as error:
        raise InputError("model", uri, "There is no such run. `boxinst train` prints the run it wrote.") from error
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client().get_logged_model(output.model_id) for output in outputs]
    for model in reversed(models):
        if path in ("", model.name):
            return str(model.artifact_location)
    if not path:
        raise InputError("model", uri, "This run has logged no model: give one that was trained to its end.")
    return f"{run.info.artifact_uri.rstrip('/')}/{path}"


def _fetch(location: str, uri: str) -> Path:
    """The local copy of an artifact folder: the place itself where that is local, else the cache."""
    parsed = urlparse(location)
    if parsed.scheme in ("", "file"):
        return Path(unquote(parsed.path))
    stamp = location
    if parsed.scheme == "s3":
        # A folder in a bucket may be written anew, so what it holds is part of the name of its copy.
        storage.check(location)  # what stands behind a registered name is nowhere else looked at
        storage.check_readable(location, "model")
        files = storage.list_files(location)
        stamp += json.dumps([(name, info.size, info.mtime_ns) for name, info in files.items()])
    target = settings.home() / "cache" / "models" / hashlib.sha256(stamp.encode()).hexdigest()[:16]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch, _mlflow_globals():
            got = f"{scratch}/model"
            try:
                if parsed.scheme == "s3":
                    storage.download(location, got)
                else:
                    got = mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=scratch)
            except (MlflowException, OSError) as error:
                why = storage.redact(str(error))
                raise InputError("model", uri, f"It cannot be read ({why}). Check that it exists.") from error
            try:
                os.replace(got, target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
    return target


@contextmanager
def _mlflow_globals() -> Iterator[None]:
    """MLflow's functions that have no client take the tracking server from a global: set it, and put it back."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")
    before = {name: os.environ.get(name) for name in names}
    mlflow.set_tracking_uri(settings.mlflow_uri())
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _listed(items: Sequence[object], most: int = 20) -> str:
    names = [str(item) for item in items[:most]] + (["..."] if len(items) > most else [])
    return ", ".join(names) or "none"


# Registering one.


def register(
    run_id: str,
    model_dir: str | Path,
    name: str,
    *,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Version:
    """Log the model to its run as a pyfunc that loads anywhere, and register it as the next version of ``name``.

    Args:
        run_id: the run that trained it; its status stays what it was.
        model_dir: a folder of ``boxinst.save``; it becomes the artifact "model" of the logged model.
        name: of the registered model, which is created when it does not exist.
        metrics: recorded with the logged model.
        tags: of the new version.
    """
    check_name(name)
    api = client()
    status = api.get_run(run_id).info.status
    with _mlflow_globals(), warnings.catch_warnings():
        # The signature is given, so an example (which MLflow would run through the network) adds nothing.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        with mlflow.start_run(run_id=run_id, nested=True):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(_HERE / "pyfunc_model.py"),
                artifacts={"model": str(model_dir)},
                code_paths=[str(_SCIENCE), str(_HERE)],
                pip_requirements=[f"{package}=={installed(package)}" for package in _REQUIREMENTS],
                signature=_SIGNATURE,
            )
            if metrics:
                mlflow.log_metrics(dict(metrics), model_id=logged.model_id)
        try:
            api.get_registered_model(name)
        except MlflowException:
            api.create_registered_model(name)
        made = api.create_model_version(name, logged.model_uri, run_id, tags=dict(tags or {}), model_id=logged.model_id)
    api.update_run(run_id, status=status)
    return Version(name, int(made.version))


def registered(run_id: str, name: str) -> Version | None:
    """The version of ``name`` that a run's model was registered as; None where there is none."""
    numbers = [int(v.version) for v in _versions(name) if v.run_id == run_id]
    return Version(name, max(numbers)) if numbers else None


# The champion.


@dataclass(frozen=True)
class PromoteResult:
    """What ``promote`` or ``rollback`` came to."""

    promoted: bool
    """Whether the alias has moved."""
    version: Version
    """The candidate, or the version gone back to."""
    previous: Version | None
    """The champion before."""
    table: str
    """Metric by metric: champion, candidate, change, verdict; a sentence for a rollback."""


def contenders(config: PromoteConfig) -> tuple[Version, Version | None]:
    """The candidate and the present champion (None before the first promotion), to be evaluated on one set.

    Raises:
        InputError: unknown model or version, a candidate of another model, or one that is the champion already.
    """
    number = config.candidate
    candidate = find(number if number.startswith("models:/") else f"models:/{config.name}/{number}")
    if candidate.name != config.name:
        raise InputError("candidate", number, f"It is a version of {candidate.name}, not of {config.name}.")
    champion = _champion(config.name, config.alias)
    if champion == candidate:
        raise InputError("candidate", candidate.label, f"It is the {config.alias} already: give another version.")
    return candidate, champion


def promote(
    config: PromoteConfig,
    candidate_metrics: Mapping[str, float],
    champion_metrics: Mapping[str, float] | None,
    *,
    evaluated_on: str = "",
) -> PromoteResult:
    """Move the alias to the candidate, unless it is worse than the champion by more than the tolerance.

    The first promotion has nothing to compare with: its gated metrics need only be numbers, and above zero where
    more is better.

    Args:
        config: names the candidate and the gates.
        candidate_metrics: of the candidate, from ``evaluate``.
        champion_metrics: of the champion on the same set; None when there is no champion.
        evaluated_on: the evaluation set, for the record.

    Raises:
        InputError: as ``contenders``; the champion is not evaluated; or a gated metric was not measured.
    """
    candidate, champion = contenders(config)
    if champion and champion_metrics is None:
        raise InputError("champion", champion.label, "It has no metrics to compare with: evaluate it on the same set.")
    baseline = champion_metrics if champion else None
    gates = limits(config.higher, config.lower, config.tolerance, candidate_metrics, baseline)
    measured = EvaluationResult(metrics=dict(candidate_metrics), artifacts={})
    failed: list[str] = []
    for limit in gates:  # one by one, since the exception does not say as data which failed
        threshold = MetricThreshold(threshold=limit.value, greater_is_better=limit.more_is_better)
        try:
            mlflow.validate_evaluation_results({limit.metric: threshold}, measured)
        except ModelValidationFailedException:
            failed.append(limit.metric)
    labels = (candidate.label, champion.label if champion else "(none)")
    compared = table(gates, failed, candidate_metrics, baseline, labels)
    if not failed:
        _move(config, candidate, champion, "promote", dict(candidate_metrics), evaluated_on)
    return PromoteResult(not failed, candidate, champion, compared)


def rollback(config: PromoteConfig) -> PromoteResult:
    """Give the alias back to the champion before the present one. Repeated, it walks further back.

    Raises:
        InputError: there is no champion, or none before it.
    """
    _known(config.name, f"models:/{config.name}")
    champion = _champion(config.name, config.alias)
    earlier = replay(history(config.name, config.alias))
    existing = {int(v.version) for v in _versions(config.name)}
    while earlier and (earlier[-1] not in existing or (champion and earlier[-1] == champion.version)):
        earlier.pop()
    if not earlier:
        there = f"version {champion.version} is the first {config.alias}" if champion else f"no {config.alias} yet"
        raise InputError("rollback", f"{config.name}: {there}", "There is nothing to go back to: promote a version.")
    target = Version(config.name, earlier[-1])
    _move(config, target, champion, "rollback", {}, "")
    came_from = f" from {champion.label}" if champion else ""
    return PromoteResult(True, target, champion, f"{config.alias} went back{came_from} to {target.label}.")


def history(name: str, alias: str = "champion") -> list[Promotion]:
    """Every move of ``alias`` in the order of time, from the tags of the versions that still exist."""
    prefix = _tag(alias, "")
    tags = [text for v in _versions(name) for key, text in v.tags.items() if key.startswith(prefix)]
    return sorted((Promotion(**json.loads(text)) for text in tags), key=lambda move: move.at)


def _champion(name: str, alias: str) -> Version | None:
    numbers, aliases = _known(name, f"models:/{name}")
    return Version(name, aliases[alias]) if aliases.get(alias) in numbers else None


def _move(
    config: PromoteConfig,
    version: Version,
    previous: Version | None,
    action: str,
    metrics: dict[str, float],
    evaluated_on: str,
) -> None:
    at = datetime.now(UTC).isoformat()
    was = previous.version if previous else None
    move = Promotion(action, version.version, was, config.by, at, config.reason, metrics, evaluated_on)
    # The record first: an alias that has moved without a record could not be rolled back.
    api = client()
    api.set_model_version_tag(version.name, str(version.version), _tag(config.alias, at), json.dumps(asdict(move)))
    api.set_registered_model_alias(version.name, config.alias, str(version.version))


def _tag(alias: str, at: str) -> str:
    return f"boxinst.{alias}.{at}".replace("+00:00", "Z")
