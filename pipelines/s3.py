"""S3 and whatever speaks it: reached in one way by every library, with patience for what passes and words for the rest.

Configured by the variables and files of AWS alone: ``AWS_ENDPOINT_URL`` (MinIO, Ceph, SeaweedFS, R2), ``AWS_REGION``,
``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_CA_BUNDLE``.
boto3 reads, writes and lists whole objects. Arrow's own client reads ranges of Parquet files, and writes for Ray.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
import pyarrow.fs as pafs
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
    SSLError,
)
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential
from urllib3.exceptions import HTTPError

from pipelines.redaction import redact

if TYPE_CHECKING:
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

PATIENCE = 120.0
"""Seconds that storage may be away, or slow, in the middle of a command."""
PATIENCE_AT_START = 30.0
"""The same before a command has begun anything: an address that is wrong should not take minutes to be found out."""
QUIET = 10.0
"""Seconds of waiting before the user is told."""
LONGEST_PAUSE = 10.0
"""Seconds between two attempts, at most."""

ARROW_ATTEMPTS = 12
"""Of Arrow's client for a request. Its pauses are random, twice as long each time and at most 20 s: with 12 attempts,
they come to about two minutes."""

PART = 64 << 20
"""Bytes from which an object is uploaded in parts, and of a part."""

# Clients that other libraries make (MLflow's) are to be as patient; they read the variables.
os.environ.setdefault("AWS_RETRY_MODE", "standard")
os.environ.setdefault("AWS_MAX_ATTEMPTS", str(ARROW_ATTEMPTS))
if "AWS_REGION" in os.environ:  # which boto3 does not read
    os.environ.setdefault("AWS_DEFAULT_REGION", os.environ["AWS_REGION"])


class Entry(NamedTuple):
    """A file as a listing shows it."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of its last change, in nanoseconds since 1970."""


class ShortReadError(OSError):
    """Fewer bytes, or more, than the object has."""


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; the key of a whole bucket is empty."""
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    return bucket, key


# --- one configuration ----------------------------------------------------------------------------------------------


def client() -> S3Client:
    """boto3's client, as the environment is now."""
    return _client(_environment())


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.lru_cache(maxsize=8)
def _client(environment: tuple[tuple[str, str], ...]) -> S3Client:
    session = boto3.Session(botocore_session=botocore.session.Session())  # which reads the files of AWS anew
    given = dict(environment)
    region = given.get("AWS_REGION") or session.region_name or "us-east-1"
    config = Config(
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        retries={"mode": "standard", "total_max_attempts": 3},
    )
    made = session.client("s3", region_name=region, config=config)
    made.meta.events.register("before-parse.s3", _complete)
    return made


def _complete(operation_model: OperationModel, response_dict: Mapping[str, Any], **_: object) -> None:
    """Refuse an answer that is shorter than it says, which botocore takes: of "no such key" it would leave "404"."""
    body, promised = response_dict["body"], response_dict["headers"].get("content-length")
    if isinstance(body, bytes) and promised and operation_model.http["method"] != "HEAD" and len(body) != int(promised):
        raise ShortReadError(f"{len(body)} bytes of {promised}")


def endpoint() -> str | None:
    """Address of the server where it is not AWS, from the environment or the profile."""
    url = client().meta.endpoint_url
    return None if re.fullmatch(r"s3[.-].*amazonaws\.com(\.cn)?", urlsplit(url).hostname or "") else url


def where() -> str:
    """The server, as its user knows it."""
    return redact(endpoint() or f"AWS in {client().meta.region_name}")


def filesystem() -> pafs.FileSystem:
    """Arrow's file system, by the same endpoint, region and credentials as ``client``."""
    options = endpoint(), client().meta.region_name, os.environ.get("AWS_CA_BUNDLE"), ARROW_ATTEMPTS
    return _filesystem(_environment(), options)


@functools.lru_cache(maxsize=8)
def _filesystem(environment: tuple[tuple[str, str], ...], options: tuple[Any, ...]) -> pafs.FileSystem:
    return ArrowS3(*options)


