"""A base's pipeline of which a test replaces a part."""

from __future__ import annotations

from typing import Any

# While a file of this name lies in the service's cache folder, doubles that can be held make no step.
HOLD = "hold"


class WrappedPipeline:
    """Everything of a pipeline; a double of it defines what is to be another."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)
