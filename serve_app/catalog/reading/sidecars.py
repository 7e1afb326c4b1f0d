"""The files that A1111 and Civitai's tools write beside an adapter: `<name>.json` and `<name>.civitai.info`.

Pure, and never raises, as for cards. Values that a user typed into A1111 go before published ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.stated_defaults import stated_defaults, text_of, trigger_words

WEBUI_SUFFIX = ".json"
CIVITAI_SUFFIX = ".civitai.info"

_SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5",)
_SD21 = ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base")
_SDXL = ("stabilityai/stable-diffusion-xl-base-1.0",)
_SD3 = ("stabilityai/stable-diffusion-3-medium-diffusers",)
# Names of whole families, which any fine-tune may go by: they decide between bases that a file fits, and refuse none.
_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "sd1": _SD15, "sd 1.4": _SD15, "sd 1.5": _SD15,
    "sd2": _SD21, "sd 2.0": _SD21, "sd 2.1": _SD21, "sd 2.1 768": _SD21,
    "sdxl": _SDXL, "sdxl 0.9": _SDXL, "sdxl 1.0": _SDXL,
    "sd3": _SD3, "sd 3": _SD3,
    "sd 3.5 medium": ("stabilityai/stable-diffusion-3.5-medium",),
    "sd 3.5 large": ("stabilityai/stable-diffusion-3.5-large",),
    "flux.1 d": ("black-forest-labs/FLUX.1-dev",), "flux.1 s": ("black-forest-labs/FLUX.1-schnell",),
}  # fmt: skip
_UNKNOWN = ("", "unknown", "other")


def card_from_sidecars(*, webui: bytes | None, civitai: bytes | None) -> Card:
    """Return what both files together say, as a card would; either may be missing."""
    own, published = _table(webui), _table(civitai)
    typed = {
        "scale": own.get("preferred weight") or None,  # 0 is a field that was not filled in
        "trigger_words": own.get("activation text"),
        "negative_prompt": own.get("negative text"),
    }
    told = {"trigger_words": trigger_words(published.get("trainedWords"))}
    # A1111 tells a family by the file itself; a published name says more.
    base = next((name for name in (published.get("baseModel"), own.get("sd version")) if _is_base(name)), None)
    name = text_of(base) or ""
    return Card(
        base_models=() if not name or name.casefold() in _FAMILIES else (name,),
        base_hints=(*_FAMILIES.get(name.casefold(), ()), name) if name else (),
        defaults=stated_defaults(typed).over(stated_defaults(told)),
    )


def _is_base(name: object) -> bool:
    return isinstance(name, str) and name.strip().casefold() not in _UNKNOWN


def _table(content: bytes | None) -> Mapping[str, object]:
    try:
        data: object = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, object]", data) if isinstance(data, dict) else {}
