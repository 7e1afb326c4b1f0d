"""What the HTTP layer asks of the service behind it.

Owns the interface alone; `serve_app.deployments` implements it, tests give it a fake.
"""

from __future__ import annotations

from typing import Protocol

from serve_app.core import GenerationDraft, GenerationResult, ModelInfo


class Gateway(Protocol):
    """The service behind the HTTP layer; a cancelled call must free whatever it held."""

    async def generate(self, draft: GenerationDraft, *, request_id: str) -> GenerationResult:
        """Return the images of a draft.

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
