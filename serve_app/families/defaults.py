"""The steps, guidance and size of a request that gives none, where the configuration of the base gives none either.

A family's row has the values of diffusers' pipelines; values in a base's own files and the code on its card go before.
Pure: texts and tables in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Distilled bases: a few steps, and guidance that is no longer computed.
DISTILLED_STEPS = 4
_CODE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MAX_CARD_STEPS = 200


@dataclass(frozen=True, slots=True)
class FamilyDefaults:
    """The defaults where a request and the configuration give none; `side` is that of a square in pixels.

    `pixels_per_sample` is how many pixels a unit of the denoiser's own `sample_size` is, None where that says no size.
    """

    steps: int = 30
    guidance_scale: float = 7.5
    side: int = 512
    pixels_per_sample: int | None = None

    def with_sample_size(self, denoiser: Mapping[str, Any]) -> FamilyDefaults:
        """Return the defaults with the size that a denoiser's `config.json` says it was trained for."""
        size = denoiser.get("sample_size")
        if self.pixels_per_sample is None or type(size) is not int or size < 1:
            return self
        return replace(self, side=size * self.pixels_per_sample)

    def with_card(self, card: str, guidance: Sequence[str]) -> FamilyDefaults:
        """Return the defaults with what the first call in the code of a model card sets; `guidance` as in the row."""
        code = next((block for block in _CODE.findall(card) if "num_inference_steps" in block), "")
        steps, scale = _argument(code, "num_inference_steps"), _argument(code, *guidance)
        return replace(
            self,
            steps=int(steps) if steps is not None and 1 <= steps <= _MAX_CARD_STEPS else self.steps,
            guidance_scale=self.guidance_scale if scale is None else scale,
        )


def _argument(code: str, *names: str) -> float | None:
    """Return the number that a call sets a parameter to, None where there is none."""
    found = re.search(rf"\b(?:{'|'.join(names)})\s*=\s*(\d+(?:\.\d+)?)\b", code)
    return None if found is None else float(found[1])
