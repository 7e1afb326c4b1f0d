"""Trains the embedded demo models from nothing: `python -m serve_app.demo.train`.

    tokenizer -> autoencoder | text encoders -> both bases side by side -> adapters -> measurements

Each stage runs in a process of its own with one torch thread, two at a time. A
stage whose output is already in the work folder is not repeated, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch

from serve_app.demo.cards import base_card
from serve_app.demo.embedded import FAMILIES, STYLE_NAMES, adapter_id, base_id, embedded_root
from serve_app.demo.measure import measure_family
from serve_app.demo.tokenizer import build_tokenizer
from serve_app.demo.training.adapters import train_adapter
from serve_app.demo.training.autoencoder import train_autoencoder
from serve_app.demo.training.base import train_base
from serve_app.demo.training.text import train_text_encoders

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to work and to write, and how many steps each stage takes."""

    target: Path
    work: Path
    autoencoder_steps: int = 1000
    text_steps: int = 350
    base_steps: int = 1000
    adapter_steps: int = 300


def _stage(plan: Plan, name: str, steps: int, run: Callable[[], Any]) -> None:
    """Run one stage unless its record is already there, and write the record."""
    record = plan.work / "records" / f"{name}.json"
    if record.exists():
        return
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    wall, cpu = time.monotonic(), time.process_time()
    result = run()
    minutes = {"wall_minutes": time.monotonic() - wall, "cpu_minutes": time.process_time() - cpu}
    values = {
        "stage": name,
        "steps": steps,
        **{key: round(s / 60, 2) for key, s in minutes.items()},
        **result,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(values, indent=2) + "\n")


def _autoencoder(plan: Plan) -> None:
    def run() -> dict[str, float]:
        result = train_autoencoder(plan.work / "vae", plan.autoencoder_steps)
        return {"psnr_db": result.psnr_db, "scaling_factor": result.scaling_factor}

    _stage(plan, "autoencoder", plan.autoencoder_steps, run)


def _texts(plan: Plan) -> None:
    tokenizer = build_tokenizer(plan.work / "tokenizer")
    for seed, family in enumerate(FAMILIES, start=1):

        def run(family: str = family, seed: int = seed) -> dict[str, float]:
            folder = plan.work / family
            return {"attributes_read": train_text_encoders(family, tokenizer, folder, plan.text_steps, seed)}

        _stage(plan, f"text-{family}", plan.text_steps, run)


def _family(plan: Plan, family: str) -> None:
    """One base, then its adapters, then what they reach."""
    seed = 1 + FAMILIES.index(family)
    base = plan.target / base_id(family)

    def run_base() -> dict[str, float]:
        loss = train_base(family, plan.work, base, plan.base_steps, seed)
        (base / "README.md").write_text(base_card(family))
        return {"loss": loss}

    _stage(plan, f"base-{family}", plan.base_steps, run_base)
    for number, style in enumerate(STYLE_NAMES):

        def run(style: str = style, number: int = number) -> dict[str, float]:
            folder = plan.target / adapter_id(family, style)
            return {"loss": train_adapter(family, style, base, folder, plan.adapter_steps, 100 + number)}

        _stage(plan, f"adapter-{family}-{style}", plan.adapter_steps, run)
    _stage(plan, f"measured-{family}", 0, lambda: measure_family(family, plan.target))


def train_everything(plan: Plan) -> None:
    """Run every stage and write the records beside the models."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        for future in [pool.submit(_autoencoder, plan), pool.submit(_texts, plan)]:
            future.result()
        for future in [pool.submit(_family, plan, family) for family in FAMILIES]:
            future.result()
    _write_provenance(plan)
    log.info("everything is trained and measured, after %.0f minutes", (time.monotonic() - started) / 60)


def _write_provenance(plan: Plan) -> None:
    """The record of a training run beside the models: machine, duration, scores."""
    stages = [json.loads(path.read_text()) for path in sorted((plan.work / "records").glob("*.json"))]
    provenance = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores of {platform.machine()}, one torch thread a stage",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "stages": stages,
    }
    (plan.target / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded demo models from nothing.")
    parser.add_argument("--target", type=Path, default=embedded_root(), help="folder to write demo/<name>/ to")
    parser.add_argument("--work", type=Path, default=Path("build/demo-train"), help="folder for what stages share")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_everything(Plan(arguments.target, arguments.work))


if __name__ == "__main__":
    main()
