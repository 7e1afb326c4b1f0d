"""Trained models written as Hub-shaped folders: fp16 weights, configs that load as float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file


def save_base(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save the pipeline, replacing a folder's earlier content; the pipeline's own weights stay float32."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    for weights in fresh.rglob("*.safetensors"):
        _halve(weights)
    for name in ("tokenizer", "tokenizer_2"):
        if (fresh / name).is_dir():
            source = Path(getattr(pipeline, name).name_or_path)
            shutil.copytree(source, fresh / name, dirs_exist_ok=True)
    for config in fresh.rglob("config.json"):
        _forget_where_from(config)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _halve(weights: Path) -> None:
    """Rewrite a float32 file as float16, contiguous, in the same order and with the same metadata."""
    with safe_open(weights, framework="pt") as stored:
        metadata = stored.metadata()
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    halved = {key: t.half().contiguous() if t.dtype == torch.float32 else t for key, t in tensors.items()}
    save_file(halved, weights, metadata=metadata)


def _forget_where_from(config: Path) -> None:
    """Drop the folder that a part was loaded from, which is private to the training machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def folder_size_bytes(folder: Path) -> int:
    """Bytes of every file below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
