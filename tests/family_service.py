"""Tiny bases of eight families in one service, and one that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.service import Service

FAMILIES = ("chroma", "flux2_klein", "flux_dev", "qwen_image", "sd15", "sd3", "sdxl", "z_image")
BROKEN = "tiny/video"
PREFIX = "/families"


def settings(name: str, folder: Path) -> dict[str, Any]:
    return {
        "id": f"tiny/{name}",
        "source": {"folder": str(folder)},
        "defaults": {"steps": 4, "width": 64, "height": 64},
        "limits": {"min_side": 32, "max_side": 128, "max_pixels": 16384},
        "replica": {"num_cpus": 0.1, "torch_threads": 1},
    }


def start_families(folder: Path, port: int) -> Service:
    """Start the service below a prefix of its own, and wait for a picture of each base that can be served."""

    from cluster.local_service import run_service
    from tests.tiny_families.build import tiny_family

    bases = []
    for name in FAMILIES:
        tiny_family(name).save_pretrained(folder / name)
        bases.append(settings(name, folder / name))
    (folder / "video").mkdir()
    (folder / "video" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    bases.append(settings("video", folder / "video"))
    arguments = {"bases": bases, "ingress": {"replicas": 1, "num_cpus": 0.1}, "cache_dir": str(folder / "cache")}
    run_service(arguments, name="families", waits=False)
    service = Service(f"http://127.0.0.1:{port}{PREFIX}")
    service.http.timeout = 900  # the first request waits while nine bases start at once
    for name in FAMILIES:
        service.draw("a cat", model=f"tiny/{name}")
    return service
