"""What a replica's log holds.

Owns the levels. Serve itself adds the request id, the replica and the time to every line.
"""

from __future__ import annotations

import logging


def set_up_logging(level: str) -> None:
    """Log ours at `level`, and keep what may quote signed addresses or prompts out of the log."""
    ours = logging.getLogger("serve_app")
    ours.setLevel(level)
    # Serve's handlers know the request; a logger outside `ray.serve` has none and would lose everything below WARNING.
    ours.handlers = list(logging.getLogger("ray.serve").handlers)
    ours.propagate = False
    for talkative in ("huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
