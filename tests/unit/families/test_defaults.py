"""What is drawn where neither a request nor the configuration says anything."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config import BaseModelConfig
from serve_app.families.table import FAMILIES, family_of

CARD = """---
license: apache-2.0
---
Best with num_inference_steps=99.
```bash
pip install diffusers
```
```python
image = pipe(
    prompt, height=1024, width=1024,
    num_inference_steps=9,  # 8 runs of the transformer
    guidance_scale=0.0,
).images[0]
```
"""


def configured(pipeline: str, card: str = "", denoiser: dict[str, Any] | None = None, **settings: Any) -> Any:
    base = BaseModelConfig.model_validate({"id": "one", "source": {"embedded": "one"}, **settings})
    return base.with_defaults_of(family_of(pipeline, {}, denoiser or {}, card)).defaults


def test_a_base_without_defaults_has_those_of_its_family() -> None:
    defaults = configured("FluxPipeline")
    assert (defaults.steps, defaults.guidance_scale, defaults.width, defaults.height) == (28, 3.5, 1024, 1024)


def test_what_the_configuration_says_goes_before_the_family_and_the_card() -> None:
    defaults = configured("ZImagePipeline", CARD, defaults={"steps": 30, "width": 512})
    # 512 high is the configuration's own default: a size is taken from one place.
    assert (defaults.steps, defaults.guidance_scale, defaults.width, defaults.height) == (30, 0.0, 512, 512)


def test_what_the_code_of_the_card_says_goes_before_the_family() -> None:
    assert (configured("ZImagePipeline").steps, configured("ZImagePipeline", CARD).steps) == (50, 9)
    assert configured("ZImagePipeline", "Use num_inference_steps=9.").steps == 50


def test_guidance_on_a_card_is_the_parameter_that_the_family_guides_by() -> None:
    card = CARD.replace("guidance_scale", "true_cfg_scale")
    assert configured("QwenImagePipeline", card).guidance_scale == 0.0
    assert configured("QwenImagePipeline", CARD).guidance_scale == 4.0


def test_the_base_s_own_files_say_its_size_and_that_it_is_distilled() -> None:
    assert configured("StableDiffusionPipeline", denoiser={"sample_size": 96}).width == 768
    schnell = configured("FluxPipeline", denoiser={"guidance_embeds": False})
    assert (schnell.steps, schnell.guidance_scale) == (4, 0.0)


def test_defaults_lie_within_the_limits_of_the_base() -> None:
    limits = {"max_steps": 30, "max_side": 1000, "max_pixels": 700 * 700}
    defaults = configured("QwenImagePipeline", limits=limits)
    assert (defaults.steps, defaults.width, defaults.height) == (30, 688, 688)


def test_a_base_of_an_unknown_family_keeps_the_defaults_of_the_configuration() -> None:
    base = BaseModelConfig.model_validate({"id": "one", "source": {"embedded": "one"}})
    assert base.with_defaults_of(family_of("SomethingNewPipeline")) == base


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_defaults_that_it_can_draw(name: str) -> None:
    row = FAMILIES[name]
    assert row.defaults.steps >= row.min_steps
    assert row.defaults.side % row.side_multiple == 0
