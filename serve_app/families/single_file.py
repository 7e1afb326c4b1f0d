"""Reads the header of a single-file checkpoint, before its weights: how it predicts, whether it can be served.

Pure but for reading headers, so that `loraplex check` says as much as a replica does when it starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

# The dtype and shape of each tensor, by its name.
Header = Mapping[str, tuple[str, tuple[int, ...]]]
_DENOISER = "model.diffusion_model."
_WITH_SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale")


def read_header(file: Path) -> Header:
    """Return what the tensors of a file are.

    Raises:
        OSError, SafetensorError: it is missing, cut off, or no safetensors file.
    """
    with safe_open(file, framework="np") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def unusable_file_reason(file: Path) -> str | None:
    """Return why the header of a file says that it cannot be served, None where it does not."""
    try:
        how = _quantisation(read_header(file))
    except (OSError, SafetensorError):
        return "its single file is missing, cut off or not in safetensors form"
    return how and f"its single file is quantised ({how}), and single files are read with plain weights only"


def prediction_of(header: Header) -> dict[str, bool | str]:
    """Return the settings of the noise scheduler that the keys of SDXL checkpoints stand for, such as NoobAI's."""
    if "v_pred" not in header:
        return {}
    return {"prediction_type": "v_prediction"} | ({"rescale_betas_zero_snr": True} if "ztsnr" in header else {})


def predicts_as_edm(header: Header) -> bool:
    """Whether a file says that it was trained as CosXL or Playground 2.5 were."""
    return "edm_vpred.sigma_max" in header or "edm_mean" in header


def denoiser_elements(header: Header) -> int:
    """Return how many numbers the weights of the denoiser are; all of a file that holds nothing else."""
    own = {name: shape for name, (_, shape) in header.items() if name.startswith(_DENOISER)}
    return sum(map(math.prod, own.values() if own else (shape for _, shape in header.values())))


def _quantisation(header: Header) -> str | None:
    """Name how weights are packed, where they are no plain numbers; fp8 without scales is plain."""
    if any(".quant_state." in name or name.endswith(".absmax") for name in header):
        return "bitsandbytes"
    if "scaled_fp8" in header or any(name.endswith(_WITH_SCALES) for name in header):
        return "fp8 with scales"
    whole = {dtype for name, (dtype, shape) in header.items() if len(shape) > 1 and not name.endswith("position_ids")}
    return f"{packed.pop().lower()} weights" if (packed := whole & {"I8", "U8", "I32"}) else None
