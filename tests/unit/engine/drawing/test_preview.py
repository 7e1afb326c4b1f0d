"""Previews: due when they should be, near what comes out, and without a trace in it."""

from __future__ import annotations

import threading
from typing import Any

import numpy
import pytest
import torch

from serve_app.config import BaseModelConfig
from serve_app.core import GenerationRequest, PixelImage, Preview, Progress
from serve_app.demo.embedded import embedded_root
from serve_app.engine.base.fetching import resolve_source
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.engine.drawing.preview import estimate_finished, fit_latent_colours, preview_steps
from serve_app.engine.weights.fused import FusedWeights
from serve_app.engine.worker.job import OnEvent
from serve_app.engine.worker.worker import EngineWorker
from serve_app.families.schedulers import SCHEDULERS
from serve_app.settings import ModelSource
from tests.engine_cases import load, on_steps, one_image, photo, request, wrap
from tests.tiny import tiny_pipeline

# Schedulers of one and of two evaluations a step, with noise of their own and with a memory of the steps before.
QUICK = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
CLASSES = [name for name in SCHEDULERS["noise"] if name.endswith("Scheduler")]
DRAWN = [pytest.param("sd15", name, marks=[] if name in QUICK else pytest.mark.slow) for name in CLASSES]


@pytest.fixture(scope="module")
def pipeline() -> BasePipeline:
    return load("sd15")


def previews_of(pipeline: BasePipeline, *requests: GenerationRequest) -> list[list[tuple[PixelImage, ...]]]:
    """Return what each preview round gave, for each request."""
    completed_rounds: list[list[tuple[PixelImage, ...]]] = []
    pipeline.generate(requests, on_preview=lambda shares: completed_rounds.append(list(shares)))
    return completed_rounds


@pytest.mark.parametrize(
    ("steps", "count", "due"),
    [(12, 3, {3, 6, 9}), (12, 0, set()), (2, 1, {1}), (1, 3, set()), (2, 3, {1}), (100, 1, {50})],
)
def test_previews_are_spread_over_the_steps(steps: int, count: int, due: set[int]) -> None:
    assert preview_steps(steps, count) == due


@pytest.mark.parametrize(("family", "scheduler"), [pytest.param("sdxl", None, marks=pytest.mark.slow), *DRAWN])
def test_previews_change_no_image(family: str, scheduler: str | None, pipeline: BasePipeline) -> None:
    pipeline = pipeline if family == "sd15" else load(family)
    wanted = request(steps=4, scheduler=scheduler)
    images: list[Any] = []
    outcome = pipeline.generate([request(steps=4, scheduler=scheduler, num_previews=2)], on_preview=images.append)
    assert len(images) == 2
    (share,) = outcome.images
    assert isinstance(share, tuple)
    assert share[0] == one_image(pipeline, wanted)


def test_only_those_of_a_pass_who_asked_get_previews(pipeline: BasePipeline) -> None:
    completed_rounds = previews_of(
        pipeline,
        request(steps=4, seed=1, num_previews=1, num_images=2),
        request(steps=4, seed=2),
        request(steps=4, seed=3, num_previews=3),
    )
    assert [[len(share) for share in shares] for shares in completed_rounds] == [[0, 0, 1], [2, 0, 1], [0, 0, 1]]


