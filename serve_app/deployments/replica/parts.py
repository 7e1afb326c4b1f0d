"""The parts that one replica is made of, from its configuration.

Owns how a base's pipeline, the place of its base weights and its adapter store are chosen and made. The engine brings
torch, so it is imported inside: the process that builds the application never loads it.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.serve.handle import DeploymentHandle

from serve_app.catalog.catalog import Catalog, build_sources
from serve_app.catalog.files import AdapterFiles
from serve_app.config import AppConfig, BaseModelConfig, Environment, SharedSettings
from serve_app.core import AdapterRef, AdapterSpec
from serve_app.demo.embedded import embedded_root
from serve_app.deployments.replica.idle_weights import keep_in_memory
from serve_app.deployments.shared.base_files import BaseFiles
from serve_app.deployments.shared.hub_cache import HubCache
from serve_app.deployments.shared.sharing import SharedFiles, share
from serve_app.errors import BaseUnusable, HubUnavailable, LoraplexError
from serve_app.families.family import Family
from serve_app.store.admitted import AdmittedFiles
from serve_app.store.store import AdapterStore
from serve_app.work import image_units

if TYPE_CHECKING:
    from serve_app.engine.adapters.deltas import ParsedAdapter
    from serve_app.engine.admission.process import AdmissionProcess
    from serve_app.engine.drawing.pipeline import BasePipeline
    from serve_app.engine.weights.placement import WeightPlacement

log = logging.getLogger(__name__)

# Of host_cache, what may lie idle between two adapters: memory that is warm is faster to fill.
IDLE_BUFFER_BYTES = 512 << 20


@contextmanager
def uncollected() -> Iterator[None]:
    """Import what lasts as long as the process, and let no garbage collection look at it, now or later.

    Torch and diffusers bring 660,000 objects: to look at them again and again takes a sixth of their import.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def typical_units(base: BaseModelConfig, family: Family) -> float:
    """Return the work of one image as the base draws it by default, in the units of `serve_app.work`."""
    defaults = base.defaults
    runs = family.evaluations(defaults.guidance_scale, None, has_negative_prompt=False)
    return image_units(defaults.steps, runs, defaults.width, defaults.height)


async def bring_base(
    base: BaseModelConfig,
    shared: SharedSettings,
    environment: Environment,
    *,
    keeper: DeploymentHandle,
    on_brought: Callable[[Mapping[str, int]], None],
) -> BaseFiles:
    """Bring the files of a base from peers and the mirror, before the Hub's client is asked for them; `on_brought` is
    told how many bytes came from where."""
    from serve_app.engine.base.fetching import hub_needs

    files = BaseFiles(
        shared.base_files,
        hub_needs(base),
        keeper,
        node=ray.get_runtime_context().get_node_id(),
        cache=HubCache(token=environment.token),
    )
    on_brought(await files.bring())
    return files


def load_pipeline(base: BaseModelConfig, shared: SharedSettings, environment: Environment) -> BasePipeline:
    """Load a base onto its device, and have its node keep its files in memory where it is to.

    Raises:
        BaseUnusable: it cannot be loaded as configured.
    """
    from serve_app.engine.base.fetching import HubAccess, resolve_source, weights_in
    from serve_app.engine.base.loading import default_device
    from serve_app.engine.drawing.pipeline import BasePipeline
    from serve_app.engine.weights.placement import fence_share

    device = default_device()
    fence_share(device, base.replica.num_gpus)
    pipeline = BasePipeline.load(
        base,
        resolve_source(base.source, embedded_root()),
        parts={name: resolve_source(part, embedded_root()) for name, part in base.part_sources.items()},
        device=device,
        hub=HubAccess(token=environment.token),
    )
    if base.replica.idle == "host":
        files = [file for place in pipeline.read_from for file in weights_in(place, base)]
        keep_in_memory(shared, base.id, files)
    return pipeline


