"""Text without secrets, for whatever is shown or kept: addresses without passwords, requests without signatures."""

from __future__ import annotations

import os
import re

from pipelines import secrets

_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_LEAST = {"AWS_ACCESS_KEY_ID": 16}  # a shorter one is a name, such as minio, which other words hold too
# Who calls stands before the last @ ahead of the first slash. Only a password may bring a slash with it: a colon comes
# first then, and no port behind that. In s3://bucket/a@b and http://host:80/a@b the @ is the path's.
_PATTERNS = (
    (re.compile(r"(\w+://)(?:[^/?#\s]+|(?!\[)[^/?#@:\s]*:(?!\d+[,/\"'])\S*)@"), r"\1"),
    (re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s]+"), r"\1..."),
    (re.compile(r"((?<![-\w])(?:Credential|Signature)=)[^,\s]+"), r"\1..."),
    (re.compile(r"(<(?:AWSAccessKeyId|SignatureProvided|StringToSign)>)[^<]*"), r"\1..."),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "..."),  # an access key's form, wherever it came from
)


def redact(text: str) -> str:
    """``text`` without what ``holds_secret`` finds, the environment's AWS credentials, and the secrets of a job."""
    for pattern, kept in _PATTERNS:
        text = pattern.sub(kept, text)
    names = {*_VARIABLES, *os.environ.get(secrets.NAMES, "").split(",")}
    # The longest first: of one that is the beginning of another, the rest would stay.
    values = {name: os.environ.get(name, "") for name in names}
    found = (value for name, value in values.items() if len(value) >= _LEAST.get(name, 4))
    for secret in sorted(found, key=len, reverse=True):
        text = text.replace(secret, "...")
    return text


def holds_secret(text: str) -> bool:
    """Whether there are passwords in addresses, signatures or access keys, by their form."""
    return any(pattern.search(text) for pattern, _ in _PATTERNS)
