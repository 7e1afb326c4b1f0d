"""Admission: parses and checks untrusted adapter files in processes of their own.

Owns which file goes to which process, and for how long. A file that hangs or kills its process costs that process
alone, and others wait for it a few seconds at most. Must not parse files itself, nor know how processes are spoken to
(`admission_lane`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app import refusals
from serve_app.engine.adapters.safetensors_file import FilePart
from serve_app.engine.admission.lane import DISK_FULL, AdmissionTooSlow, ChildDied, ChildWorker
from serve_app.engine.base.manifest import BaseManifest
from serve_app.errors import DiskFull
from serve_app.refusals import AdmissionTimedOut, MalformedFile, RefusedAdapter
from serve_app.settings import AdapterLimits

# How long a file may keep others waiting. An ordinary one takes a tenth of this on a slow machine.
PATIENCE_S = 5.0


class AdmissionProcess:
    """Turns adapter files into canonical ones, in one long-lived child and, at times, a second.

    A file that others wait for and that takes longer than `patience_s` is taken from the first child and begun again
    in a second, where only such files wait for each other; there it may take the whole of
    `limits.admission_timeout_s`.

    Invariants: children die with this process, however it dies; after a file that took too long or killed its child,
    the next gets a new one. The first child starts at construction, so that it is warm when the first file comes; the
    second lives for one file at a time.
    """

    def __init__(self, manifest: BaseManifest, limits: AdapterLimits, *, patience_s: float = PATIENCE_S) -> None:
        self._limit_s = limits.admission_timeout_s
        setup = {"manifest": manifest.to_json(), "limits": limits.model_dump(mode="json"), "parent": os.getpid()}
        self._first = ChildWorker(setup, patience_s=min(patience_s, self._limit_s), is_lasting=True)
        self._second = ChildWorker(setup, patience_s=self._limit_s, is_lasting=False)
        self._first.start()

    async def admit(
        self,
        source: Path | Sequence[FilePart],
        name: str,
        target: Path,
        embeddings: Path | None = None,
        settings: str | None = None,
    ) -> None:
        """Check an adapter against the base and write its canonical form to `target`, whole or not at all.

        `source` is its file, or those that are one adapter together, `embeddings` the file with its own words,
        `settings` the text of peft's, where it has them.

        Raises:
            AdmissionTimedOut: the check took longer than `limits.admission_timeout_s`.
            RefusedAdapter: one of its subclasses, as `parse_adapter` raises them.
            DiskFull: the canonical form found no room.
        """
        files = (FilePart(source),) if isinstance(source, Path) else source
        sources = [(str(part.path), part.component) for part in files]
        request: dict[str, Any] = {"sources": sources, "name": name, "target": str(target)}
        if embeddings is not None:
            request["embeddings"] = str(embeddings)
        if settings is not None:
            request["settings"] = settings
        try:
            try:
                answer = await self._ask(self._first, request)
            except AdmissionTooSlow:
                answer = await self._ask(self._second, request)
        except TimeoutError:
            raise AdmissionTimedOut(name, f"checking its file took longer than {self._limit_s:g} s") from None
        except ChildDied:
            raise MalformedFile(name, "its file could not be read: the process that read it died") from None
        if answer.get("error") == DISK_FULL:
            raise DiskFull(name)
        if answer != {}:
            raise _refusal(answer, name)

    @property
    def pid(self) -> int | None:
        """The first child's process id; None between children."""
        return self._first.pid

    @property
    def reading(self) -> str | None:
        """The adapter whose file the first child has been given and not yet answered for."""
        return self._first.reading

    def close(self) -> None:
        """End the children, even while they read files."""
        for lane in (self._first, self._second):
            lane.close()

    async def _ask(self, lane: ChildWorker, request: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.wrap_future(lane.ask(request, self._limit_s))


def _refusal(answer: dict[str, Any], name: str) -> RefusedAdapter:
    """Rebuild the child's error; only refusals are, by name, and only from text."""
    kind = getattr(refusals, str(answer.get("error")), None)
    if isinstance(kind, type) and issubclass(kind, RefusedAdapter):
        return kind(name, str(answer.get("reason")))
    return MalformedFile(name, "its file could not be read")
