"""Files here and on S3 alike: atomic, claimed by one artefact, with errors that name the cause and the remedy."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from boxinst.errors import InputError
from pipelines import storage
from pipelines.schema import MANIFEST, Category, File, Manifest

SCHEMA = pa.schema([("n", pa.int64()), ("image", pa.binary())])


@pytest.fixture(params=["local", "s3", "swift"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on this machine, or on one of two S3 servers."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue(request.param)


def table(*numbers: int) -> pa.Table:
    return pa.table({"n": list(numbers), "image": [bytes([n]) * 1000 for n in numbers]}, schema=SCHEMA)


def finished(root: str, **source: object) -> Manifest:
    file = storage.write_parquet(f"{root}/part.parquet", [table(1, 2), table(3)], SCHEMA)
    manifest = Manifest("shards", [Category(1, "cell")], [file], {}, dict(source))
    storage.write_manifest(root, manifest)
    return manifest


def test_bytes_round_trip_and_listing(root: str) -> None:
    assert storage.list_files(root) == {}
    assert not storage.exists(f"{root}/a/b.txt")
    storage.write_bytes(f"{root}/a/b.txt", b"old")
    storage.write_bytes(f"{root}/a/b.txt", b"new")
    storage.write_bytes(f"{root}/c.txt", b"12345")
    assert storage.read_bytes(f"{root}/a/b.txt") == b"new"
    assert {name: info.size for name, info in storage.list_files(root).items()} == {"a/b.txt": 3, "c.txt": 5}
    storage.clear(root)
    assert storage.list_files(root) == {}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with storage.writing(str(path)) as stream:
            stream.write(b"half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_entry_is_that_of_the_file(root: str) -> None:
    entry = storage.write_parquet(f"{root}/x.parquet", iter([table(1, 2), table(3)]), SCHEMA)
    data = storage.read_bytes(f"{root}/x.parquet")
    assert entry == File("x.parquet", 3, len(data), hashlib.sha256(data).hexdigest())
    found = pq.ParquetFile(pa.BufferReader(data))
    assert found.read() == table(1, 2, 3)
    assert found.num_row_groups == 2


@pytest.mark.parametrize("root", ["local", "s3"], indirect=True)  # the server whose keys Ray's workers have
def test_ray_reads_the_files(root: str, ray_session: None) -> None:
    import ray

    manifest = finished(root)
    rows = ray.data.read_parquet(storage.shard_files(root, manifest), filesystem=storage.filesystem(root)).take_all()
    assert [row["n"] for row in rows] == [1, 2, 3]


# --- a folder belongs to one artefact ---


def test_life_of_an_artefact(root: str) -> None:
    assert storage.ensure_output(root, "shards", {"a": 1}) is None
    storage.write_bytes(f"{root}/part.parquet", b"of a killed run")
    with pytest.raises(InputError, match=r"shards folder: .* holds an unfinished artefact\. Run the command"):
        storage.read_manifest(root, "shards")

    assert storage.ensure_output(root, "shards", {"a": 1}) is None
    assert "part.parquet" in storage.list_files(root), "the same inputs may go on from what is there"
    assert storage.ensure_output(root, "shards", {"a": 2}) is None
    assert "part.parquet" not in storage.list_files(root), "other inputs must not mix with it"

    manifest = finished(root, a=2)
    assert storage.CLAIM not in storage.list_files(root)
    assert storage.read_manifest(root, "shards") == manifest
    assert storage.ensure_output(root, "shards", {"a": 2}) == manifest
    with pytest.raises(InputError, match=r"output folder: .* other inputs or options\. .*--overwrite"):
        storage.ensure_output(root, "shards", {"a": 3})
    assert storage.read_manifest(root) == manifest
    assert storage.ensure_output(root, "shards", {"a": 3}, overwrite=True) is None
    assert list(storage.list_files(root)) == [storage.CLAIM]


def test_folders_that_hold_something_else(root: str) -> None:
    storage.write_bytes(f"{root}/holiday.jpg", b"")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"output folder: .* something else \(holiday.jpg\)\. Give another"):
            storage.ensure_output(root, "shards", overwrite=overwrite)
    finished(f"{root}/s")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"output folder: .* holds shards .*Give another folder\.$"):
            storage.ensure_output(f"{root}/s", "masks", overwrite=overwrite)
    storage.ensure_output(f"{root}/u", "masks")
    with pytest.raises(InputError, match=r"output folder: .* holds unfinished masks\. Give another"):
        storage.ensure_output(f"{root}/u", "shards")
    assert len(storage.list_files(root)) == 4


def test_damaged_artefacts(root: str) -> None:
    manifest = finished(root)
    storage.write_bytes(f"{root}/part.parquet", b"short")
    with pytest.raises(InputError, match=rf"part.parquet: 5 bytes, {manifest.files[0].bytes} in the manifest\. "):
        storage.read_manifest(root)
    fs, path = storage.fs_path(f"{root}/part.parquet")
    fs.delete_file(path)
    with pytest.raises(InputError, match=r"part.parquet: missing\. Copy"):
        storage.read_manifest(root)
    newer = {**json.loads(manifest.to_json()), "schema_version": 99}
    storage.write_bytes(f"{root}/{MANIFEST}", json.dumps(newer).encode())
    for call in (lambda: storage.read_manifest(root), lambda: storage.ensure_output(root, "shards")):
        with pytest.raises(InputError, match=r"manifest.json: schema version 99.*Upgrade"):
            call()


def test_no_artefact(root: str) -> None:
    with pytest.raises(InputError, match=r"shards folder: .* does not exist\. Correct"):
        storage.read_manifest(f"{root}/nowhere", "shards")
    storage.write_bytes(f"{root}/x/readme.txt", b"")
    with pytest.raises(InputError, match=r"shards folder: .* holds no manifest\. Give the output"):
        storage.read_manifest(f"{root}/x", "shards")


# --- storage that does not answer ---


def each_call(uri: str) -> list[str]:
    """Messages of every way to touch ``uri``."""
    calls = (
        lambda: storage.check_readable(uri, "--images"),
        lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b"x"),
        lambda: storage.list_files(uri),
        lambda: storage.ensure_output(uri, "shards"),
    )
    messages = []
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_no_such_bucket(each_s3: str) -> None:
    for message in each_call("s3://no-such-bucket-here/prefix"):
        assert "s3://no-such-bucket-here: no such bucket at http://127.0.0.1" in message
        assert "create it" in message


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hunter2@{address}")
    monkeypatch.setattr("pipelines.s3.PATIENCE", 0.0)
    with pytest.raises(InputError, match=rf"s3://b: nobody answers at http://{address}\. .*AWS_ENDPOINT_URL") as caught:
        storage.check_readable("s3://b/prefix", "--images")
    assert "hunter2" not in str(caught.value)


class Refusing(BaseHTTPRequestHandler):
    """An S3 server that refuses every request."""

    def refuse(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>denied for testing-key</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = refuse  # noqa: N815 - the names that the server looks up

    def log_message(self, *args: object) -> None:
        pass


def test_refused_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        for message in each_call("s3://private/prefix"):
            assert "s3://private: refused by http://127.0.0.1" in message
            assert "(AccessDenied)" in message
            assert "Correct AWS_ACCESS_KEY_ID" in message
            assert "testing-key" not in message
            assert "testing-secret" not in message
    finally:
        server.shutdown()
        server.server_close()


def test_a_wrong_secret_by_a_server_that_checks_it(swift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{swift}/a", b"before")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-somebody-else")
    for message in each_call(f"{swift}/prefix"):
        assert f"{swift}: " in message
        assert "secret key does not belong" in message
        assert "of-somebody-else" not in message


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3: str) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"no credentials\. Set AWS_ACCESS_KEY_ID"):
        storage.check_readable(f"{s3}/x", "--images")


def test_missing_and_forbidden_files(root: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--annotations: .*/a.json does not exist\. Correct the path"):
        storage.check_readable(f"{root}/a.json", "--annotations")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/a.json")
    with pytest.raises(InputError, match=r"gs://bucket/x: unknown kind of address\. Give a local path or s3://"):
        storage.exists("gs://bucket/x")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/below"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")


def test_redact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    text = storage.redact("http://me:pw@host/x?X-Amz-Signature=abc&y=1 s3cr3t")
    assert text == "http://host/x?X-Amz-Signature=...&y=1 ..."
