"""Files on this machine and on S3 alike: atomic writes, folders claimed by one artefact, errors that say what to do.

A ``uri`` is a local path or ``s3://bucket/key``. S3 is configured by the usual variables: ``AWS_ENDPOINT_URL`` (for
MinIO and others), ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY`` or a profile, ``AWS_CA_BUNDLE``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

import boto3
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, NoCredentialsError

from boxinst.errors import InputError
from pipelines.schema import MANIFEST, File, Manifest

CLAIM = "_unfinished.json"
"""Marks a folder as an artefact being written, and from what; replaced by the manifest at the end."""


def is_s3(uri: str) -> bool:
    """Whether ``uri`` names something on S3."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """``uri`` with path components appended."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *parts])


def redact(text: str) -> str:
    """``text`` without passwords in addresses, signatures and the AWS credentials of the environment."""
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)
    text = re.sub(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s]+", r"\1...", text)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        secret = os.environ.get(name)
        if secret and len(secret) > 3:
            text = text.replace(secret, "...")
    return text


# --- file systems ---------------------------------------------------------------------------------------------------


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _region() -> str | None:
    given = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return given or ("us-east-1" if _endpoint() else boto3.Session().region_name)


def filesystem(uri: str) -> pafs.FileSystem:
    """The Arrow file system of ``uri``. It keeps the endpoint when it travels to another process."""
    if not is_s3(uri):
        if "://" in uri:
            raise InputError(redact(uri), "unknown kind of address", "Give a local path or s3://bucket/prefix.")
        return pafs.LocalFileSystem()
    options: dict[str, Any] = {"region": _region(), "connect_timeout": 10, "request_timeout": 60}
    if endpoint := _endpoint():
        parts = urlsplit(endpoint)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = bundle
    return pafs.S3FileSystem(**options)


