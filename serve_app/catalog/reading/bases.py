"""The configured bases as the catalog sees them: their names, and the widths an adapter must fit.

Owns which names mean which base, and the reading of a base's own configuration files, wherever it lies.
Facts are best effort: an unknown fact contradicts nothing, and the engine checks every layer of a file
against the loaded base.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from serve_app.catalog.reading.blocking import run_blocking
from serve_app.catalog.reading.repository import EMBEDDED, HUB, AdapterSource
from serve_app.config import BaseModelConfig
from serve_app.errors import LoraplexError
from serve_app.families.config_files import CARD
from serve_app.families.family import Family
from serve_app.families.structure import UNET_FAMILIES, transformer_shape
from serve_app.families.table import family_of

log = logging.getLogger(__name__)

RETRY_S = 30.0
# The first request to a base waits so long for its family; a replica checks what the ingress does not know.
FAMILY_WAIT_S = 1.0
MAX_CONFIG_BYTES = 1024 * 1024

# Repositories that the Hub moved: cards still carry the old names.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}


@dataclass(frozen=True, slots=True)
class BaseArchitecture:
    """The known structure of one base: None and empty where it is not known.

    `denoiser` is "unet" or "transformer"; `text_width` the width of the text features that its
    cross-attention takes; `hidden_widths` the widths of its blocks; `depths` how many blocks of each kind a
    transformer has.
    """

    id: str
    family: str | None = None
    denoiser: str | None = None
    text_width: int | None = None
    hidden_widths: frozenset[int] = field(default=frozenset())
    depths: tuple[tuple[str, int], ...] = ()
    row: Family | None = None


class BaseNames:
    """Every name by which a card may mean a configured base; letter case does not count."""

    def __init__(self, bases: Sequence[BaseModelConfig]) -> None:
        self._ids: dict[str, list[str]] = {}
        for base in bases:
            for name in (*base.names, base.source.hub, base.source.embedded):
                if name is not None:
                    self._ids.setdefault(_canonical(name), []).append(base.id)

    def served_as(self, name: str) -> tuple[str, ...]:
        """Return the ids of the bases that a name means: none, or in the order of configuration."""
        return tuple(dict.fromkeys(self._ids.get(_canonical(name), ())))


def _canonical(name: str) -> str:
    lowered = name.casefold()
    return MOVED.get(lowered, lowered)


class BaseArchitectureReader:
    """Reads each base's facts once; a base whose files cannot be read is tried again after a while."""

    def __init__(self, repositories: Sequence[AdapterSource], clock: Callable[[], float]) -> None:
        self._sources = {source.origin: source for source in repositories}
        self._clock = clock
        self._known: dict[str, BaseArchitecture] = {}
        self._retry_at: dict[str, float] = {}

    async def facts(self, base: BaseModelConfig) -> BaseArchitecture:
        """Return what is known of a base; never fails."""
        known = self._known.get(base.id)
        if known is not None:
            return known
        if self._clock() < self._retry_at.get(base.id, float("-inf")):
            return BaseArchitecture(base.id)
        try:
            facts = await self._read(base)
        except (LoraplexError, OSError, ValueError) as error:
            log.warning("the structure of base %s is not known yet: %s", base.id, type(error).__name__)
            self._retry_at[base.id] = self._clock() + RETRY_S
            return BaseArchitecture(base.id)
        self._known[base.id] = facts
        return facts

    async def _read(self, base: BaseModelConfig) -> BaseArchitecture:
        for denoiser in ("unet", "transformer"):
            content = await self._file(base, f"{denoiser}/config.json")
            if content is not None:
                index = await self._file(base, "model_index.json")
                config, entries = _table(content), _table(index or b"{}")
                facts = facts_from(base.id, denoiser, config, entries)
                pipeline = entries.get("_class_name")
                if not isinstance(pipeline, str):
                    return facts
                card = (await self._file(base, CARD) or b"").decode("utf-8", errors="replace")
                return replace(facts, row=family_of(pipeline, entries, config, card))
        raise ValueError("it has neither a unet nor a transformer")

    async def _file(self, base: BaseModelConfig, name: str) -> bytes | None:
        base_source = base.source.described_by
        if base_source.folder is not None:
            path = base_source.folder / name
            return await run_blocking(lambda: _head_of(path))
        origin, model = (EMBEDDED, base_source.embedded) if base_source.embedded else (HUB, base_source.hub)
        source = self._sources.get(origin)
        if source is None or model is None:
            raise ValueError("its source is not configured")
        return await source.read_small(model, base_source.revision, name)


class BaseFamilies:
    """The family of each base, for requests: they wait for a base's files once, and briefly."""

    def __init__(self, architectures: BaseArchitectureReader) -> None:
        self._architectures = architectures
        self._reads: dict[str, asyncio.Task[BaseArchitecture]] = {}

    async def of(self, base: BaseModelConfig) -> Family | None:
        """Return the family of a base, None while its files are not read."""
        read = self._reads.get(base.id)
        if read is None or (read.done() and read.result().row is None):
            read = self._reads[base.id] = asyncio.create_task(self._architectures.facts(base))
            await asyncio.wait({read}, timeout=FAMILY_WAIT_S)
        return read.result().row if read.done() else None


def facts_from(base_id: str, denoiser: str, config: dict[str, Any], index: dict[str, Any]) -> BaseArchitecture:
    """Return the facts that a denoiser's `config.json` and the pipeline's `model_index.json` tell."""
    stated = family_of(str(index.get("_class_name", ""))).structure
    if denoiser != "unet":
        widths, depths = transformer_shape(config)
        return BaseArchitecture(base_id, stated, denoiser, hidden_widths=widths, depths=tuple(depths.items()))
    width = config.get("cross_attention_dim")
    text_width = width if type(width) is int else None
    return BaseArchitecture(
        id=base_id,
        family=UNET_FAMILIES.get(text_width or 0) or stated,
        denoiser=denoiser,
        text_width=text_width,
        hidden_widths=_attention_widths(config),
    )


def _attention_widths(unet: dict[str, Any]) -> frozenset[int]:
    """Return the widths of the blocks that have attention; of all blocks where the configuration does not say."""
    channels, kinds = unet.get("block_out_channels"), unet.get("down_block_types")
    if not isinstance(channels, list):
        return frozenset()
    if not isinstance(kinds, list) or len(kinds) != len(channels):
        kinds = ["Attn"] * len(channels)
    pairs = [*zip(channels, kinds, strict=True), (channels[-1:] and channels[-1], "Attn")]  # the middle has attention
    return frozenset(width for width, kind in pairs if type(width) is int and "Attn" in str(kind))


def _head_of(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES)


def _table(content: bytes) -> dict[str, Any]:
    data = json.loads(content)
    if not isinstance(data, dict):
        raise ValueError("its configuration is not a table")
    return data