async def fuse_adapters(
    base: BaseModelConfig,
    shared: SharedSettings,
    environment: Environment,
    *,
    pipeline: BasePipeline,
    store: AdapterStore[ParsedAdapter],
) -> None:
    """Fuse the adapters that belong to a base into its loaded weights, for good; before anything remembers these.

    Raises:
        BaseUnusable: one of them is not found or cannot be part of this base; the sentence names it.
        HubUnavailable: the Hub did not answer.
    """
    from serve_app.engine.weights.fused import FusedWeights

    # They belong to this base even if their cards name another, and are read with the service's own token.
    adapters = shared.adapters.model_copy(
        update={"hub": shared.adapters.hub.model_copy(update={"forward_tokens": False})}
    )
    config = AppConfig(bases=(base,), adapters=adapters)
    catalog = Catalog(config, build_sources(config, environment, embedded_root=embedded_root()), clock=time.monotonic)
    refs = tuple(AdapterRef(one.id, one.scale, one.revision, one.filename) for one in base.fused)
    try:
        uses = (await catalog.resolve(base.id, refs)).adapters
        async with store.lease_all([use.spec for use in uses]) as leases:
            composition = [(lease.adapter, use.scale) for lease, use in zip(leases, uses, strict=True)]
            for lease in leases:
                if lease.adapter.ti_tokens:
                    raise BaseUnusable(base.id, f"{lease.spec.id} brings words of its own, which cannot be fused")
            FusedWeights(pipeline.components).apply(composition)
    except (HubUnavailable, BaseUnusable):
        raise
    except LoraplexError as error:
        raise BaseUnusable(base.id, f"an adapter in 'fused' cannot be fused: {error}") from error
    log.info("%s has %s fused in", base.id, [use.spec.key for use in uses])


def choose_residence(base: BaseModelConfig, pipeline: BasePipeline, *, pass_bytes: int) -> WeightPlacement:
    """Choose where the base weights are kept, once the base is loaded and a pass was seen to take `pass_bytes`."""
    from serve_app.engine.base.manifest import bytes_of_layers
    from serve_app.engine.weights.placement import WeightPlacement, choose_placement, free_bytes_of

    asked = base.replica
    if not pipeline.manifest.fuses:
        log.info("%s is quantised: adapters lie beside its layers, and nothing is fused", base.id)
        return WeightPlacement("device", prefetches_swap=False)
    chosen = choose_placement(
        asked.base_weights,
        asked.prefetch_swap,
        layer_bytes=bytes_of_layers(pipeline.components),
        reserved_bytes=asked.device_cache + pass_bytes,
        free_bytes=free_bytes_of(pipeline.device, asked.num_gpus),
        cache_bytes=asked.fused_cache,
    )
    log.info(
        "%s keeps its base weights on the %s, and up to %d sets of fused ones",
        base.id, chosen.base_weights, chosen.fused_sets,
    )  # fmt: skip
    return chosen


def make_store(
    base: BaseModelConfig,
    shared: SharedSettings,
    environment: Environment,
    *,
    pipeline: BasePipeline,
    admission: AdmissionProcess,
    keeper: DeploymentHandle,
    on_brought: Callable[[str], None],
) -> AdapterStore[ParsedAdapter]:
    """Return the store of a base's adapters; `on_brought` is told where each file came from, where nodes share them."""
    from serve_app.engine.adapters.canonical import read_canonical, reader_version
    from serve_app.engine.adapters.host_buffer import HostBuffers, book_page_locked_at_its_size
    from serve_app.engine.adapters.safetensors_file import parts_of

    idle_bytes = min(IDLE_BUFFER_BYTES, base.replica.host_cache // 8)
    buffers = HostBuffers(idle_bytes)
    is_on_gpu = pipeline.device.type == "cuda"
    files: AdapterFiles | SharedFiles = AdapterFiles(build_sources(shared, environment, embedded_root=embedded_root()))
    if is_on_gpu:
        book_page_locked_at_its_size()
    sharing = shared.adapters.sharing
    if sharing.enabled:
        files = share(files, keeper, sharing, cache_dir=environment.cache_dir, on_brought=on_brought)

    async def admit(spec: AdapterSpec, source: Path, target: Path) -> None:
        began_s = time.monotonic()
        more = [await files.path(spec, name) for name in spec.more_files]
        beside = None if spec.embeddings is None else await files.path(spec, spec.embeddings)
        sources = parts_of(spec.files, (source, *more))
        await admission.admit(sources, spec.id, target, beside, spec.settings)
        log.info("%s was admitted in %.1f ms", spec.key, (time.monotonic() - began_s) * 1e3)

    return AdapterStore(
        admitted=AdmittedFiles(
            environment.cache_dir / "admitted",
            shared.disk_cache,
            depends_on=(pipeline.manifest.fingerprint, reader_version(), base.adapter_limits.model_dump_json()),
            clock=time.time,
        ),
        fetch=files.path,
        admit=admit,
        load=lambda spec, path: read_canonical(path, pinned=is_on_gpu, buffers=buffers),
        size_of=lambda adapter: adapter.size_bytes,
        host_budget_bytes=base.replica.host_cache - idle_bytes,
        clock=time.monotonic,
        failure_ttl_s=shared.adapters.failure_ttl_s,
        release=files.release,
        free_space=files.free_space,
    )
