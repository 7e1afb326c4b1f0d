"""Runs that can be suspended in the middle of a pipeline call: each in a greenlet of the device thread.

Owns the greenlets. Everything stays in one thread, so that there is one set of handles and thread-local state, and
nothing to lock. Must not know what a run is or whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from greenlet import getcurrent, greenlet

Run = TypeVar("Run")
Outcome = TypeVar("Outcome")


class RunGreenlets(Generic[Run, Outcome]):
    """The runs of one thread that have begun and not ended; for that thread alone."""

    def __init__(self, work: Callable[[Run], Outcome]) -> None:
        """`work` draws a run, and calls `suspend` where it gives the device back."""
        self._work = work
        self._begun: dict[Run, Any] = {}

    @property
    def suspended(self) -> tuple[Run, ...]:
        """The runs that stand still; not to be asked by one of them."""
        return tuple(self._begun)

    def go_on(self, run: Run) -> Outcome | None:
        """Begin a run, or have it go on; return what came of it, or None where it was suspended."""
        body = self._begun.setdefault(run, greenlet(self._work))
        try:
            outcome = body.switch(run)
        finally:
            if body.dead:
                del self._begun[run]
        return outcome if body.dead else None

    def suspend(self) -> None:
        """Let the thread do other things until the run that calls this is to go on."""
        thread = getcurrent().parent
        assert thread is not None
        thread.switch()
