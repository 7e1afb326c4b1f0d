"""A request that is sent a second time: what the proxy says of its first.

Owns the headers between the proxy and the application, which no caller may set: `deployments.proxy` takes them away.
"""

from __future__ import annotations

import math
from dataclasses import replace

from starlette.requests import Request

from serve_app.core import GenerationDraft

# How long ago the request came.
AGE_HEADER = "x-request-age-s"
# The seed that its stream had told before it broke off.
SEED_HEADER = "x-request-seed"
PROXY_HEADERS = (AGE_HEADER, SEED_HEADER)


def age_of(request: Request) -> float:
    """Return how many seconds ago a request came for the first time; 0 for one that is sent once."""
    try:
        age_s = float(request.headers.get(AGE_HEADER, 0))
    except ValueError:
        return 0.0
    return age_s if 0 < age_s < math.inf else 0.0


def with_its_seed(draft: GenerationDraft, request: Request) -> GenerationDraft:
    """Return the draft with the seed that it had when it was sent before, if it was and had one."""
    seed = request.headers.get(SEED_HEADER, "")
    return replace(draft, seed=int(seed)) if seed.isdecimal() else draft
