"""One configuration for every library, and listings that stay small however large the bucket."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from fault_proxy import FaultProxy, Faults, Request

from boxinst.errors import InputError
from pipelines import s3, settings, shards, storage
from pipelines.coco import Corpus, ImageEntry
from pipelines.config import ShardConfig
from pipelines.s3 import client, passes

TABLE = pa.table({"n": [1, 2, 3]})


@pytest.fixture
def proxy(s3_proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy of this test's own before the server of all, so that its counters and faults are its own too."""
    with FaultProxy(s3_proxy.upstream) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


# --- one configuration ---


@pytest.mark.parametrize("keys_in", ["credentials", "config"])
def test_a_profile_serves_every_library(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys_in: str
) -> None:
    keys = "aws_access_key_id = key-of-the-profile\naws_secret_access_key = secret-of-the-profile\n"
    config = f"[profile lab]\nregion = eu-west-1\nendpoint_url = {proxy.address}\n"
    (tmp_path / "config").write_text(config + keys * (keys_in == "config"))
    (tmp_path / "credentials").write_text("[lab]\n" + keys * (keys_in == "credentials"))
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # MLflow's, which reads the files once in a process
    signed: list[bytes] = []
    with proxy.answering(lambda request: signed.append(request.head)):  # type: ignore[func-returns-value]
        storage.check(s3)
        storage.write_bytes(f"{s3}/a.bin", b"by boto3")
        assert storage.read_bytes(f"{s3}/a.bin") == b"by boto3"
        fs, path = storage.fs_path(f"{s3}/a.parquet")
        pq.write_table(TABLE, path, filesystem=fs)
        assert pq.read_table(path, filesystem=fs).equals(TABLE)
        from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository, _cached_get_s3_client

        _cached_get_s3_client.cache_clear()
        (tmp_path / "model.bin").write_bytes(b"by MLflow")
        S3ArtifactRepository(f"{s3}/mlartifacts").log_artifact(str(tmp_path / "model.bin"))
    assert storage.read_bytes(f"{s3}/mlartifacts/model.bin") == b"by MLflow"
    assert proxy.done["HeadBucket"] + proxy.done["ListObjectsV2"] + proxy.done["GetObject"] > 3
    assert len(signed) > 8
    assert all(b"key-of-the-profile" in head and b"/eu-west-1/s3/" in head for head in signed)


def test_arrow_keeps_endpoint_and_patience_on_its_way_to_a_worker(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, path = storage.fs_path(f"{s3}/a.parquet")
    pq.write_table(TABLE, path, filesystem=fs)
    packed = pickle.dumps(fs)
    assert b"testing-secret" not in packed
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    arrived = pickle.loads(packed)
    with proxy.faults(Faults(refuse=1, most=3)):  # one more than Arrow's own patience
        assert pq.read_table(path, filesystem=arrived).equals(TABLE)
    assert proxy.met["refuse"] == 3


def test_the_store_holds_what_is_large_and_the_home_what_is_local(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOXINST_STORE", raising=False)
    assert settings.store() == str(home)
    assert settings.artifacts_uri() == (home / "mlartifacts").as_uri()
    monkeypatch.setenv("BOXINST_STORE", "s3://lab/boxinst/")
    assert settings.artifacts_uri() == "s3://lab/boxinst/mlartifacts"
    assert ShardConfig("x/train.json", "y").output == "s3://lab/boxinst/shards/train"
    assert settings.mlflow_uri() == f"sqlite:///{home}/mlflow.db"


# --- what is tried again ---


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (501, "NotImplemented", r"cannot do what it is asked for \(NotImplemented\)\. Update that server"),
        (505, "HTTPVersionNotSupported", r"cannot do what it is asked for .*\. Update that server"),
        (507, "XMinioStorageFull", r"has no room left \(XMinioStorageFull\)\. Make room there"),
    ],
)
def test_what_does_not_pass_is_said_at_once(proxy: FaultProxy, s3: str, status: int, code: str, message: str) -> None:
    body = f"<Error><Code>{code}</Code></Error>".encode()
    with proxy.answering(lambda _: (status, {}, body)), pytest.raises(InputError, match=message):
        storage.write_bytes(f"{s3}/a", b"1")
    assert proxy.asked["PutObject"] <= 3  # by boto3 alone


