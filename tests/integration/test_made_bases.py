"""Bases that their operators put together, end to end: single files, adapters fused in, and one that is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from ray import serve
from safetensors.numpy import save_file

from serve_app.app import build
from serve_app.config import AppConfig
from tests.full_size import full_size_sdxl
from tests.service import EMBEDDED, Service, base_settings
from tests.single_files import write_single_file
from tests.tiny_adapters import lora, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SEPIA = "demo/sd15-sepia"


def single(file: Path, config: Path) -> dict[str, Any]:
    return {"file": str(file), "config": {"folder": str(config)}}


@contextmanager
def service(port: int, folder: Path, *bases: dict[str, Any], adapters: Path | None = None) -> Iterator[Service]:
    """Start the service below a prefix of its own; a base that cannot be served keeps no other from being ready."""
    folders = [] if adapters is None else [str(adapters)]
    arguments = {
        "bases": bases, "adapters": {"embedded": True, "folders": folders, "hub": {"enabled": False}},
        "ingress": {"replicas": 1, "num_cpus": 0.1}, "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    target = serve.RunTarget(build(AppConfig.model_validate(arguments)), name="made", route_prefix="/made")
    serve.run_many([target], wait_for_applications_running=False)
    yield Service(f"http://127.0.0.1:{port}/made")
    serve.delete("made")


@pytest.fixture(scope="module")
def made(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, whole = tmp_path_factory.mktemp("made"), EMBEDDED / "demo" / "sd15"
    file = write_single_file(folder / "checkpoint.safetensors", DiffusionPipeline.from_pretrained(whole))
    save_file({"scaled_fp8": numpy.zeros(1)}, folder / "packed.safetensors")
    sepia = base_settings("made/sepia", source=single(file, whole), fused=[{"id": SEPIA}])
    packed = base_settings("made/packed", source=single(folder / "packed.safetensors", whole))
    with service(cluster, folder, base_settings("demo/sd15"), sepia, packed) as running:
        yield running


def test_a_single_file_with_a_fused_adapter_draws_as_its_folder_does_with_that_adapter(made: Service) -> None:
    plain = made.draw("a house", model="demo/sd15", seed=3)
    sepia = made.draw("a house", model="demo/sd15", lora=SEPIA, seed=3)
    assert not numpy.array_equal(plain, sepia)
    assert numpy.array_equal(made.draw("a house", model="made/sepia", seed=3), sepia)
    told = {base["id"]: base["fused"] for base in made.http.get("v1/bases").json()}
    assert told == {"demo/sd15": [], "made/sepia": [{"id": SEPIA, "scale": 1.0}], "made/packed": []}


def test_callers_of_a_single_file_that_cannot_be_served_are_told_why(made: Service) -> None:
    reply = made.ask("a house", model="made/packed")
    assert reply.status_code == 503
    assert "made/packed cannot be served: its single file is quantised (fp8 with scales)" in reply.text
    assert "packed.safetensors" not in reply.text


# In float32, since a CPU takes minutes for a VAE's convolutions in bfloat16.
@pytest.mark.soak
@pytest.mark.skipif(psutil.virtual_memory().available < 20 << 30, reason="it takes 20 GiB of memory")
def test_a_full_size_sdxl_checkpoint_is_served_with_an_adapter(cluster: int, tmp_path: Path) -> None:
    config, pipeline = full_size_sdxl(tmp_path / "config")
    file = write_single_file(tmp_path / "sdxl.safetensors", pipeline)
    adapter = tmp_path / "adapters" / "me" / "style"
    adapter.mkdir(parents=True)
    write(adapter / "pytorch_lora_weights.safetensors", lora(pipeline, strength=0.5))
    (adapter / "README.md").write_text("---\nbase_model: me/checkpoint\n---\n")
    del pipeline
    base = base_settings("full/sdxl", source=single(file, config), aliases=["me/checkpoint"], dtype="float32")
    with service(cluster, tmp_path, base, adapters=tmp_path / "adapters") as running:
        settings = {"seed": 3, "num_inference_steps": 1, "guidance_scale": 1.0}
        plain, adapted, again = (
            running.draw("a house", model="full/sdxl", lora=name, **settings) for name in ("", "me/style", "")
        )
    assert not numpy.array_equal(plain, adapted)
    assert numpy.array_equal(plain, again)
    shutil.rmtree(tmp_path)  # seven gigabytes
