"""What a request says about its place in the queue: who waits for it, and until when.

Owns the header of the priority. Must not know how the queue is ordered.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import get_args

from starlette.requests import Request

from serve_app.api.http.openapi_responses import header_parameter
from serve_app.api.http.validation import clip
from serve_app.api.http.waiting import Deadline
from serve_app.core import Due, GenerationDraft, Priority
from serve_app.errors import OutOfBounds

PRIORITY_HEADER = "x-priority"
_PRIORITIES: tuple[Priority, ...] = get_args(Priority)
PRIORITY_PARAMETER = header_parameter(
    PRIORITY_HEADER,
    "'batch' lets interactive requests go first, within a bound; 'interactive' where it is absent",
    type="string",
    enum=list(_PRIORITIES),
)


def priority_of(request: Request) -> Priority:
    """Return the priority that a request asks for.

    Raises:
        OutOfBounds: there is no such priority.
    """
    asked = request.headers.get(PRIORITY_HEADER, "").strip() or "interactive"
    for known in _PRIORITIES:
        if asked == known:
            return known
    raise OutOfBounds(PRIORITY_HEADER, clip(asked), " or ".join(_PRIORITIES))


def for_queue(draft: GenerationDraft, *, priority: Priority, deadline: Deadline) -> GenerationDraft:
    """Return the draft with its place in the queue; its deadline is put in the time that all nodes share."""
    return replace(draft, priority=priority, due=Due(at=time.time() + deadline.left_s, limit_s=deadline.limit_s))
