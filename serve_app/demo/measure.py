"""Scores of the trained models: prompt adherence, and each adapter's effect against its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from serve_app.demo.checker import Request, adherence, sample_requests
from serve_app.demo.drawing import draw, load_base
from serve_app.demo.embedded import STYLE_NAMES, adapter_id, base_id, embedded_root
from serve_app.demo.styles import STYLES, Style


@dataclass(frozen=True, slots=True)
class Effect:
    """How an adapter compares with its base over pairs of pictures from the same prompt and seed.

    `told_apart`: share of pairs whose statistic moved by more than a quarter of the way that
    restyling the base's own picture moves it. `growing`: share where scale 0.5 lies between 0 and 1.
    """

    told_apart: float
    growing: float


def measure_adherence(pipeline: DiffusionPipeline, requests: list[Request]) -> float:
    """Share of the requests whose picture shows the shape and both colours."""
    pictures = draw(pipeline, [r.prompt for r in requests], [r.seed for r in requests])
    return adherence(pictures, [r.wanted for r in requests])


def measure_effect(
    pipeline: DiffusionPipeline, adapter: Path, style: Style, requests: list[Request], plain: Tensor
) -> Effect:
    """Load the adapter, draw the requests at two scales, compare with the plain pictures, unload it."""
    prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
    backgrounds = [r.wanted.background or "" for r in requests]
    pipeline.load_lora_weights(adapter, adapter_name="style")
    strengths = [style.strength(plain, backgrounds)]
    for scale in (0.5, 1.0):
        pipeline.set_adapters("style", adapter_weights=scale)
        strengths.append(style.strength(draw(pipeline, prompts, seeds), backgrounds))
    pipeline.unload_lora_weights()
    without, half, full = strengths
    goal = style.strength(style.apply(plain, 1.0), backgrounds)
    told_apart = (full - without) > 0.25 * (goal - without)
    growing = (without < half) & (half < full)
    return Effect(float(told_apart.float().mean()), float(growing.float().mean()))


def measure_family(family: str, root: Path | None = None, count: int = 50) -> dict[str, float]:
    """Every number of one base and its adapters, by name."""
    pipeline = load_base(base_id(family), root)
    requests = sample_requests(count)
    prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
    plain = draw(pipeline, prompts, seeds)
    values = {"adherence": adherence(plain, [r.wanted for r in requests])}
    for name in STYLE_NAMES:
        folder = (root or embedded_root()) / adapter_id(family, name)
        effect = measure_effect(pipeline, folder, STYLES[name], requests, plain)
        values |= {f"{name}: told apart": effect.told_apart, f"{name}: growing": effect.growing}
    return {key: round(value, 3) for key, value in values.items()}
