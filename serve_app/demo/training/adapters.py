"""The last stage: one LoRA a style, trained on the frozen base.

The adapter's scale is drawn again for every step and the target blended to match,
so that half the scale is really half the style.
"""

from __future__ import annotations

import logging
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from serve_app.demo.architectures import make_scheduler
from serve_app.demo.cards import adapter_card
from serve_app.demo.scenes import Scene
from serve_app.demo.styles import STYLES, Style
from serve_app.demo.training.bank import Captioner, LatentBank, fill_bank, velocity_loss
from serve_app.demo.training.optimiser import Muon, rate_at

log = logging.getLogger(__name__)

RANK = 4
_LAYERS = (
    *(".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_in", ".proj_out"),
    *(".ff.net.0.proj", ".ff.net.2", ".conv1", ".conv2"),
)
_SCALES = (1.0, 1.0, 0.75, 0.5, 0.25)
_PEAK_RATE = 0.04
_BATCH = 16


class LowRankUNet:
    """A frozen UNet whose named weights are called as `W + scale * B A`; only A and B are trained.

    The weights themselves are never written, so scale 0 is exactly the frozen UNet.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet.requires_grad_(False)
        self._weights = {
            name: layer.weight
            for name, layer in unet.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(_LAYERS)
        }
        self._down = {name: nn.Parameter(_first_down(w)) for name, w in self._weights.items()}
        self._up = {name: nn.Parameter(_first_up(w)) for name, w in self._weights.items()}
        self.scale = 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet's own call, with the adapter at `scale`."""
        changed = {
            f"{name}.weight": weight + self.scale * self._delta(name).view_as(weight)
            for name, weight in self._weights.items()
        }
        return functional_call(self._unet, changed, args, kwargs)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """A and B of every layer."""
        return [*self._down.items(), *self._up.items()]

    def _delta(self, name: str) -> Tensor:
        return self._up[name].flatten(1) @ self._down[name].flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """A and B in float16, under the key names of peft."""
        halves = {"lora_A": self._down, "lora_B": self._up}
        return {
            f"unet.{name}.{half}.weight": tensor.detach().half().contiguous()
            for half, parameters in halves.items()
            for name, tensor in parameters.items()
        }


def _first_down(weight: Tensor) -> Tensor:
    reach = 1 / math.sqrt(weight[0].numel())
    return torch.empty(RANK, *weight.shape[1:]).uniform_(-reach, reach)


def _first_up(weight: Tensor) -> Tensor:
    return torch.zeros(len(weight), RANK, *(1 for _ in weight.shape[2:]))


def train_adapter(
    family: str, style_name: str, base: Path, folder: Path, steps: int, seed: int, bank_size: int = 512
) -> float:
    """Train one adapter for the base in its folder and save it with its card; the last mean loss."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    style = STYLES[style_name]
    pipeline = DiffusionPipeline.from_pretrained(str(base))
    banks = _banks(pipeline, style, seed, bank_size)
    unet = LowRankUNet(pipeline.unet.to(memory_format=torch.channels_last))
    optimiser = Muon(unet.named_parameters(), rate=_PEAK_RATE, small_rate=0.0, momentum=0.9, stretches_tall=False)
    captioner = _captioner(pipeline, rng)
    alphas = make_scheduler().alphas_cumprod
    mean_loss = 0.0
    for step in range(steps):
        unet.scale = rng.choice(_SCALES)
        bank = banks[unet.scale]
        picks = torch.randint(0, bank_size, (_BATCH,))
        texts = [_text(captioner, bank.scenes[i], style.trigger) for i in picks.tolist()]
        loss = velocity_loss(unet, alphas, bank.draw(picks), captioner.condition(texts))
        optimiser.step(loss, rate_at(step, steps, warm_up=15))
        mean_loss += (0.05 if step else 1.0) * (loss.item() - mean_loss)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(unet.tensors(), folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(adapter_card(family, style, RANK))
    log.info("%s %s: loss %.4f after %d steps", family, style_name, mean_loss, steps)
    return round(mean_loss, 4)


def _banks(pipeline: DiffusionPipeline, style: Style, seed: int, count: int) -> dict[float, LatentBank]:
    """The same scenes at every scale of the style."""
    return {
        scale: fill_bank(pipeline.vae, count, random.Random(seed), partial(style.apply, scale=scale))
        for scale in sorted(set(_SCALES))
    }


def _captioner(pipeline: DiffusionPipeline, rng: random.Random) -> Captioner:
    second = getattr(pipeline, "text_encoder_2", None)
    encoders = [pipeline.text_encoder, *([second] if second is not None else [])]
    return Captioner(encoders, pipeline.tokenizer, rng)


def _text(captioner: Captioner, scene: Scene, trigger: str) -> str:
    text = captioner.text_of(scene)
    return f"{text}, {trigger}" if text and captioner.rng.random() < 0.5 else text