@pytest.mark.parametrize("status", [429, 500, 501, 502, 503, 504, 505, 507])
def test_both_clients_agree_on_what_passes(
    proxy: FaultProxy, status: int, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.s3.ARROW_ATTEMPTS", 1)
    with proxy.answering(lambda _: (status, {}, b"")):
        with pytest.raises(ClientError) as by_boto3:
            client().head_object(Bucket=s3.removeprefix("s3://"), Key="a")
        with pytest.raises(OSError) as by_arrow:  # noqa: PT011
            storage.filesystem(s3).get_file_info(f"{s3.removeprefix('s3://')}/a")
    assert passes(by_boto3.value) == passes(by_arrow.value) == (status not in (501, 505, 507))


# --- listing ---


def pages(total: int, size: int = 1000) -> object:
    """Answers to ListObjectsV2 as a bucket with objects "images/0000000.jpg" and so on gives them."""

    def answer(request: Request) -> tuple[int, dict[str, str], bytes] | None:
        if request.operation != "ListObjectsV2":
            return None
        start = int(request.query.get("continuation-token", "0"))
        stop = min(start + size, total)
        entries = "".join(
            f"<Contents><Key>images/{k:07d}.jpg</Key><Size>{k}</Size>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            for k in range(start, stop)
        )
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < total else ""
        said = f"<Name>b</Name><IsTruncated>{str(stop < total).lower()}</IsTruncated>{entries}{more}"
        return 200, {}, f"<ListBucketResult>{said}</ListBucketResult>".encode()

    return answer


def test_a_listing_is_read_page_by_page(proxy: FaultProxy) -> None:
    with proxy.answering(pages(5000)):  # type: ignore[arg-type]
        names = storage.walk("s3://large/images")
        assert next(names) == ("0000000.jpg", s3.Entry(0, 1_704_067_200 * 10**9))
        assert proxy.asked["ListObjectsV2"] == 1
        for _ in range(1000):
            next(names)
        assert proxy.asked["ListObjectsV2"] == 2


def test_a_corpus_keeps_of_a_large_folder_only_what_it_names(proxy: FaultProxy) -> None:
    named = ["0000003.jpg", "0002999.jpg", "absent.jpg"]
    corpus = Corpus([], [ImageEntry(k, name, 1, 1, []) for k, name in enumerate(named)], [], len(named), 0)
    with proxy.answering(pages(3000)), proxy.faults(Faults(refuse=0.3, on="List")):  # type: ignore[arg-type]
        found = shards._match(corpus, ShardConfig("a.json", "s3://large/images", "out"))
    assert {name: about.size for name, about in found.items()} == {"0000003.jpg": 3, "0002999.jpg": 2999}
    assert [reject["reason"] for reject in corpus.rejects] == ["missing file"]


def test_folders_on_s3(each_s3: str) -> None:
    s3 = each_s3
    for name in ("a/1", "a/2", "a/b/3", "ab/4"):
        storage.write_bytes(f"{s3}/{name}", name.encode())
    storage.filesystem(s3).create_dir(f"{s3.removeprefix('s3://')}/a/marked")
    assert [storage.exists(f"{s3}{name}") for name in ("", "/a", "/a/", "/a/b/3", "/a/b/", "/b", "/a/4")] == [
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert list(storage.list_files(f"{s3}/a")) == ["1", "2", "b/3"]
    storage.clear(f"{s3}/a", keep=["1"])
    assert list(storage.list_files(s3)) == ["a/1", "ab/4"]
    storage.remove(f"{s3}/a")
    assert list(storage.list_files(s3)) == ["ab/4"]


def test_an_object_that_is_throttled_alone_is_removed_too(proxy: FaultProxy, s3: str) -> None:
    storage.write_bytes(f"{s3}/a/1", b"1")
    asked: list[str] = []

    def answer(request: Request) -> tuple[int, dict[str, str], bytes] | None:
        if request.operation != "DeleteObjects":
            return None
        asked.append(request.operation)
        error = b"<Error><Key>a/1</Key><Code>SlowDown</Code><Message>Slow down</Message></Error>"
        return (200, {}, b"<DeleteResult>" + error + b"</DeleteResult>") if len(asked) == 1 else None

    with proxy.answering(answer):
        storage.remove(f"{s3}/a")
    assert len(asked) == 2
    assert not storage.exists(f"{s3}/a/1")
