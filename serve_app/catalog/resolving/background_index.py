"""Slow look-ups of listed entries, made in the background, while lists show the results so far.

Knows nothing of adapters: ids and marks in, look-ups out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

from serve_app.catalog.reading.repository import AdapterSource
from serve_app.errors import LoraplexError

log = logging.getLogger(__name__)


class BackgroundIndex:
    """The ids of some sources and their marks; one whose mark is new is looked up again.

    Invariant: at most one pass over the sources runs at a time, with as many look-ups at once as the source says.
    """

    def __init__(self, sources: Sequence[AdapterSource], look_up: Callable[[str], Awaitable[object]]) -> None:
        self._sources = sources
        self._look_up = look_up
        self._listed: dict[str, Mapping[str, str]] = {}
        self._seen: dict[str, str] = {}
        self._pass: asyncio.Task[None] | None = None

    async def refresh(self, wait_s: float | None) -> None:
        """Begin a pass if none runs, and wait for its end, at most so long; None waits until it ends."""
        if self._pass is None or self._pass.done():
            self._pass = asyncio.get_running_loop().create_task(self._run())
            self._pass.add_done_callback(_log_failure)
        await asyncio.wait({self._pass}, timeout=wait_s)

    @property
    def ids(self) -> Collection[str]:
        """The ids that were there when the sources were last asked."""
        return {model for marks in self._listed.values() for model in marks}

    def is_gone(self, origin: str, model: str) -> bool:
        """Say whether an id of a source was no longer there when it was last asked."""
        marks = self._listed.get(origin)
        return marks is not None and model not in marks

    async def _run(self) -> None:
        for source in self._sources:
            try:
                marks = await source.marks()
                if marks or source.origin in self._listed:
                    self._listed[source.origin] = marks
            except LoraplexError as error:
                log.warning("the adapters of a %s are listed as last seen: %s", source.origin, error)
        found: dict[str, str] = {}
        for marks in self._listed.values():
            found |= marks
        self._seen = {model: mark for model, mark in self._seen.items() if model in found}
        for source in self._sources:
            marks = self._listed.get(source.origin, {})
            new = iter([(model, found[model]) for model in sorted(marks) if self._seen.get(model) != found[model]])
            async with asyncio.TaskGroup() as group:
                for _ in range(source.look_ups_at_once):
                    group.create_task(self._look_up_each(new))

    async def _look_up_each(self, new: Iterable[tuple[str, str]]) -> None:
        """Look up what comes next until nothing is left; several may share `new`."""
        for model, mark in new:
            await self._look_up_once(model)
            self._seen[model] = mark

    async def _look_up_once(self, model: str) -> None:
        try:
            await self._look_up(model)
        except LoraplexError as error:
            log.info("%s is not listed: %s", model, error)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a pass over the listed adapters failed on our side", exc_info=error)
