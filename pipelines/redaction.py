"""Text without secrets, for whatever is shown or kept: addresses without passwords, requests without signatures."""

from __future__ import annotations

import os
import re

_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_PATTERNS = (
    (re.compile(r"(\w+://)[^/@\s]+@"), r"\1"),
    (re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s]+"), r"\1..."),
    (re.compile(r"((?<![-\w])(?:Credential|Signature)=)[^,\s]+"), r"\1..."),
    (re.compile(r"(<(?:AWSAccessKeyId|SignatureProvided|StringToSign)>)[^<]*"), r"\1..."),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "..."),  # an access key's form, wherever it came from
)


def redact(text: str) -> str:
    """``text`` without passwords in addresses, signatures, access keys and the AWS credentials of the environment."""
    for pattern, kept in _PATTERNS:
        text = pattern.sub(kept, text)
    for name in _VARIABLES:
        secret = os.environ.get(name)
        if secret and len(secret) > 3:
            text = text.replace(secret, "...")
    return text
