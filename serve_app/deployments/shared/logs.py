"""The contents of a replica's log.

Owns the levels, that no line holds a credential, and that nothing a caller sends starts a line. Serve itself adds the
request id, the replica and the time to every line.
"""

from __future__ import annotations

import logging
import re
import traceback

from serve_app.redaction import redact_secrets

# Fields that Serve adds to each record and callers choose: the path, and the request's id.
CALLERS_OWN = ("route", "request_id")

# Characters that end a line, move a terminal's cursor or turn its direction of writing.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class SafeLines(logging.Filter):
    """Makes each record safe to read, no matter what callers put into paths and names.

    Tokens and keys are cut down. Line ends, escapes and other control characters are written as their codes, so that a
    record is one line; the lines of a traceback are indented, as its message may quote a caller.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a record in place, and let it through."""
        record.msg, record.args = _safe(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            lines = "".join(traceback.format_exception(*record.exc_info)).rstrip().split("\n")
            record.exc_text = "\n".join(f"  {_safe(line)}" for line in lines)
            record.exc_info = None
        for name in CALLERS_OWN:
            if isinstance(value := getattr(record, name, None), str):
                setattr(record, name, _safe(value))
        return True


def _safe(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", redact_secrets(text))


def set_up_logging(level: str) -> None:
    """Log ours at `level`, and keep what may quote signed addresses or prompts out of the log."""
    ours = logging.getLogger("serve_app")
    ours.setLevel(level)
    # Serve's handlers know the request; a logger outside `ray.serve` has none and would lose everything below WARNING.
    ours.handlers = list(logging.getLogger("ray.serve").handlers)
    ours.propagate = False
    keep_lines_safe()
    for talkative in ("huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(talkative).setLevel(logging.ERROR)


def keep_lines_safe() -> None:
    """Have every line that Serve's loggers write in this process safe to read, its access log included."""
    for handler in logging.getLogger("ray.serve").handlers:
        if not any(isinstance(known, SafeLines) for known in handler.filters):
            handler.addFilter(SafeLines())
