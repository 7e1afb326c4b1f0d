"""A registry without a cluster."""

from __future__ import annotations

from dataclasses import replace

from serve_app.adapter_defaults import AdapterDefaults
from serve_app.catalog.pictures import Shrink
from serve_app.catalog.replica_report import (
    ActiveAdapter,
    BaseState,
    DayUsage,
    KnownAdapter,
    LoraReport,
    Preloaded,
    Removal,
    ReplicaReport,
    ResidentAdapter,
)
from serve_app.catalog.resolving.aliases import Alias
from serve_app.config import BaseModelConfig
from serve_app.core import AdapterSpec, HubToken, Scales
from serve_app.errors import ModelNotFound
from serve_app.families.abilities import BaseAbilities
from serve_app.settings import Canary, FusedAdapter, ModelSource

BASE = BaseModelConfig(
    id="demo/sdxl",
    aliases=("xl",),
    source=ModelSource(embedded="demo/sdxl"),
    fused=(FusedAdapter(id="me/turbo", scale=0.8),),
)

ABILITIES = BaseAbilities(
    pipeline="StableDiffusionXLPipeline", family="SDXL", parameters={"text": ("negative_prompt",)},
    schedulers=("DDIMScheduler", "Euler Karras"), side_multiple=16, min_steps=1, tokens=77, previews=True,
)  # fmt: skip


DEFAULTS = AdapterDefaults(scale=0.8, trigger_words="sks")


def spec(model: str) -> AdapterSpec:
    return AdapterSpec(
        model, "demo/sdxl", "0123abcd" * 5, "lora.safetensors", "folder", "/secret/place", 4096, defaults=DEFAULTS
    )


def known(model: str) -> LoraReport:
    return LoraReport(id=model, adapter=KnownAdapter(spec(model), 8))


class FakeRegistry:
    """Knows `demo/sketch` and one replica that holds it; `failure` is raised by whatever changes something."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.rows: dict[str, LoraReport] = {
            "demo/sketch": replace(
                known("demo/sketch"), resident=(("r1", "applied"),), hits=3, last_used_s=1000.5, layers_matched=48
            )
        }
        self.reports: tuple[ReplicaReport, ...] = (
            ReplicaReport(
                "r1", "demo/sdxl", device="cpu", waiting=1, running=2, backlog_s=1.23456,
                applied=(ActiveAdapter("demo/sketch", Scales(0.5, 1.0)),),
                holdings=(ResidentAdapter("demo/sketch@1/f", "demo/sketch", "applied"),),
                abilities=ABILITIES,
            ),
        )  # fmt: skip
        self.served: tuple[BaseModelConfig, ...] = (BASE,)
        self.shared: dict[str, Canary] = {}
        self.does = BaseState("running", expected_s=0.0)
        self.drawn: tuple[DayUsage, ...] = ()
        self.usage_asked: list[str] = []
        self.failure: Exception | None = None
        self.tokens: list[HubToken | None] = []
        self.added: list[tuple[Alias, bool, int]] = []
        self.preloads: list[tuple[str, int]] = []
        self.pictures: dict[str, bytes] = {}
        self.kept: dict[str, bytes] = {}

    def bases(self) -> tuple[BaseModelConfig, ...]:
        return self.served

    def default_base(self) -> BaseModelConfig:
        return BASE

    def canaries(self) -> dict[str, Canary]:
        return self.shared

    async def states(self) -> dict[str, BaseState]:
        return {base.id: self.does for base in self.served}

    async def usage(self, since: str) -> tuple[DayUsage, ...]:
        self.usage_asked.append(since)
        return self.drawn

    async def loras(self, *, token: HubToken | None) -> tuple[LoraReport, ...]:
        self.tokens.append(token)
        return tuple(self.rows[name] for name in sorted(self.rows))

    async def lora(self, name: str, *, token: HubToken | None) -> LoraReport:
        self.tokens.append(token)
        if name not in self.rows:
            raise ModelNotFound(name)
        return self.rows[name]

    async def picture(self, name: str, shrink: Shrink, *, token: HubToken | None) -> bytes | None:
        await self.lora(name, token=token)
        return await shrink("cover.png", self.pictures[name]) if name in self.pictures else self.kept.get(name)

    async def keep_picture(self, name: str, picture: bytes, *, token: HubToken | None) -> None:
        self.kept[name] = picture

    async def replicas(self, *, token: HubToken | None) -> tuple[ReplicaReport, ...]:
        self.tokens.append(token)
        return self.reports

    async def add_alias(self, alias: Alias, *, may_replace: bool, preload: int, token: HubToken | None) -> LoraReport:
        self._changing(token)
        self.added.append((alias, may_replace, preload))
        row = replace(known(alias.target.id), id=alias.name, alias_of=alias.target.id)
        self.rows[alias.name] = row
        return row

    async def remove(self, name: str, *, token: HubToken | None) -> Removal:
        self._changing(token)
        row = self.rows.get(name)
        if row is None:
            raise ModelNotFound(name)
        if row.alias_of:
            del self.rows[name]
        return Removal(name, was_alias=row.alias_of is not None, replicas=("r1",))

    async def preload(self, name: str, replicas: int, *, token: HubToken | None) -> Preloaded:
        self._changing(token)
        self.preloads.append((name, replicas))
        return Preloaded(spec(name), ("r1",), replicas)

    def _changing(self, token: HubToken | None) -> None:
        self.tokens.append(token)
        if self.failure is not None:
            raise self.failure
