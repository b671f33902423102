"""Runs in a real MLflow on SQLite."""

from __future__ import annotations

import base64
import ipaddress
import json
import socket
import ssl
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mlflow import MlflowClient
from PIL import Image

from boxinst import InputError
from pipelines import settings, tracking
from pipelines.tracking import Run


@pytest.fixture(scope="module", autouse=True)
def tracked_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One home for the module, since creating the database takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOXINST_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


def client() -> MlflowClient:
    return MlflowClient(tracking_uri=settings.mlflow_uri())


def test_a_run_records_what_it_is_given(tmp_path: Path, tracked_home: Path) -> None:
    run = Run.start("first", experiment="e", params={"lr": 0.1, "loss": {"theta": 2, "deep": {"x": None}}})
    run.metrics({"loss": 1.5, "share": torch.tensor(0.25)}, step=3)
    run.metrics({"loss": 1.0}, step=4)
    picture = torch.zeros(3, 4, 6, dtype=torch.uint8)
    picture[0, 1, 2] = 255
    run.image(picture, "validation/3.png")
    (tmp_path / "notes.txt").write_text("hello")
    run.artifact(tmp_path / "notes.txt", "files")
    run.tag({"warnings": "one"})
    run.tag({"warnings": "two", "long": "x" * 9000})

    info = client().get_run(run.run_id)
    assert info.info.status == "RUNNING"
    assert info.data.params == {"lr": "0.1", "loss.theta": "2", "loss.deep.x": "None"}
    assert [(m.step, m.value) for m in client().get_metric_history(run.run_id, "loss")] == [(3, 1.5), (4, 1.0)]
    assert info.data.metrics["share"] == 0.25
    assert (info.data.tags["warnings"], len(info.data.tags["long"])) == ("two", 8000)
    assert {f.path for f in client().list_artifacts(run.run_id, "files")} == {"files/notes.txt"}
    with Image.open(client().download_artifacts(run.run_id, "validation/3.png", str(tmp_path))) as stored:
        assert stored.size == (6, 4)
        assert stored.getpixel((2, 1)) == (255, 0, 0)
    assert info.info.artifact_uri.startswith((tracked_home / "mlartifacts").as_uri())

    run.close("FAILED")
    assert client().get_run(run.run_id).info.status == "FAILED"


def test_joining_a_run_keeps_its_parameters_and_goes_on() -> None:
    first = Run.start("again", experiment="e", params={"steps": 10}, tags={"stage": "one"})
    first.metrics({"loss": 2.0}, step=1)
    first.close("KILLED")
    second = Run.start(
        "again", experiment="e", params={"steps": 20, "new": 1}, tags={"stage": "two"}, run_id=first.run_id
    )
    second.metrics({"loss": 1.0}, step=2)
    info = client().get_run(first.run_id)
    assert info.info.status == "RUNNING"
    assert info.data.params == {"steps": "10", "new": "1"}
    assert info.data.tags["stage"] == "two"
    assert [m.step for m in client().get_metric_history(first.run_id, "loss")] == [1, 2]


def test_more_parameters_than_mlflow_takes_at_once() -> None:
    run = Run.start("many", experiment="e", params={f"p{k:03d}": k for k in range(230)} | {"long": "x" * 9000})
    assert len(client().get_run(run.run_id).data.params) == 231


def test_an_unknown_run_is_refused() -> None:
    with pytest.raises(InputError, match=r"run: no-such-run\. .*give one that is"):
        Run.start("x", experiment="e", run_id="no-such-run")


def test_the_revision_is_a_commit_of_this_repository() -> None:
    revision = tracking.revision()
    assert revision is None or len(revision.removesuffix("+changes")) == 40
    run = Run.start("code", experiment="e")
    assert client().get_run(run.run_id).data.tags.get("mlflow.source.git.commit") == revision


def test_a_ray_worker_joins_the_run_of_its_driver(ray_session: None) -> None:
    run = Run.start("driver", experiment="e")

    @ray.remote(num_cpus=1)
    def work(run_id: str, tracking_uri: str) -> str:
        from pipelines import tracking

        joined = tracking.Run.join(run_id, tracking_uri)
        joined.metrics({"from_worker": 7.0}, step=1)
        return tracking.deliver(120)

    assert ray.get(work.remote(run.run_id, run.tracking_uri)) == ""
    assert client().get_run(run.run_id).data.metrics["from_worker"] == 7.0


def nobody() -> str:
    """An address that refuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_named_at_the_start() -> None:
    uri = nobody()
    with pytest.raises(InputError, match=f"MLflow: nobody answers at {uri} .*Start the MLflow server"):
        Run.start("x", experiment="e", tracking_uri=uri)


@pytest.mark.parametrize("caller", ["ada:hunter2", "ada:hun/ter2"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "host:x"])
def test_what_is_said_of_a_server_that_does_not_answer_holds_no_password(caller: str, host: str) -> None:
    with pytest.raises(InputError, match=rf"nobody answers at http://{host} \(.*Start the MLflow server") as caught:
        Run.start("x", experiment="e", tracking_uri=f"http://{caller}@{host}")
    shown = "".join(traceback.format_exception(caught.value))
    assert not [word for word in ("ada:", "ter2") if word in shown]


@contextmanager
def answering(context: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[str | None]]]:
    """Address of a server that knows one experiment, and what it is told of who asks."""
    callers: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            callers.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            known = {"experiment_id": "1", "name": "e", "artifact_location": "s3://theirs"}
            self.wfile.write(json.dumps({"experiment": known}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", callers
        server.shutdown()


def test_a_server_with_a_certificate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mine")])
    address, now = x509.IPAddress(ipaddress.ip_address("127.0.0.1")), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    signed = made.add_extension(x509.SubjectAlternativeName([address]), critical=False).sign(key, hashes.SHA256())
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "cert.pem").write_bytes(signed.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with answering(context) as (where, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://{where}")
        with pytest.raises(InputError, match="CERTIFICATE_VERIFY_FAILED"):
            tracking.artifacts("e")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "cert.pem"))
        assert tracking.artifacts("e") == "s3://theirs"


def test_a_server_whose_address_names_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as (where, callers):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:hunter2@{where}")
        assert tracking.artifacts("e") == "s3://theirs"
    assert callers == ["Basic " + base64.b64encode(b"ada:hunter2").decode()] * 2


def test_a_server_that_is_away_stops_nothing_and_the_gap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_outboxes", {})
    uri = nobody()
    run = Run.join("0" * 32, uri)
    for step in range(3):
        run.metrics({"loss": 1.0}, step)
    run.image(torch.zeros(3, 4, 4, dtype=torch.uint8), "validation/2.png")
    gap = tracking.deliver(0.1)
    assert f"MLflow at {uri} lacks 4 entries, from metrics of step 0 to validation/2.png, of this run" in gap


def test_what_the_server_will_never_take_does_not_hold_up_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_outboxes", {})
    real = Run.start("real", experiment="e")
    Run.join("no-such-run", real.tracking_uri).metrics({"a": 1.0}, step=1)
    Run.join(real.run_id, real.tracking_uri).metrics({"a": 2.0}, step=2)
    assert "lacks metrics of step 1 of this run" in tracking.deliver(60)
    assert client().get_run(real.run_id).data.metrics == {"a": 2.0}
