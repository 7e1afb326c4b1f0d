"""What a replica's log holds.

Owns the levels, and that no line holds a credential. Serve itself adds the request id, the replica and the time to
every line.
"""

from __future__ import annotations

import logging
import traceback

from serve_app.redaction import redact_secrets

# What Serve adds to each record and callers choose: the path, and the request's id.
CALLERS_OWN = ("route", "request_id")


class NoCredentials(logging.Filter):
    """Cuts tokens and keys down wherever they stand in a record: callers put them into paths and names too."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a record in place, and let it through."""
        record.msg, record.args = redact_secrets(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact_secrets("".join(traceback.format_exception(*record.exc_info)).rstrip())
            record.exc_info = None
        for name in CALLERS_OWN:
            if isinstance(value := getattr(record, name, None), str):
                setattr(record, name, redact_secrets(value))
        return True


def set_up_logging(level: str) -> None:
    """Log ours at `level`, and keep what may quote signed addresses or prompts out of the log."""
    ours = logging.getLogger("serve_app")
    ours.setLevel(level)
    # Serve's handlers know the request; a logger outside `ray.serve` has none and would lose everything below WARNING.
    ours.handlers = list(logging.getLogger("ray.serve").handlers)
    ours.propagate = False
    keep_credentials_out()
    for talkative in ("huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(talkative).setLevel(logging.ERROR)


def keep_credentials_out() -> None:
    """Have no credential in any line that Serve's loggers write in this process, its access log included."""
    for handler in logging.getLogger("ray.serve").handlers:
        if not any(isinstance(known, NoCredentials) for known in handler.filters):
            handler.addFilter(NoCredentials())
