"""Loading a base model: from a folder, a single file or a Hub repository to a frozen pipeline on its device.

Owns where the weights lie, their dtype and the parts from elsewhere. Must not know requests or
adapters. Weights are read from safetensors alone, and no code of a repository is ever run.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from torch import Tensor

from serve_app.config import BaseModelConfig, DTypeName
from serve_app.engine.base.fetching import (
    HubAccess,
    ResolvedSource,
    base_folder,
    fetch_base,
    fetch_configuration,
    part_place,
    resolve_source,
    single_file,
    weights_in,
)
from serve_app.engine.base.manifest import adaptable_components
from serve_app.engine.base.packing import is_quantised
from serve_app.engine.base.parts import load_part, part_folder
from serve_app.engine.base.pipeline_setup import CountingCompiler, compile_denoiser, configure_pipeline
from serve_app.engine.base.quantising import check_part, packing_of
from serve_app.engine.base.remote_code import INDEX, check_folder
from serve_app.engine.base.single_file import load_part_file, load_single_file
from serve_app.engine.base.structure import adaptable_parts
from serve_app.engine.base.unusable import check_base_folder, refusal
from serve_app.errors import BaseUnusable
from serve_app.families.config_files import read_card

# These overflow nowhere in half precision but in SDXL's own VAE, which its configuration says
# (`force_upcast`). Newer families were trained in bfloat16 and overflow in float16.
_FLOAT16_FAMILIES = ("StableDiffusion", "StableDiffusionXL", "LatentConsistencyModel")

# Linux' name for bringing in the pages of mapped files, as if they were read; kernels before 5.14 refuse it.
_POPULATE_READ = 22
# Between two pieces others may change the process's memory map.
_PIECE_BYTES = 64 << 20
PAGES_THREAD = "pages of a base"
# Of two loads at once the second would take the first one's wrapper for the original, and leave it behind.
_WRAPPING = Lock()

_LOADING_ERRORS = (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, BaseUnusable)


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen pipeline on its device, the text of its model card where it has one, its compiler, if any, and the
    folders and single files that it was read from."""

    pipeline: Any
    card: str = ""
    compiler: CountingCompiler | None = None
    read_from: tuple[Path, ...] = ()


def default_device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(
    config: BaseModelConfig,
    source: ResolvedSource,
    parts: Mapping[str, ResolvedSource],
    *,
    device: torch.device,
    hub: HubAccess,
) -> LoadedBase:
    """Load a base, freeze it, move it to `device` and set it up as the configuration says.

    Its components are those of its own `model_index.json`: a base that comes with a safety checker keeps it.
    `parts` replaces some of them.

    Raises:
        BaseUnusable: its files are missing, incomplete, pickled, need code of their own or a package that is not
            installed, are no image model, or quantised in a way that cannot be served; the sentence says which.
        HubUnavailable: the Hub did not answer and the local cache does not have all files.
    """
    _quieten()
    read_from: list[Path] = []
    try:
        folder = base_folder(config, source, hub)
        check_base_folder(config.id, folder)
        dtype = resolve_dtype(config.dtype, check_folder(folder), device)
        packing = packing_of(config, folder, _denoiser(folder), dtype=dtype, device=device)
        load = partial(
            _load_part, config, folder=folder, dtype=dtype, device=device, packing=packing, hub=hub, read_from=read_from
        )
        pipeline: Any
        with _bringing_in_pages():
            replaced = {name: load(name, part) for name, part in parts.items()}
            if source.is_single_file:
                read_from.append(single_file(config.id, source, hub))
                pipeline = load_single_file(read_from[-1], folder, dtype, replaced)
            else:
                read_from.append(folder)
                # Where every part with weights is replaced, diffusers would find none in the variant.
                variant = config.variant if config.variant and weights_in(folder, config) else None
                pipeline = DiffusionPipeline.from_pretrained(
                    folder, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True,
                    trust_remote_code=False, **replaced,
                    quantization_config=PipelineQuantizationConfig(quant_mapping=packing) if packing else None,
                )  # fmt: skip
    except _LOADING_ERRORS as error:
        places = (source, source.config or source, *parts.values())
        raise refusal(config.id, error, is_hub=any(place.hub is not None for place in places)) from error
    if not adaptable_components(pipeline) or getattr(pipeline, "vae", None) is None:
        raise BaseUnusable(config.id, f"{type(pipeline).__name__} draws no images that adapters could change")
    if config.needs_full_weights is not None and any(map(is_quantised, adaptable_components(pipeline).values())):
        raise BaseUnusable(config.id, config.needs_full_weights)
    _freeze(pipeline, config.id)
    if device.type != "cpu":  # where they are already, which diffusers would ask every module
        pipeline.to(device)
    configure_pipeline(pipeline, config)
    compiler = compile_denoiser(pipeline) if config.compile else None
    return LoadedBase(pipeline, read_card(folder), compiler, tuple(read_from))