class ArrowS3(pafs.S3FileSystem):
    """Arrow's file system of one endpoint.

    It travels to another process with its endpoint and its patience, which the class of Arrow forgets, and without
    credentials: those are found where it is used.
    """

    def __init__(self, endpoint: str | None, region: str, ca_bundle: str | None, attempts: int) -> None:
        self._options = (endpoint, region, ca_bundle, attempts)
        options: dict[str, Any] = {}
        if endpoint:
            parts = urlsplit(endpoint)
            options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc + parts.path.rstrip("/")}
        if ca_bundle:
            options["tls_ca_file_path"] = ca_bundle
        super().__init__(
            region=region,
            connect_timeout=10,
            request_timeout=60,
            allow_delayed_open=True,  # a small object is one request instead of three
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
            **options,
        )

    def __reduce__(self) -> tuple[type[ArrowS3], tuple[Any, ...]]:
        return type(self), self._options


# --- patience -------------------------------------------------------------------------------------------------------

_PASSING = {
    "InternalError",
    "NoSuchUpload",  # its end was done and the answer lost: the whole object is written again
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "TooManyRequests",
}
_PASSING_STATUS = {429, 500, 502, 503, 504}
"""Not 501, which a store gives for what it cannot do, nor 507, which it gives when it is full."""
_PASSING_IN_ARROW = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|THROTTLING|NO_?SUCH_?UPLOAD"
    r"|HTTP status (?:429|50[0234])",
    re.IGNORECASE,
)


def patiently(operation: Callable[[], T], seconds: float | None = None, *, quiet: float = QUIET) -> T:
    """What ``operation`` returns, called again with growing random pauses while it fails in a way that passes.

    Args:
        operation: may be called twice, even where the first call did its work.
        seconds: to try for; ``PATIENCE`` when not given.
        quiet: seconds after which the user is told.

    Raises:
        Exception: the last one of ``operation``.
    """
    limit = PATIENCE if seconds is None else seconds
    told = False

    def once() -> T:
        try:
            return operation()
        except HTTPError as error:  # botocore lets it through where the answer to a read is an error and breaks off
            raise ResponseStreamingError(error=error) from error

    def tell(state: RetryCallState) -> None:
        """Tell the user, once, why nothing happens."""
        nonlocal told
        pause = state.next_action.sleep if state.next_action else 0.0
        if told or state.outcome is None or (state.seconds_since_start or 0.0) + pause < quiet:
            return
        told = True
        why = cause(state.outcome.exception())
        print(f"S3 at {where()} fails ({why}). Trying again for up to {limit:.0f} s.", file=sys.stderr, flush=True)

    attempts = Retrying(
        retry=retry_if_exception(passes),
        wait=wait_random_exponential(multiplier=0.2, max=LONGEST_PAUSE),
        stop=stop_after_delay(limit),
        before_sleep=tell,
        reraise=True,
    )
    return attempts(once)


def passes(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, ClientError):
        return code(error) in _PASSING or status(error) in _PASSING_STATUS
    if isinstance(error, SSLError):
        return "CERTIFICATE" not in str(error)
    broken = (HTTPClientError, ConnectionError, IncompleteReadError, FlexibleChecksumError, ShortReadError)
    if isinstance(error, broken):
        return True
    return isinstance(error, OSError) and bool(_PASSING_IN_ARROW.search(str(error)))


def code(error: ClientError) -> str:
    """S3's word for an error: NoSuchKey."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status(error: ClientError) -> int:
    """That of HTTP: 404."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def cause(error: BaseException | None) -> str:
    """An error in a word, without what it quotes."""
    if isinstance(error, ClientError):
        return code(error)
    found = re.search(r"AWS Error (\w+)", str(error))
    return found[1] if found else type(error).__name__


# --- objects --------------------------------------------------------------------------------------------------------


def get(uri: str, size: int | None = None) -> bytes:
    """The object's bytes, all of them.

    Args:
        uri: of the object.
        size: that it must have, where that is known.

    Raises:
        FileNotFoundError: there is no such object.
    """
    bucket, key = split(uri)

    def once() -> bytes:
        answer = client().get_object(Bucket=bucket, Key=key)
        data = answer["Body"].read()
        for wanted in (answer["ContentLength"], size):
            if wanted is not None and len(data) != wanted:
                raise ShortReadError(f"{len(data)} bytes of {wanted}")
        return data

    try:
        return patiently(once)
    except ClientError as error:
        if code(error) == "NoSuchKey":
            raise FileNotFoundError(uri) from None
        raise


