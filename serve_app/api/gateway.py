"""What the HTTP layer asks of the service behind it.

Owns the interface alone; `serve_app.deployments` implements it, tests give it a fake.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from serve_app.core import GenerationDraft, GenerationEvent, GenerationResult, ModelInfo


class Gateway(Protocol):
    """The service behind the HTTP layer; a call that is cancelled, or closed early, must free whatever it held."""

    async def generate(self, draft: GenerationDraft, *, request_id: str) -> GenerationResult:
        """Return the images of a draft.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        ...

    def stream(self, draft: GenerationDraft, *, request_id: str) -> AsyncGenerator[GenerationEvent]:
        """Yield what becomes of a draft: first `Accepted`, soon after all that can be checked early has been, last
        the result.

        Raises:
            LoraplexError: any refusal or failure of the tree in `serve_app.errors`.
        """
        ...

    async def is_ready(self) -> bool:
        """Whether any base can serve now; answered in milliseconds."""
        ...

    async def models(self) -> tuple[ModelInfo, ...]:
        """Return the bases that are served and the adapters known so far."""
        ...