def fetch(config: BaseModelConfig, hub: HubAccess) -> tuple[Path, ...]:
    """Fetch what `load_base` would read from the Hub into the local cache; return its folders and single files.

    Raises:
        BaseUnusable, HubUnavailable: as for `load_base`.
    """
    places: list[Path] = []
    parts = {name: resolve_source(part, None) for name, part in config.part_sources.items() if part.hub is not None}
    source = config.source
    try:
        if source.described_by.hub is not None:
            described = resolve_source(source.described_by, None)
            fetch_described = fetch_base if source.config is None else fetch_configuration
            places.append(fetch_described(config, described, hub))
        if source.filename is not None:
            file = ResolvedSource(hub=source.hub, revision=source.revision, filename=source.filename)
            places.append(single_file(config.id, file, hub))
        places += [part_place(config.id, name, part, hub) for name, part in parts.items()]
    except _LOADING_ERRORS as error:
        raise refusal(config.id, error, is_hub=True) from error
    return tuple(places)


def resolve_dtype(name: DTypeName, class_name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to load in; "auto" is float32 on a CPU, else what the pipeline's family was trained for."""
    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    if device.type == "cpu":
        return torch.float32
    family = class_name.removesuffix("Pipeline")
    return torch.float16 if family in _FLOAT16_FAMILIES else torch.bfloat16


def _quieten() -> None:
    """Silence the bars and the warnings that quote prompts: a server's log is no place for either."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _denoiser(folder: Path) -> str:
    """Return the name of the part that denoises, "" where the index of a base names none."""
    return next(iter(adaptable_parts((folder / INDEX).read_text(encoding="utf-8"))), "")


def _load_part(
    config: BaseModelConfig, name: str, source: ResolvedSource, *, folder: Path, dtype: torch.dtype,
    device: torch.device, packing: Mapping[str, Any], hub: HubAccess, read_from: list[Path],
) -> Any:  # fmt: skip
    place = part_place(config.id, name, source, hub)
    read_from.append(part_folder(name, place))
    if source.is_single_file:
        return load_part_file(name, place, folder, dtype)
    check_part(config, name, place, device, is_to_pack=name in packing)
    return load_part(name, place, dtype, packing.get(name))


@contextmanager
def _bringing_in_pages() -> Iterator[None]:
    """Have a thread bring in a file's pages once it is mapped, while the modules are built and weights are used.

    Reading maps a file, and each page costs at its first use; diffusers has no parameter for this.
    """
    with _WRAPPING:
        load_file = safetensors.torch.load_file

        def load_and_bring_in(*given: Any, **options: Any) -> dict[str, Tensor]:
            tensors = load_file(*given, **options)
            # The thread's own list keeps the file mapped. What was read to a GPU is not mapped.
            mapped = [tensor for tensor in tensors.values() if tensor.device.type == "cpu"]
            Thread(target=_bring_in, args=(mapped,), name=PAGES_THREAD, daemon=True).start()
            return tensors

        safetensors.torch.load_file = load_and_bring_in
        try:
            yield
        finally:
            safetensors.torch.load_file = load_file


def _bring_in(tensors: Sequence[Tensor]) -> None:
    """Bring in the pages of a file whose tensors lie in one piece; where it fails they come when they are used."""
    start = min((tensor.data_ptr() for tensor in tensors), default=0) & -mmap.PAGESIZE
    stop = max((tensor.data_ptr() + tensor.nbytes for tensor in tensors), default=0)
    is_one_piece = stop - start <= sum(tensor.nbytes for tensor in tensors) + _PIECE_BYTES
    if sys.platform != "linux" or not is_one_piece:
        return
    advise = ctypes.CDLL(None).madvise
    for piece in range(start, stop, _PIECE_BYTES):
        size = min(_PIECE_BYTES, stop - piece)
        if advise(ctypes.c_void_p(piece), ctypes.c_size_t(size), _POPULATE_READ) != 0:
            return


def _freeze(pipeline: Any, base_id: str) -> None:
    """Clear gradients everywhere: matmul kernels are chosen by `requires_grad`, so bits would depend on it.

    Raises:
        BaseUnusable: weights are missing in its files; diffusers leaves such parameters without memory.
    """
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        for parameter in component.parameters():
            if parameter.is_meta:
                raise BaseUnusable(base_id, f"its files lack weights of '{name}'")
            parameter.requires_grad_(False)
        if component.training:  # those that were read are not
            component.eval()
