"""Files on this machine and on S3 alike: atomic writes, folders claimed by one artefact, errors that say what to do.

A ``uri`` is a local path or ``s3://bucket/key``; how S3 is reached is the business of ``s3``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError

from boxinst.errors import InputError
from pipelines import diagnosis, s3
from pipelines.redaction import redact
from pipelines.s3 import Entry
from pipelines.schema import MANIFEST, File, Manifest

CLAIM = "_unfinished.json"
"""Marks a folder as an artefact being written, and from what; replaced by the manifest at the end."""


def is_s3(uri: str) -> bool:
    """Whether ``uri`` names something on S3."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """``uri`` with path components appended."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *parts])


# --- file systems ---------------------------------------------------------------------------------------------------


def filesystem(uri: str) -> pafs.FileSystem:
    """The Arrow file system of ``uri``. It keeps the endpoint when it travels to another process."""
    if is_s3(uri):
        return s3.filesystem()
    if "://" in uri:
        raise InputError(redact(uri), "unknown kind of address", "Give a local path or s3://bucket/prefix.")
    return pafs.LocalFileSystem()


def fs_path(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system of ``uri``, and its path there: absolute locally, ``bucket/key`` on S3."""
    return filesystem(uri), uri.removeprefix("s3://").rstrip("/") if is_s3(uri) else str(_local(uri))


def absolute(uri: str) -> str:
    """``uri`` as it can be found from anywhere."""
    return uri.rstrip("/") if is_s3(uri) else str(_local(uri))


def _local(uri: str) -> Path:
    if "://" in uri:
        raise InputError(redact(uri), "unknown kind of address", "Give a local path or s3://bucket/prefix.")
    return Path(uri).expanduser().absolute()


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn a failure of storage inside the block into an InputError that names its cause.

    A file that does not exist stays a FileNotFoundError.
    """
    try:
        yield
    except FileNotFoundError:
        if is_s3(uri):  # or is it the bucket that does not exist?
            diagnosis.check(uri)
        raise
    except IsADirectoryError as error:
        raise InputError(redact(uri), "is a folder", "Name a file.") from error
    except (OSError, ClientError, BotoCoreError) as error:
        if is_s3(uri):
            raise diagnosis.explain(uri, error) from error
        raise InputError(redact(uri), redact(str(error)), "Make it readable and writable for this user.") from error


def check(*uris: str | None) -> None:
    """Make sure, before any work, that every bucket named is there and lets us in. Local paths are passed over.

    Raises:
        InputError: no such bucket, refused, another region, a wrong clock, wrong keys, or nobody answers.
    """
    diagnosis.check(*filter(None, uris))


# --- files ----------------------------------------------------------------------------------------------------------


def exists(uri: str) -> bool:
    """Whether a file or a folder is there."""
    with explained(uri):
        return s3.exists(uri) if is_s3(uri) else _local(uri).exists()


def check_readable(uri: str, item: str) -> None:
    """Make sure, before any work, that a file or folder is there.

    Args:
        uri: what is to be read.
        item: the name its owner knows it by, such as an option.

    Raises:
        InputError: it is not there, or the bucket does not exist, refuses or does not answer.
    """
    if not exists(uri):
        raise InputError(item, f"{redact(uri)} does not exist", "Correct the path.")


def read_bytes(uri: str, size: int | None = None) -> bytes:
    """Content of a file, all of it.

    Args:
        uri: of the file.
        size: in bytes, where it is known, say from a listing.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it cannot be read, or is of another size.
    """
    with explained(uri):
        if is_s3(uri):
            return s3.get(uri, size)
        data = _local(uri).read_bytes()
    if size is not None and len(data) != size:
        raise InputError(redact(uri), f"{len(data)} bytes, {size} a moment ago", "Let it be while it is read.")
    return data


CHUNK = 8 << 20
"""Bytes that ``chunks`` holds."""


def size(uri: str) -> int:
    """Bytes of a file."""
    with explained(uri):
        return s3.size(uri) if is_s3(uri) else _local(uri).stat().st_size


def chunks(uri: str) -> Iterator[bytes]:
    """Content of a file in order, ``CHUNK`` bytes at a time."""
    with explained(uri):
        if is_s3(uri):
            yield from s3.chunks(uri, CHUNK)
            return
        with open(_local(uri), "rb") as stream:
            while data := stream.read(CHUNK):
                yield data


@contextmanager
def writing(uri: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes appear at ``uri`` all at once, when the block has ended well."""
    with explained(uri):
        if is_s3(uri):
            # By way of this machine, so that the whole upload can be done again.
            with tempfile.NamedTemporaryFile(prefix="boxinst-") as stream:
                yield stream
                s3.put(uri, stream)
            return
        path = _local(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "wb") as stream:
                yield stream
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file; it is complete or not there. Folders are made."""
    if is_s3(uri):
        with explained(uri):
            s3.put(uri, data)
        return
    with writing(uri) as stream:
        stream.write(data)


def walk(uri: str) -> Iterator[tuple[str, Entry]]:
    """Every file below a folder, one by one, by its path relative to it. None when there is no such folder.

    A bucket of millions is listed page by page, so keep what is needed of it and no more.
    """
    with explained(uri):
        if is_s3(uri):
            yield from s3.walk(uri)
            return
        root = str(_local(uri))
        for folder, _, names in os.walk(root, onerror=_unless_missing, followlinks=True):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.exists(path):  # a link may lead nowhere
                    about = os.stat(path)
                    yield os.path.relpath(path, root), Entry(about.st_size, about.st_mtime_ns)


def _unless_missing(error: OSError) -> None:
    """``os.walk`` passes over what it cannot read unless told otherwise."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def list_files(uri: str) -> dict[str, Entry]:
    """``walk`` as a whole, in the order of the names: for the folder of an artefact, which holds few files."""
    return dict(sorted(walk(uri)))


def clear(uri: str, *, keep: Collection[str] = ()) -> None:
    """Remove what is in a folder, except the names in ``keep``."""
    with explained(uri):
        if is_s3(uri):
            s3.remove(uri, keep=keep)
            return
        root = _local(uri)
        for path in root.iterdir() if root.exists() else ():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove(uri: str) -> None:
    """Remove a folder with all it holds; it need not exist."""
    with explained(uri):
        if is_s3(uri):
            s3.remove(uri)
        elif _local(uri).exists():
            shutil.rmtree(_local(uri))


def move(path: Path, uri: str) -> None:
    """Move a file of this machine to ``uri``, where it appears whole. Within a disk nothing is copied."""
    with explained(uri):
        if not is_s3(uri):
            shutil.move(path, _local(uri))
            return
        with path.open("rb") as stream:
            s3.put(uri, stream)
        path.unlink()


def upload(folder: str | Path, uri: str) -> None:
    """Copy the files of a local folder."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            with writing(join(uri, path.relative_to(folder).as_posix())) as stream, path.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 22)


def download(uri: str, folder: str | Path) -> None:
    """Copy every file below ``uri`` into a local folder; each is whole."""
    for name, about in list_files(uri).items():
        target = Path(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(join(uri, name), about.size))


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
        kind: ``shards``, ``masks`` or ``pieces``.
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
    claim = join(uri, CLAIM)
    with explained(uri):
        s3.delete(claim) if is_s3(uri) else _local(claim).unlink(missing_ok=True)


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


def row_groups(uri: str, manifest: Manifest, columns: Collection[str] | None = None) -> Iterator[pa.Table]:
    """The rows of an artefact in order, one row group in memory at a time; all columns where none are named."""
    fs = filesystem(uri)
    for path in shard_files(uri, manifest):
        with explained(uri):
            groups = s3.patiently(functools.partial(pq.read_metadata, path, filesystem=fs)).num_row_groups
            opened: list[pq.ParquetFile] = []
            for number in range(groups):
                yield s3.patiently(functools.partial(_next_group, opened, fs, path, number, columns))


def _next_group(
    opened: list[pq.ParquetFile], fs: pafs.FileSystem, path: str, number: int, columns: Collection[str] | None
) -> pa.Table:
    """A row group of the file that is open, or is opened, and opened anew after a failure."""
    if not opened:
        opened.append(open_parquet(fs, path))
    try:
        return opened[0].read_row_group(number, columns=None if columns is None else list(columns))
    except OSError:
        opened.clear()
        raise


def open_parquet(fs: pafs.FileSystem, path: str) -> pq.ParquetFile:
    """A Parquet file whose columns are fetched together, not one by one."""
    return pq.ParquetFile(path, filesystem=fs, pre_buffer=True)
