"""Detection and redaction of tokens and keys in texts."""

from __future__ import annotations

import re

# A Hub token, one of our keys, or a key of the form that OpenAI's clients use.
_CREDENTIAL = re.compile(r"\b(hf_|sk-|lpx_)[A-Za-z0-9_-]{15,}")


def redact_secrets(text: str) -> str:
    """Return a text with everything that looks like a token or key cut to its prefix."""
    return _CREDENTIAL.sub(r"\1***", text)


def contains_secret(text: str) -> bool:
    """Whether anything in a text looks like a token or key."""
    return _CREDENTIAL.search(text) is not None
