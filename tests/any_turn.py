"""A choice of whose turn it is that no policy would make: by chance, so that runs are set aside at random steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from serve_app.engine.worker.turns import Claim, SharingPolicy


class AnyTurn:
    """Gives the next step to any run or request by chance."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.asked = self.most_begun = 0

    def __call__(self, claims: Sequence[Claim], *, policy: SharingPolicy, **_: Any) -> Claim | None:
        begun = [claim for claim in claims if claim.is_begun]
        self.asked += 1
        self.most_begun = max(self.most_begun, len(begun))
        able = begun if len(begun) >= policy.max_in_progress else claims
        return self._rng.choice(able) if able else None
