"""What is said when storage fails: each cause by its name, with the remedy, and never a credential."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from botocore.exceptions import EndpointConnectionError
from fault_proxy import FaultProxy, Request

from boxinst.errors import InputError
from pipelines import diagnosis, s3, storage

EMPTY = b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"


def fails(status: int, code: str, more: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """S3's answer of an error, which may quote the access key."""
    said = f"<Code>{code}</Code><Message>of testing-key</Message><AWSAccessKeyId>testing-key</AWSAccessKeyId>{more}"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, sent, f"<Error>{said}</Error>".encode()


@pytest.fixture
def proxy(s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy of this test's own, with nobody behind it, for whoever asks once."""
    monkeypatch.setattr(s3, "PATIENCE_AT_START", 0.0)
    with FaultProxy("http://127.0.0.1:9") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


SKEW = "<RequestTime>20240101T000000Z</RequestTime><ServerTime>2024-01-01T02:00:00Z</ServerTime>"
ANSWERS = [
    (fails(404, "NoSuchBucket"), r"no such bucket at http://127\S+\. Correct the name or create it"),
    (fails(403, "AccessDenied"), r"refused by http://127\S+ \(AccessDenied\)\. Correct .* rights of that user"),
    (fails(403, "InvalidAccessKeyId"), r"does not know the access key .*\. Correct AWS_ACCESS_KEY_ID"),
    (fails(403, "SignatureDoesNotMatch"), r"the secret key does not belong to the access key .*\. Correct AWS_ACCESS"),
    (fails(400, "ExpiredToken"), r"the session token has expired .*AWS_SESSION_TOKEN"),
    (
        fails(403, "RequestTimeTooSkewed", SKEW),
        r"clock says 20240101T000000Z, that of http\S+ 2024-01-01T02:00:00Z\.",
    ),
    (
        fails(403, "RequestTimeTooSkewed", date="Mon, 01 Jan 2024 02:00:00 GMT"),
        rf"clock says {datetime.now(UTC).year}-.*, that of http\S+ Mon, 01 Jan 2024 02:00:00 GMT\. Set the clock",
    ),
    (
        fails(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1"),
        r"it is in the region eu-west-1, and was asked for in us-east-1\. Set AWS_REGION=eu-west-1",
    ),
    (
        fails(400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>"),
        r"it is in the region eu-west-1, and was asked for in us-east-1\. Set AWS_REGION=eu-west-1",
    ),
    (fails(503, "SlowDown"), r"http://127\S+ keeps failing \(SlowDown\)\. Wait"),
    ((200, {}, b"<html>Welcome to nginx!</html>"), r"does not speak S3\. Correct AWS_ENDPOINT_URL"),
    ((200, {}, b"Welcome!"), r"correct AWS_ENDPOINT_URL: perhaps what answers there does not speak S3"),
]


@pytest.mark.parametrize(("answer", "message"), ANSWERS, ids=lambda value: "" if isinstance(value, str) else None)
def test_a_bucket_that_cannot_be_used_says_why(
    proxy: FaultProxy, answer: tuple[int, dict[str, str], bytes], message: str
) -> None:
    with proxy.answering(lambda _: answer), pytest.raises(InputError) as caught:
        storage.check("/local", None, "s3://lab/data/shards", "s3://lab/masks")
    assert re.search(f"^s3://lab: .*{message}", str(caught.value)), caught.value
    assert "testing-key" not in str(caught.value)


def test_arrow_does_not_follow_to_another_region_as_boto3_does(proxy: FaultProxy) -> None:
    def answer(request: Request) -> tuple[int, dict[str, str], bytes]:
        if b"/eu-west-1/s3/" in request.head:
            return 200, {"x-amz-bucket-region": "eu-west-1"}, EMPTY
        return fails(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1")

    with proxy.answering(answer), pytest.raises(InputError, match=r"s3://lab: it is in the region eu-west-1, and was"):
        storage.check("s3://lab/data")


def test_a_bucket_that_lets_us_in(proxy: FaultProxy) -> None:
    with proxy.answering(lambda _: (200, {"x-amz-bucket-region": "us-east-1"}, EMPTY)):
        storage.check("s3://lab/data", "s3://lab/other", "s3://second/data")
    assert proxy.asked["ListObjectsV2"] == 2, "each bucket is asked once"


def test_a_profile_that_is_not_there(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(InputError, match=r"AWS_PROFILE: lab\. Name a profile of ~/.aws/config, or unset it"):
        storage.check("s3://lab/data")


def test_the_user_is_told_why_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "http://user:hunter2@127.0.0.1:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    calls: list[int] = []

    def operation() -> None:
        calls.append(1)
        raise EndpointConnectionError(endpoint_url=address)

    with pytest.raises(EndpointConnectionError):
        s3.patiently(operation, 1.0, quiet=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "S3 at http://127.0.0.1:9 fails (EndpointConnectionError). Trying again for up to 1 s."
    assert len(calls) > 2
    answer = diagnosis.explain("s3://lab/data", EndpointConnectionError(endpoint_url=address))
    assert str(answer).startswith(
        "s3://lab: nobody answers at http://127.0.0.1:9. Start it, or correct AWS_ENDPOINT_URL"
    )