def size(uri: str) -> int:
    """Bytes of an object.

    Raises:
        FileNotFoundError: there is no such object.
    """
    bucket, key = split(uri)
    try:
        return patiently(lambda: client().head_object(Bucket=bucket, Key=key))["ContentLength"]
    except ClientError as error:
        if status(error) == 404:
            raise FileNotFoundError(uri) from None
        raise


def chunks(uri: str, length: int) -> Iterator[bytes]:
    """The object's bytes in order, each ``length`` of them asked for alone: what takes hours is sure to break off."""
    bucket, key = split(uri)
    whole = size(uri)

    def once(start: int, stop: int) -> bytes:
        answer = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        data = answer["Body"].read()
        if len(data) != stop - start:
            raise ShortReadError(f"{len(data)} bytes of {stop - start}")
        return data

    for start in range(0, whole, length):
        yield patiently(functools.partial(once, start, min(start + length, whole)))


def put(uri: str, data: bytes | IO[bytes]) -> None:
    """Write an object, from bytes or from a file; it appears when it is complete."""
    bucket, key = split(uri)
    if isinstance(data, bytes):
        patiently(lambda: client().put_object(Bucket=bucket, Key=key, Body=data))
        return
    transfer = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4)

    def once() -> None:
        with open(data.name, "rb") as whole:  # anew, since the transfer closes what it is given
            client().upload_fileobj(whole, bucket, key, Config=transfer)

    data.flush()
    patiently(once)


def exists(uri: str) -> bool:
    """Whether there is such an object, or any below such a prefix."""
    bucket, key = split(uri)
    if not key:
        _page(bucket, "", 1)
        return True
    first = _page(bucket, key, 1).get("Contents", [])
    return any(item["Key"] == key for item in first) or bool(_page(bucket, f"{key}/", 1).get("Contents"))


def walk(uri: str) -> Iterator[tuple[str, Entry]]:
    """Every object below a prefix, by its name relative to it, in the order of the names; one page in memory."""
    bucket, key = split(uri)
    prefix = f"{key}/" if key else ""
    for page in _pages(bucket, prefix):
        for item in page.get("Contents", []):
            name = item["Key"][len(prefix) :]
            if name and not name.endswith("/"):  # a folder's mark
                yield name, Entry(item["Size"], int(item["LastModified"].timestamp() * 1e6) * 1000)


def _pages(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Listing of a prefix, 1,000 objects at a time."""
    token: str | None = None
    while True:
        page = _page(bucket, prefix, token=token)
        yield page
        if not (token := page.get("NextContinuationToken")):
            return


def _page(bucket: str, prefix: str, size: int = 1000, *, token: str | None = None) -> dict[str, Any]:
    options: dict[str, Any] = {"ContinuationToken": token} if token else {}
    list_page: Callable[..., Any] = client().list_objects_v2
    return patiently(lambda: list_page(Bucket=bucket, Prefix=prefix, MaxKeys=size, **options))


def remove(uri: str, *, keep: Collection[str] = ()) -> None:
    """Delete every object below a prefix, folders' marks too, except those whose first component is in ``keep``."""
    bucket, key = split(uri)
    for page in _pages(bucket, f"{key}/" if key else ""):
        names = [item["Key"] for item in page.get("Contents", [])]
        doomed = [name for name in names if name[len(key) :].lstrip("/").split("/")[0] not in keep]
        if doomed:
            _delete(bucket, doomed)


def _delete(bucket: str, keys: list[str]) -> None:
    """At most 1,000 at a time."""
    objects: Any = {"Objects": [{"Key": key} for key in keys], "Quiet": True}

    def once() -> None:
        answer = client().delete_objects(Bucket=bucket, Delete=objects)
        if errors := answer.get("Errors"):  # each object may be throttled on its own
            raise ClientError({"Error": dict(errors[0])}, "DeleteObjects")  # type: ignore[typeddict-item]

    patiently(once)


def delete(uri: str) -> None:
    """Delete an object, which need not exist."""
    bucket, key = split(uri)
    patiently(lambda: client().delete_object(Bucket=bucket, Key=key))