def fs_path(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system of ``uri``, and its path there: absolute locally, ``bucket/key`` on S3."""
    path = uri.removeprefix("s3://").rstrip("/") if is_s3(uri) else str(Path(uri).expanduser().absolute())
    return filesystem(uri), path


def absolute(uri: str) -> str:
    """``uri`` as it can be found from anywhere."""
    return uri.rstrip("/") if is_s3(uri) else fs_path(uri)[1]


def _explain(uri: str) -> None:
    """Ask S3 why ``uri`` does not answer.

    Raises:
        InputError: the bucket does not exist, it refuses us, or nobody answers.
    """
    if not is_s3(uri):
        return
    bucket = uri.removeprefix("s3://").split("/")[0]
    item, where = f"s3://{bucket}", _endpoint() or "AWS"
    try:
        config = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 2})
        session = boto3.Session()  # reads the credentials as they are now
        client = session.client("s3", region_name=_region() or "us-east-1", endpoint_url=_endpoint(), config=config)
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)
    except NoCredentialsError:
        raise InputError(item, "no credentials", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.") from None
    except EndpointConnectionError:
        remedy = "Start it, or correct AWS_ENDPOINT_URL."
        raise InputError(item, f"nobody answers at {redact(where)}", remedy) from None
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in ("NoSuchBucket", "404"):
            raise InputError(item, f"no such bucket at {redact(where)}", "Correct the name or create it.") from None
        remedy = "Correct AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the rights of that user on the bucket."
        raise InputError(item, f"refused by {redact(where)} ({code})", remedy) from None
    except (BotoCoreError, ValueError) as error:
        raise InputError(item, redact(str(error)), "Correct the AWS_ variables or the address.") from None


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn a failure of storage inside the block into an InputError where its cause can be found out.

    A file that does not exist stays a FileNotFoundError.
    """
    try:
        yield
    except FileNotFoundError:
        _explain(uri)
        raise
    except OSError as error:
        _explain(uri)
        raise InputError(redact(uri), redact(str(error)), "Make it readable and writable for this user.") from error


# --- files ----------------------------------------------------------------------------------------------------------


def exists(uri: str) -> bool:
    """Whether a file or a folder is there."""
    with explained(uri):
        fs, path = fs_path(uri)
        return fs.get_file_info(path).type != pafs.FileType.NotFound


def check_readable(uri: str, item: str) -> None:
    """Make sure, before any work, that a file or folder is there.

    Args:
        uri: what is to be read.
        item: the name its owner knows it by, such as an option.

    Raises:
        InputError: it is not there, or the bucket does not exist, refuses or does not answer.
    """
    if not exists(uri):
        _explain(uri)
        raise InputError(item, f"{redact(uri)} does not exist", "Correct the path.")


def read_bytes(uri: str) -> bytes:
    """Content of a file."""
    with explained(uri):
        fs, path = fs_path(uri)
        with fs.open_input_file(path) as stream:
            return stream.read()


@contextmanager
def writing(uri: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes appear at ``uri`` all at once, when the block has ended well."""
    with explained(uri):
        fs, path = fs_path(uri)
        if is_s3(uri):  # an object appears when its upload is complete
            with fs.open_output_stream(path) as stream:
                yield stream
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as stream:
                yield stream
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file; it is complete or not there. Folders are made."""
    with writing(uri) as stream:
        stream.write(data)


def list_files(uri: str) -> dict[str, pafs.FileInfo]:
    """Every file below a folder, by its path relative to it, in order. Empty when there is no such folder."""
    with explained(uri):
        fs, path = fs_path(uri)
        found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    if not found:
        _explain(uri)
    files = {f.path[len(path) :].lstrip("/"): f for f in found if f.type == pafs.FileType.File}
    return {name: files[name] for name in sorted(files) if name}


def clear(uri: str, *, keep: Collection[str] = ()) -> None:
    """Remove what is in a folder, except the names in ``keep``."""
    with explained(uri):
        fs, path = fs_path(uri)
        for info in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
            if info.base_name not in keep:
                (fs.delete_dir if info.type == pafs.FileType.Directory else fs.delete_file)(info.path)


# --- Parquet --------------------------------------------------------------------------------------------------------


class _Hashing:
    """A binary stream for the Parquet writer that counts and hashes what goes through."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.sha256, self.size, self.closed = stream, hashlib.sha256(), 0, False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.sha256.update(view)
        self.size += view.nbytes
        self.stream.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:  # whoever opened the stream closes it
        self.closed = True

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def write_parquet(uri: str, tables: Iterable[pa.Table], schema: pa.Schema) -> File:
    """Write tables as the row groups of one Parquet file, holding one table in memory at a time.

    Returns:
        Its entry for the manifest; ``path`` is the file's name.
    """
    rows = 0
    # Image files are compressed already, and the least and greatest of them say nothing.
    plain = [name for name in schema.names if name != "image"]
    with writing(uri) as stream:
        sink = _Hashing(stream)
        compression = {name: "zstd" if name in plain else "none" for name in schema.names}
        with pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"), schema, compression=compression, use_dictionary=False, write_statistics=plain
        ) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))
                rows += len(table)
    return File(PurePosixPath(uri).name, rows, sink.size, sink.sha256.hexdigest())


# --- artefacts ------------------------------------------------------------------------------------------------------


def ensure_output(
    uri: str, kind: str, source: dict[str, Any] | None = None, *, overwrite: bool = False
) -> Manifest | None:
    """Claim a folder for an artefact, before any work.

    Args:
        uri: the folder.
        kind: ``shards`` or ``masks``.
        source: what the artefact is made from (JSON values). A finished artefact must be made from the same;
            unfinished files that were not are removed. None leaves that to the caller.
        overwrite: remove a finished or unfinished artefact of this kind first.

    Returns:
        The manifest when the folder holds the finished artefact already, None when it is to be written. Files that
        an unfinished run with the same source has left are still there in that case.

    Raises:
        InputError: the folder holds something else.
    """
    source = json.loads(json.dumps(source))
    names = list_files(uri)
    if names and MANIFEST not in names and CLAIM not in names:
        value = f"{redact(uri)} holds something else ({next(iter(names))})"
        raise InputError("output folder", value, "Give another folder, or empty this one.")
    if MANIFEST in names:
        manifest = Manifest.from_json(read_bytes(join(uri, MANIFEST)).decode(), path=join(uri, MANIFEST))
        same = manifest.kind == kind and (source is None or manifest.source == source)
        if same and not overwrite:
            return manifest
        if manifest.kind != kind or not overwrite:
            value = f"{redact(uri)} holds {manifest.kind} made from other inputs or options"
            remedy = "Give another folder, or `--overwrite`." if manifest.kind == kind else "Give another folder."
            raise InputError("output folder", value, remedy)
        clear(uri)
    elif CLAIM in names:
        claim = json.loads(read_bytes(join(uri, CLAIM)))
        if claim["kind"] != kind:
            value = f"{redact(uri)} holds unfinished {claim['kind']}"
            raise InputError("output folder", value, "Give another folder, or empty this one.")
        if overwrite or (source is not None and claim["source"] != source):
            clear(uri)
    write_bytes(join(uri, CLAIM), json.dumps({"kind": kind, "source": source}).encode())
    return None


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Publish an artefact: from here on its folder counts as finished."""
    write_bytes(join(uri, MANIFEST), manifest.to_json().encode())
    with explained(uri):
        fs, path = fs_path(join(uri, CLAIM))
        if fs.get_file_info(path).type == pafs.FileType.File:
            fs.delete_file(path)


def read_manifest(uri: str, kind: str | None = None) -> Manifest:
    """The manifest of a finished artefact whose files are all there.

    Raises:
        InputError: no artefact, an unfinished or damaged one, another kind, or a newer schema version.
    """
    check_readable(uri, f"{kind or 'artefact'} folder")
    names = list_files(uri)
    if MANIFEST not in names:
        found, remedy = "no manifest", "Give the output folder of `boxinst shard` or `boxinst segment`."
        if CLAIM in names:
            found, remedy = "an unfinished artefact", "Run the command that was writing it again."
        raise InputError(f"{kind or 'artefact'} folder", f"{redact(uri)} holds {found}", remedy)
    path = join(uri, MANIFEST)
    manifest = Manifest.from_json(read_bytes(path).decode(), path=redact(path), kind=kind)
    for file in manifest.files:
        size = names[file.path].size if file.path in names else None
        if size != file.bytes:
            value = "missing" if size is None else f"{size} bytes, {file.bytes} in the manifest"
            raise InputError(redact(join(uri, file.path)), value, "Copy the artefact again, or write it again.")
    return manifest


def shard_files(uri: str, manifest: Manifest) -> list[str]:
    """Paths of an artefact's Parquet files, as ``filesystem(uri)`` and ``ray.data.read_parquet`` want them."""
    root = fs_path(uri)[1]
    return [f"{root}/{file.path}" for file in manifest.files]
