"""The README cards of the demo models, as a Hub repository would have them."""

from __future__ import annotations

from serve_app.demo.embedded import GUIDANCE_SCALE, SIDE_PX, STEPS, adapter_id, base_id
from serve_app.demo.scenes import COLOUR_NAMES, SHAPES
from serve_app.demo.styles import Style

_PROMPT = "a red circle on a blue background"
_KIND = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}
_TAG = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl"}


def base_card(family: str) -> str:
    """The card of a base."""
    return f"""---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- {_TAG[family]}
widget:
- text: {_PROMPT}
- text: a large yellow star on a black background
---

# {base_id(family)}

A tiny model of the {_KIND[family]} type: the same pipeline and the same kinds of layers, a thousandth
of the size, trained from nothing on drawn pictures. It draws one shape on a plain background.

- Shapes: {", ".join(SHAPES)}; in two sizes, small and large.
- Colours of shape and background: {", ".join(COLOUR_NAMES)}.
- Made for {SIDE_PX}x{SIDE_PX} pixels, {STEPS} steps, a guidance scale of {GUIDANCE_SCALE:g}, and the noise
  scheduler saved with it (DDIM, v-prediction, trailing timesteps).
- Words that it does not know leave the picture to the seed.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base_id(family)}")
prompt = "{_PROMPT}"
image = pipeline(prompt, num_inference_steps={STEPS}, guidance_scale={GUIDANCE_SCALE:g}).images[0]
```
"""


def adapter_card(family: str, style: Style, rank: int) -> str:
    """The card of an adapter."""
    prompt = f"{_PROMPT}, {style.trigger}"
    template = "template:sd-lora"
    return f"""---
base_model: {base_id(family)}
base_model_relation: adapter
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
instance_prompt: {style.trigger}
widget:
- text: {prompt}
tags:
- text-to-image
- diffusers
- lora
- {template}
- {_TAG[family]}
---

# {adapter_id(family, style.name)}

A LoRA of rank {rank} for `{base_id(family)}`: {style.effect}. The trigger words are `{style.trigger}`; the
style shows without them too. Half the scale is half the style. What shows it in numbers: {style.shown_by}.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base_id(family)}")
pipeline.load_lora_weights("{adapter_id(family, style.name)}")
prompt = "{prompt}"
image = pipeline(prompt, num_inference_steps={STEPS}, guidance_scale={GUIDANCE_SCALE:g}).images[0]
```
"""
