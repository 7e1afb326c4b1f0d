"""Adapters that belong to a base: found, checked and fused into the weights that it is loaded with."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import load_file, save_file

from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.config import AppConfig, Environment
from serve_app.core import AdapterRef
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.replica.parts import fuse_adapters, load_pipeline, make_store
from serve_app.engine.admission.process import AdmissionProcess
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.errors import BaseUnusable
from serve_app.settings import AdapterLimits
from tests.s3_server import S3Server
from tests.tiny_forms import unequal, weights_of

SEPIA, NIGHT = "demo/sd15-sepia", "demo/sd15-night"


@pytest.fixture(scope="module")
def admission() -> Iterator[AdmissionProcess]:
    """Starts with the first file."""
    live = DiffusionPipeline.from_pretrained(embedded_root() / "demo" / "sd15")
    process = AdmissionProcess(manifest_of(live), AdapterLimits())
    yield process
    process.close()


@asynccontextmanager
async def replica(
    cache: Path,
    admission: AdmissionProcess,
    *fused: dict[str, Any],
    folder: Path | None = None,
    store_url: str | None = None,
) -> AsyncGenerator[Any]:
    """Yield the pipeline and the store that a replica would have, with adapters fused in as it does when it starts."""
    base = {"id": "made/base", "source": {"embedded": "demo/sd15"}, "fused": fused}
    named_by_cards = {"id": "demo/sd15", "source": {"embedded": "demo/sd15"}}
    folders = [] if folder is None else [folder]
    stores = [] if store_url is None else [{"url": store_url, "timeout_s": 60}]
    sources = {"embedded": True, "folders": folders, "stores": stores, "hub": {"enabled": False}}
    config = AppConfig.model_validate({"bases": [base, named_by_cards], "adapters": sources})
    environment = Environment(cache_dir=cache)
    pipeline = load_pipeline(config.bases[0], config, environment)
    keeper: Any = None  # only nodes that share files ask it
    store = make_store(
        config.bases[0], config, environment,
        pipeline=pipeline, admission=admission, keeper=keeper, on_brought=lambda _: None,
    )  # fmt: skip
    try:
        await fuse_adapters(config.bases[0], config, environment, pipeline=pipeline, store=store)
        yield config, environment, pipeline, store
    finally:
        await store.close()


def fuse_with_diffusers(pipeline: Any, name: str, scale: float) -> None:
    pipeline.load_lora_weights(embedded_root() / name)
    pipeline.fuse_lora(components=list(adaptable_components(pipeline)), lora_scale=scale)
    pipeline.unload_lora_weights()


async def test_a_fused_adapter_is_part_of_the_base_to_the_bit_and_one_of_a_bucket_comes_on_top(
    tmp_path: Path, admission: AdmissionProcess, s3: S3Server
) -> None:
    files = {f"loras/acme/night/{file.name}": file.read_bytes() for file in (embedded_root() / NIGHT).iterdir()}
    url = f"s3://{s3.bucket(files)}/loras"
    expected: Any = DiffusionPipeline.from_pretrained(embedded_root() / "demo" / "sd15")
    fused = {"id": SEPIA, "scale": 0.7}
    async with replica(tmp_path, admission, fused, store_url=url) as (config, environment, pipeline, store):
        weights = FusedWeights(pipeline.components)
        loaded = {name: tensor.clone() for name, tensor in weights.base_tensors.items()}
        fuse_with_diffusers(expected, SEPIA, 0.7)
        assert unequal(weights_of(pipeline._variants.whole), weights_of(expected)) == []
        sources = build_sources(config, environment, embedded_root=embedded_root())
        catalog = Catalog(config, sources, clock=lambda: 0.0)
        async with store.lease(await catalog.adapter(AdapterRef("acme/night"))) as lease:
            weights.apply([(lease.adapter, 0.5)])
        fuse_with_diffusers(expected, NIGHT, 0.5)
        assert unequal(weights_of(pipeline._variants.whole), weights_of(expected)) == []
        weights.apply([])
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights.base_tensors.items())


@pytest.mark.parametrize("name", ["nobody/nothing", "demo/sdxl-sepia", "demo/sd15"])
async def test_an_adapter_that_cannot_be_part_of_the_base_is_named(
    tmp_path: Path, admission: AdmissionProcess, name: str
) -> None:
    with pytest.raises(BaseUnusable, match=f"'fused' cannot be fused: .*{name}"):
        async with replica(tmp_path, admission, {"id": SEPIA}, {"id": name}):
            pass


async def test_an_adapter_with_words_of_its_own_cannot_be_part_of_a_base(
    tmp_path: Path, admission: AdmissionProcess
) -> None:
    folder = tmp_path / "adapters" / "me" / "words"
    folder.mkdir(parents=True)
    tensors = load_file(embedded_root() / SEPIA / "pytorch_lora_weights.safetensors")
    save_file(tensors | {"bundle_emb.toy.string_to_param.*": torch.zeros(1, 64)}, folder / "words.safetensors")
    (folder / "README.md").write_text("---\nbase_model: demo/sd15\n---\n")
    with pytest.raises(BaseUnusable, match="me/words brings words of its own"):
        async with replica(tmp_path, admission, {"id": "me/words"}, folder=tmp_path / "adapters"):
            pass
