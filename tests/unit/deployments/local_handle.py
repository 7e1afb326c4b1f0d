"""A Serve handle to an object of this process."""

from __future__ import annotations

import asyncio
from typing import Any


class LocalHandle:
    """Calls the object's coroutines as Serve would: at once, whether or not the response is awaited."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._target, name))


class _Method:
    def __init__(self, call: Any) -> None:
        self._call = call

    def remote(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._call(*args, **kwargs))
