"""What is wrong with storage, in words: the server, the bucket, the keys, the region or the clock, and what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from botocore.parsers import ResponseParserError

from boxinst.errors import InputError
from pipelines import s3
from pipelines.redaction import redact

_NO_BUCKET = {"NoSuchBucket", "404"}
_OTHER_REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301", "307"}
_KEYS = {
    "InvalidAccessKeyId": "does not know the access key",
    "SignatureDoesNotMatch": "finds that the secret key does not belong to the access key",
    "ExpiredToken": "finds that the session token has expired",
    "TokenRefreshRequired": "finds that the session token has expired",
    "InvalidToken": "does not accept the session token",
}
_KEYS_REMEDY = (
    "Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, where there is one), or the profile."
)


def check(*uris: str, seconds: float | None = None) -> None:
    """Make sure that the buckets of ``uris`` are there and let us in, through boto3 and through Arrow.

    Args:
        uris: what is not on S3 is passed over.
        seconds: to wait for a server that does not answer; ``s3.PATIENCE_AT_START`` when not given.

    Raises:
        InputError: no such bucket, refused, another region, a wrong clock, wrong keys, or nobody answers.
    """
    limit = s3.PATIENCE_AT_START if seconds is None else seconds
    for bucket in dict.fromkeys(s3.split(uri)[0] for uri in uris if uri.startswith("s3://")):
        region = None
        try:
            answer = s3.patiently(lambda: s3.client().list_objects_v2(Bucket=bucket, MaxKeys=1), limit, quiet=0)  # noqa: B023
            if not answer.keys() & {"Name", "KeyCount", "MaxKeys", "IsTruncated"}:
                raise _not_s3(f"s3://{bucket}")
            region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
            s3.filesystem().get_file_info(bucket)
        except InputError:
            raise
        except (BotoCoreError, ClientError, ResponseParserError, ValueError) as error:
            raise explain(f"s3://{bucket}", error) from error
        except OSError as error:  # Arrow's: boto3 finds the region of a bucket by itself
            if region and region != s3.client().meta.region_name:
                raise _other_region(f"s3://{bucket}", region) from error
            raise _unknown(f"s3://{bucket}", error) from error


def explain(uri: str, error: Exception) -> InputError:
    """What to say of a failure at ``uri``; S3 is asked where the error itself does not tell.

    S3's own messages are left out: some quote the access key.
    """
    try:
        item, where = f"s3://{s3.split(uri)[0]}", s3.where()
    except ProfileNotFound:
        name = os.environ.get("AWS_PROFILE", "default")
        return InputError("AWS_PROFILE", name, "Name a profile of ~/.aws/config, or unset it.")
    if isinstance(error, ClientError):
        return _refusal(item, where, error)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return InputError(item, "no credentials", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.")
    if isinstance(error, SSLError):
        remedy = "Set AWS_CA_BUNDLE to the file of its certificates, or correct http or https in AWS_ENDPOINT_URL."
        return InputError(item, f"no trusted connection to {where}", remedy)
    if isinstance(error, ConnectionError):
        remedy = "Start it, or correct AWS_ENDPOINT_URL. The same command then goes on."
        return InputError(item, f"nobody answers at {where}", remedy)
    if isinstance(error, HTTPClientError | IncompleteReadError | s3.ShortReadError | FlexibleChecksumError):
        remedy = "Look after the server and the network. The same command then goes on."
        return InputError(item, f"{where} keeps breaking off ({s3.cause(error)})", remedy)
    if isinstance(error, ResponseParserError):
        return _not_s3(item)
    if isinstance(error, OSError):
        try:
            check(uri, seconds=0)
        except InputError as found:
            return found
    return _unknown(uri, error)


def _refusal(item: str, where: str, error: ClientError) -> InputError:
    code = s3.code(error)
    said: Mapping[str, Any] = error.response.get("Error", {})
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if code in _NO_BUCKET:
        return InputError(item, f"no such bucket at {where}", "Correct the name or create it.")
    region = headers.get("x-amz-bucket-region") or said.get("Region")
    if code in _OTHER_REGION and region:
        return _other_region(item, region)
    if code == "RequestTimeTooSkewed":
        here = said.get("RequestTime") or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        there = said.get("ServerTime") or headers.get("date", "another time")
        return InputError(item, f"this machine's clock says {here}, that of {where} {there}", "Set the clock (NTP).")
    if code in _KEYS:
        return InputError(item, f"{where} {_KEYS[code]} ({code})", _KEYS_REMEDY)
    if s3.passes(error):
        remedy = "Wait until it is well, or ask less of it at once. The same command then goes on."
        if code.isdigit():  # S3 itself gives errors a name
            remedy = "Wait until it is well, or correct AWS_ENDPOINT_URL: perhaps what answers there does not speak S3."
        return InputError(item, f"{where} keeps failing ({code})", remedy)
    if s3.status(error) == 507:
        return InputError(item, f"{where} has no room left ({code})", "Make room there. The same command then goes on.")
    if s3.status(error) >= 500:
        remedy = "Update that server, or use another. The same command then goes on."
        return InputError(item, f"{where} cannot do what it is asked for ({code})", remedy)
    remedy = "Correct AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the rights of that user on the bucket."
    return InputError(item, f"refused by {where} ({code})", remedy)


def _other_region(item: str, region: str) -> InputError:
    value = f"it is in the region {region}, and was asked for in {s3.client().meta.region_name}"
    return InputError(item, value, f"Set AWS_REGION={region}.")


def _not_s3(item: str) -> InputError:
    return InputError(item, f"{s3.where()} does not speak S3", "Correct AWS_ENDPOINT_URL.")


def _unknown(uri: str, error: Exception) -> InputError:
    return InputError(redact(uri), redact(str(error)), "Correct the AWS_ variables or the address.")
