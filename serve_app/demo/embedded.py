"""The embedded demo models: where they lie, what they are called, how to ask them for pictures.

Pure: importing this module loads no torch.
"""

from __future__ import annotations

from pathlib import Path

NAMESPACE = "demo"
FAMILIES = ("sd15", "sdxl")
STYLE_NAMES = ("sketch", "pixel-art", "sepia", "night", "inverted", "stripes")

SIDE_PX = 64  # the size that the bases are trained at
STEPS = 12
GUIDANCE_SCALE = 3.0

BASES = tuple(f"{NAMESPACE}/{family}" for family in FAMILIES)
ADAPTERS = tuple(f"{NAMESPACE}/{family}-{style}" for family in FAMILIES for style in STYLE_NAMES)


def embedded_root() -> Path:
    """The folder that holds `demo/<name>/`, one Hub-shaped folder a model."""
    return Path(__file__).parent / "hub"


def embedded_serve_file() -> Path:
    """The Serve file of the embedded bases: beside this module in an installed wheel, at the root of a checkout."""
    installed = Path(__file__).with_name("serve_config.yaml")
    return installed if installed.exists() else Path(__file__).parents[2] / "serve_config.yaml"


def base_id(family: str) -> str:
    """The public id of a base."""
    return f"{NAMESPACE}/{family}"


def adapter_id(family: str, style: str) -> str:
    """The public id of an adapter."""
    return f"{NAMESPACE}/{family}-{style}"