def test_a_preview_is_as_small_as_the_latents(pipeline: BasePipeline) -> None:
    ((share,),) = previews_of(pipeline, request(steps=4, num_previews=1, width=128, height=64))
    vae_factor = 128 // share[0].width
    assert vae_factor > 1
    assert (share[0].width, share[0].height) == (128 // vae_factor, 64 // vae_factor)


def test_images_made_from_images_have_previews(pipeline: BasePipeline) -> None:
    wanted = request(image=photo(), strength=0.5, steps=8, num_previews=1)
    assert len(previews_of(pipeline, wanted)) == 1


@pytest.mark.parametrize(("family", "completed_rounds"), [("sd3", 1), ("flux", 1)])
def test_families_with_other_latents_draw_as_ever(family: str, completed_rounds: int) -> None:
    live = tiny_pipeline(family)
    pipeline = wrap(live, family, schedulers=(type(live.scheduler).__name__,))
    shown: list[Any] = []
    outcome = pipeline.generate([request(steps=4, num_previews=1)], on_preview=shown.append)
    assert len(shown) == completed_rounds
    assert isinstance(outcome.images[0], tuple)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_finished_latents_are_told_from_any_step(name: str, kind: str) -> None:
    import diffusers

    # Of these steps of training a constructor or two loops over each.
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=100,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
    )
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    finished, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    time = scheduler.timesteps[5]
    kept = scheduler.alphas_cumprod[round(float(time))]
    noisy = kept.sqrt() * finished + (1 - kept).sqrt() * noise
    output = {
        "epsilon": noise, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * finished, "sample": finished,
    }[kind]  # fmt: skip
    is_unscaled = float(scheduler.init_noise_sigma) > 1.001
    sample = noisy / kept.sqrt() if is_unscaled else noisy
    assert torch.allclose(estimate_finished(scheduler, output, time, sample), finished, atol=1e-4)


def test_colours_are_read_from_the_latents_of_a_trained_base() -> None:
    config = BaseModelConfig(id="demo/sd15", source=ModelSource(embedded="demo/sd15"))
    base = BasePipeline.load(config, resolve_source(config.source, embedded_root()), device=torch.device("cpu"))
    wanted = request(prompt="a red circle on a blue background", steps=12, guidance_scale=3.0, seed=7, num_previews=3)
    shown: list[PixelImage] = []
    outcome = base.generate([wanted], on_preview=lambda shares: shown.extend(shares[0]))
    (images,) = outcome.images
    assert isinstance(images, tuple)
    final = numpy.frombuffer(images[0].pixels, "uint8").reshape(64, 64, 3).astype(float)
    coarse = final.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
    errors = [abs(numpy.frombuffer(image.pixels, "uint8").reshape(8, 8, 3) - coarse).mean() for image in shown]
    assert len(errors) == 3
    assert errors[-1] < 15
    # A flat guess at the mean colour is the least that a preview must beat.
    assert errors[-1] < abs(coarse - coarse.mean(axis=(0, 1))).mean() / 2


def test_fitting_leaves_the_autoencoder_as_it_was() -> None:
    vae = tiny_pipeline("sdxl", torch.float16).vae
    vae.register_to_config(force_upcast=True)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    state = torch.get_rng_state()
    colours = fit_latent_colours(vae)
    assert vae.dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert colours.weight.isfinite().all()


def test_a_job_hears_its_place_its_steps_and_its_previews() -> None:
    pipeline = load("sd15")
    worker = EngineWorker(pipeline, FusedWeights(pipeline.components), max_batch_images=1, torch_threads=1)
    heard: dict[int, list[Progress | Preview]] = {0: [], 1: [], 2: []}
    are_all_there = threading.Event()

    def listener(seed: int) -> OnEvent:
        hold = on_steps(lambda *_: are_all_there.wait(60))

        def hear(event: Progress | Preview) -> None:
            heard[seed].append(event)
            if seed == 0:
                hold(event)

        return hear

    jobs = [
        worker.submit(request(seed=seed, num_previews=1 if seed == 2 else 0), (), on_event=listener(seed))
        for seed in heard
    ]
    are_all_there.set()
    for job in jobs:
        job.future.result(60)
    worker.close()
    progress = {
        seed: [(event.queue_position, event.step) for event in events if isinstance(event, Progress)]
        for seed, events in heard.items()
    }
    own_turn = [(0, 0), (0, 1), (0, 2), (0, 3)]
    # What goes before them counts, whether it waits or runs.
    assert progress == {0: own_turn, 1: [(1, 0), *own_turn], 2: [(2, 0), (1, 0), *own_turn]}
    assert [(event.index, event.image_index) for event in heard[2] if isinstance(event, Preview)] == [(0, 0)]
