"""What looks like a token or key in a text: to be cut down before anybody reads it, to be refused as a name."""

from __future__ import annotations

import re

# A token of the Hub, a key of ours or one of the shape that OpenAI's clients use, wherever a caller may have put it.
_CREDENTIAL = re.compile(r"\b(hf_|sk-|lpx_)[A-Za-z0-9_-]{15,}")


def redact_secrets(text: str) -> str:
    """Return a text in which whatever looks like a token or key is cut down to its first letters."""
    return _CREDENTIAL.sub(r"\1***", text)


def contains_secret(text: str) -> bool:
    """Whether anything in a text looks like a token or key."""
    return _CREDENTIAL.search(text) is not None
