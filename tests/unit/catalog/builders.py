"""Tiny adapters and repositories, made on the spot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr
from safetensors.numpy import save

from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.core import AdapterRef, AdapterSpec
from serve_app.settings import ModelSource
from serve_app.source_settings import AdapterSources, HubSettings
from tests.clock import Clock
from tests.hub_server import HubServer

WEIGHTS = "pytorch_lora_weights.safetensors"
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
SD_TEXT, SDXL_TEXT = 64, 112
SD_WIDTHS, SDXL_WIDTHS = [32, 64, 80], [48, 64, 64]


def pair(module: str, width: int, *, rank: int = 4, out: int = 32) -> dict[str, np.ndarray]:
    """One low-rank pair in today's diffusers' spelling."""
    return {
        f"{module}.lora_A.weight": np.ones((rank, width), np.float32),
        f"{module}.lora_B.weight": np.zeros((out, rank), np.float32),
    }


def lora(text_width: int = SD_TEXT, *, hidden: int | None = 32, rank: int = 4, **metadata: str) -> bytes:
    """An adapter whose cross-attention takes text features of some width."""
    tensors = pair(f"{BLOCK}.attn2.to_k", text_width, rank=rank)
    if hidden is not None:
        tensors |= pair(f"{BLOCK}.attn1.to_q", hidden, rank=rank)
    return save(tensors, metadata=metadata or None)


def ref(model: str, **fields: object) -> AdapterRef:
    return AdapterRef(model, **fields)  # type: ignore[arg-type]


def card(base: str | list[str] | None = None, *, tags: tuple[str, ...] = ("lora",), **fields: Any) -> bytes:
    """A README with front matter."""
    data: dict[str, object] = {"tags": list(tags), **fields}
    if base is not None:
        data["base_model"] = base
    lines = [f"{key}: {json.dumps(value)}" for key, value in data.items()]
    return "\n".join(["---", *lines, "---", "", "# A model", ""]).encode()


def adapter_files(base: str | list[str] | None, weights: bytes | None = None, **fields: Any) -> dict[str, bytes]:
    """The files of an ordinary adapter repository."""
    return {"README.md": card(base, **fields), WEIGHTS: weights if weights is not None else lora()}


def base_files(text_width: int, widths: list[int], pipeline: str) -> dict[str, bytes]:
    """The configuration files of a base, without weights."""
    unet = {"cross_attention_dim": text_width, "block_out_channels": widths}
    return {
        "model_index.json": json.dumps({"_class_name": pipeline}).encode(),
        "unet/config.json": json.dumps(unet).encode(),
        "unet/diffusion_pytorch_model.safetensors": save({"conv_in.weight": np.ones((2, 2), np.float32)}),
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a repository into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


async def renewed(catalog: Catalog, ref: AdapterRef, old: AdapterSpec) -> AdapterSpec:
    """Return what an adapter is now that it is `old` no more; a slow look-up may have the old one served on."""
    async with asyncio.timeout(60):
        while (new := await catalog.adapter(ref)) == old:  # noqa: ASYNC110 - the catalog tells nobody
            await asyncio.sleep(0.01)
    return new


@dataclass
class World:
    """A served SD-like and a served SDXL-like base, a folder and a Hub of adapters, and a catalog over them."""

    folder: Path
    hub: HubServer
    clock: Clock = field(default_factory=lambda: Clock(1000.0))
    hub_settings: dict[str, object] = field(default_factory=dict)
    token: str | None = None

    def __post_init__(self) -> None:
        demo = self.folder / "demo-root" / "demo"
        write_files(demo / "sd", base_files(SD_TEXT, SD_WIDTHS, "StableDiffusionPipeline"))
        write_files(demo / "sdxl", base_files(SDXL_TEXT, SDXL_WIDTHS, "StableDiffusionXLPipeline"))
        self.adapters.mkdir(exist_ok=True)

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    def config(self, **sources: object) -> AppConfig:
        hub = HubSettings.model_validate({"endpoint": self.hub.endpoint, "timeout_s": 60, **self.hub_settings})
        return AppConfig(
            bases=(
                BaseModelConfig(
                    id="demo/sd", aliases=("small", "old-owner/sd"), source=ModelSource(embedded="demo/sd")
                ),
                BaseModelConfig(id="big", source=ModelSource(folder=self.folder / "demo-root" / "demo" / "sdxl")),
            ),
            adapters=AdapterSources.model_validate(
                {"embedded": True, "folders": (self.adapters,), "hub": hub, **sources}
            ),
        )

    def places(self, config: AppConfig | None = None):
        token = SecretStr(self.token) if self.token is not None else None
        environment = Environment(hub_token=token, cache_dir=self.folder / "cache")
        return build_sources(config or self.config(), environment, embedded_root=self.folder / "demo-root")

    def catalog(self, config: AppConfig | None = None, **more: Any) -> Catalog:
        config = config or self.config()
        return Catalog(config, self.places(config), clock=self.clock, **more)

    def put(self, model: str, files: Mapping[str, bytes]) -> Path:
        """Make a repository in the adapters' folder."""
        return write_files(self.adapters / model, files)
