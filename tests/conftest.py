"""What the tests share: one Ray cluster, two S3 servers, one small corpus, its shards and a tiny model."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import swift_server
from fault_proxy import FaultProxy

if TYPE_CHECKING:
    from pipelines.synthetic import SyntheticCorpus

# Before any library reads them: small thread pools on small machines, no waiting for a credential service.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
# What a shell starts in the background ignores Ctrl-C, and so do its children; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def s3_proxy() -> Iterator[FaultProxy]:
    """The way to the S3 server, in the environment before Ray starts so that its workers take it too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        upstream = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with FaultProxy(upstream) as proxy:
        os.environ |= {
            "AWS_ENDPOINT_URL": proxy.address,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "testing-key",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
        }
        yield proxy


@pytest.fixture(scope="session")
def s3_address(s3_proxy: FaultProxy) -> str:
    """Where the S3 server is asked."""
    return s3_proxy.address


@contextmanager
def serving(words: list[str], port: int, log: Path) -> Iterator[None]:
    """A server in a process of its own, which answers at ``port``."""
    with log.open("wb") as stream:
        server = subprocess.Popen([sys.executable, *words], stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 120
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.fail(f"the S3 server did not start: {log.read_text()}")
        yield
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def _s3_server(s3_proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """moto: it starts quickly, and knows users and their rights (IAM) too."""
    port = int(s3_proxy.upstream.rsplit(":", 1)[1])
    words = ["-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with serving(words, port, tmp_path_factory.mktemp("s3") / "server.log"):
        yield


@pytest.fixture(scope="session")
def _swift_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the S3 server that ``swift_server`` starts."""
    if find_spec("swift") is None:
        pytest.skip("OpenStack Swift, the second S3 server, is not installed: pip install swift")
    folder, port = tmp_path_factory.mktemp("swift"), swift_server.free_port()
    words = [swift_server.__file__, str(folder), str(port)]
    with serving(words, port, folder / "server.log"):
        yield f"http://127.0.0.1:{port}"


def new_bucket(request: pytest.FixtureRequest) -> str:
    import boto3

    bucket = "t" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    boto3.Session().client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def s3(_s3_server: None, request: pytest.FixtureRequest) -> str:
    """``s3://bucket`` of a fresh, empty bucket on an S3 server on this machine."""
    return new_bucket(request)


@pytest.fixture
def swift(_swift_server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on a second, stricter server, for this process alone: Ray's workers have the keys of the first."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _swift_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", swift_server.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", swift_server.SECRET)
    return new_bucket(request)


@pytest.fixture(params=["s3", "swift"])
def each_s3(request: pytest.FixtureRequest) -> str:
    """A bucket on one server, and on the other."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder for this test alone."""
    folder = tmp_path / "home"
    monkeypatch.setenv("BOXINST_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session")
def ray_session(s3_proxy: FaultProxy) -> Iterator[None]:
    """Ray in this process, once for all tests."""
    from pipelines import cluster

    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # tests do not wait ten seconds for a figure
    cluster.start(cpus=4)
    yield
    cluster.stop()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCorpus:
    """12 training and 4 validation images of 96 pixels, with exact masks and boxes-only twins."""
    from pipelines import synthetic

    out = str(tmp_path_factory.mktemp("corpus"))
    return synthetic.write(synthetic.SyntheticConfig(out=out, train=12, val=4, size=96, seed=7))


@pytest.fixture(scope="session")
def shards(corpus: SyntheticCorpus, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards of the corpus, by name: ``train`` and ``val`` with masks, ``train_boxes`` and ``val_boxes`` without."""
    from pipelines.shards import ShardConfig, run

    root = tmp_path_factory.mktemp("shards")
    made = {}
    for name in ("train", "train_boxes", "val", "val_boxes"):
        made[name] = str(root / name)
        run(ShardConfig(annotations=getattr(corpus, name), images=corpus.images, out=made[name]))
    return made


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a very small, untrained model for the classes of ``corpus``."""
    import torch

    import boxinst
    from pipelines.synthetic import CLASSES

    torch.manual_seed(0)
    model = boxinst.CondInst(boxinst.ModelConfig(classes=CLASSES, backbone="resnet18", width=16, fpn_channels=16))
    folder = str(tmp_path_factory.mktemp("model") / "tiny")
    boxinst.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets kept beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder
