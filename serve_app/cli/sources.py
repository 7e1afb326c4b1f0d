"""The sources of adapters and bases on this machine, for commands that need no running service.

Owns the way from a Serve file, or from none, to the very repositories and caches that replicas would use. Ray is loaded
only to read a Serve file as Serve reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from serve_app.catalog.catalog import build_sources
from serve_app.catalog.reading.bases import BaseArchitectureReader
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.inspector import AdapterInspector
from serve_app.catalog.reading.repository import HUB, AdapterSource
from serve_app.cli.serve_file import ServeFileInvalid, applications_of
from serve_app.cli.terminal import CommandFailed
from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.demo.embedded import BASES, embedded_root
from serve_app.environment import read_environment
from serve_app.errors import BaseUnusable

DEFAULT_FILE = Path("serve_config.yaml")


@dataclass(frozen=True, slots=True)
class Sources:
    """A configuration, the environment, and the sources that both define."""

    config: AppConfig
    environment: Environment
    adapter_sources: tuple[AdapterSource, ...]

    def base(self, name: str) -> BaseModelConfig:
        """Return the configured base with that id or alias.

        Raises:
            CommandFailed: there is none.
        """
        found = self.config.base(name)
        if found is None:
            served = ", ".join(base.id for base in self.config.bases)
            raise CommandFailed(f"base {name} is not configured; there are {served}", "base_not_served")
        return found

    def inspector(self) -> AdapterInspector:
        """Return an inspector that asks the sources in the service's order."""

        async def card_of(model: str) -> Card | None:
            found = await inspector.find(model, None)
            return found[1].card if found is not None else None

        sources = [one for one in self.adapter_sources if one.origin != "embedded" or self.config.adapters.embedded]
        inspector = AdapterInspector(
            self.config, sources, BaseArchitectureReader(self.adapter_sources, time.monotonic), card_of
        )
        return inspector

    @contextlib.asynccontextmanager
    async def base_configurations(self, base: BaseModelConfig) -> AsyncIterator[Path]:
        """Yield a folder with a base's configuration files; from the Hub, only these are downloaded.

        Raises:
            BaseUnusable: they are missing.
            HubUnavailable, AccessDenied: the Hub does not give them.
        """
        from serve_app.engine.base.structure import INDEX, adaptable_parts

        source = base.source.described_by
        if source.hub is None:
            yield source.folder or embedded_root() / (source.embedded or "")
            return
        hub = next((one for one in self.adapter_sources if one.origin == HUB), None)
        if hub is None:
            raise BaseUnusable(base.id, "it lies on the Hub, which the configuration leaves out")
        with tempfile.TemporaryDirectory(prefix="loraplex-") as name:
            folder = Path(name)
            index = await hub.read_small(source.hub, source.revision, INDEX)
            if index is None:
                raise BaseUnusable(base.id, "its repository holds no pipeline")
            (folder / INDEX).write_bytes(index)
            try:
                parts = adaptable_parts(index.decode())
            except (ValueError, KeyError):
                raise BaseUnusable(base.id, "its pipeline is of no kind that is served") from None
            files = [f"{part}/config.json" for part in parts]
            contents = await asyncio.gather(*(hub.read_small(source.hub, source.revision, file) for file in files))
            for file, content in zip(files, contents, strict=True):
                (folder / file).parent.mkdir()
                (folder / file).write_bytes(content or b"")
            yield folder


def open_sources(path: Path | None) -> Sources:
    """Return the sources of a Serve file's first Loraplex application, or the embedded models and the Hub.

    Raises:
        CommandFailed: the file is not valid.
    """
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    config = _embedded_config() if path is None else _config_of(path)
    environment = read_environment(config)
    adapter_sources = build_sources(config, environment, embedded_root=embedded_root())
    return Sources(config, environment, adapter_sources)


def _config_of(path: Path) -> AppConfig:
    try:
        return applications_of(path)[0]
    except ServeFileInvalid as error:
        more = f" (and {len(error.faults) - 1} more; see: loraplex check {path})" if len(error.faults) > 1 else ""
        raise CommandFailed(f"{path}: {error.faults[0]}{more}", "invalid_config") from None


def _embedded_config() -> AppConfig:
    bases = [{"id": base_id, "source": {"embedded": base_id}} for base_id in BASES]
    return AppConfig.model_validate({"bases": bases, "adapters": {"embedded": True}})
