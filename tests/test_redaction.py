"""What is shown or kept holds no secret, and is not mutilated where it holds none."""

from __future__ import annotations

import pytest

from pipelines import redaction, secrets

WITH = {
    "https://me:pw@host/x": "https://host/x",
    "https://ghp_token@host/x": "https://host/x",
    "http://:pw@host": "http://host",
    "http://u:p@ss@host:80/x": "http://host:80/x",
    "http://u:pw@host:80/x@y?mail=a@b": "http://host:80/x@y?mail=a@b",
    "postgresql+psycopg2://u:pa/ss@host/db": "postgresql+psycopg2://host/db",
    "http://u:p?s#s@host": "http://host",
    "mongodb://u:pw@one:27017,two:27017/?authSource=admin": "mongodb://one:27017,two:27017/?authSource=admin",
    "nobody at http://u:pw@host, nor a@b": "nobody at http://host, nor a@b",
    "https://host/x?X-Amz-Signature=abc&y=1": "https://host/x?X-Amz-Signature=...&y=1",
    "it knows AKIAABCDEFGHIJKLMNOP": "it knows ...",
}
WITHOUT = (
    "s3://bucket/a@b",
    "s3://bucket/a:b@c",
    "file:///a:b@c",
    "https://host/path@x",
    "https://host?mail=a@b",
    "http://host:5000/#/experiments/1@x",
    "http://[::1]:5000/a@b",
    "mongodb://one:27017,two:27017/?mail=a@b",
    "http://host:5000 and a@b",
    "/data/a@b",
)


@pytest.mark.parametrize("text", WITH)
def test_a_secret_is_found_by_its_form(text: str) -> None:
    assert redaction.redact(text) == WITH[text]
    assert redaction.holds_secret(text)
    assert not redaction.holds_secret(WITH[text].replace("...", ""))


@pytest.mark.parametrize("text", WITHOUT)
def test_what_holds_none_stays(text: str) -> None:
    assert redaction.redact(text) == text
    assert not redaction.holds_secret(text)


def test_the_secrets_of_a_job_are_known_by_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "hunter2")
    monkeypatch.setenv("TWO", "hunter2hunter3")
    monkeypatch.setenv("TINY", "abc")
    assert redaction.redact("hunter2 hunter2hunter3") == "hunter2 hunter2hunter3"
    monkeypatch.setenv(secrets.NAMES, "ONE,TWO,TINY,ABSENT")
    assert redaction.redact("hunter2 hunter2hunter3 abc") == "... ... abc"


def test_a_users_name_is_not_cut_out_of_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "boxinst")  # as in compose.yaml
    assert redaction.redact("s3://boxinst/masks") == "s3://boxinst/masks"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "0123456789abcdef0123456789abcdef")
    assert redaction.redact("unknown key 0123456789abcdef0123456789abcdef") == "unknown key ..."
