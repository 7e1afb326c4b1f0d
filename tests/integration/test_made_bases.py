"""Bases that their operators put together, end to end: single files, adapters fused in, quantised, and one refused."""

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
from safetensors.numpy import save_file
from torch import Tensor

from cluster.local_service import delete_service, run_service
from serve_app.deployments.replica.replica import BaseModelReplica
from tests.apart import BUILD, ROOT
from tests.full_size import full_size_sdxl
from tests.service import EMBEDDED, Service, base_settings
from tests.single_files import write_single_file
from tests.tiny_adapters import lora, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SEPIA = "demo/sd15-sepia"
TORCHAO = BUILD / "torchao"


def single(file: Path, config: Path) -> dict[str, Any]:
    return {"file": str(file), "config": {"folder": str(config)}}


class WithTorchao:
    """The deployment of a base, whose replicas find torchao where its name ends in "int8"."""

    @staticmethod
    def options(*, name: str, ray_actor_options: dict[str, Any], **options: Any) -> Any:
        if name.endswith("int8"):
            found = {"env_vars": {"PYTHONPATH": f"{ROOT}:{TORCHAO}"}}
            ray_actor_options = ray_actor_options | {"runtime_env": found}
        return BaseModelReplica.options(name=name, ray_actor_options=ray_actor_options, **options)


@contextmanager
def service(port: int, folder: Path, *bases: dict[str, Any], adapters: Path | None = None) -> Iterator[Service]:
    """Start the service below a prefix of its own; a base that cannot be served keeps no other from being ready."""
    folders = [] if adapters is None else [str(adapters)]
    arguments = {
        "bases": bases, "adapters": {"embedded": True, "folders": folders, "hub": {"enabled": False}},
        "ingress": {"replicas": 1, "num_cpus": 0.1}, "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    run_service(arguments, name="made", replica=WithTorchao, waits=False)
    yield Service(f"http://127.0.0.1:{port}/made")
    delete_service("made")


def write_adapter(folder: Path, tensors: dict[str, Tensor], base_id: str) -> None:
    folder.mkdir(parents=True)
    write(folder / "pytorch_lora_weights.safetensors", tensors)
    (folder / "README.md").write_text(f"---\nbase_model: {base_id}\n---\n")


@pytest.fixture(scope="module")
def made(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, whole = tmp_path_factory.mktemp("made"), EMBEDDED / "demo" / "sd15"
    pipeline = DiffusionPipeline.from_pretrained(whole)
    file = write_single_file(folder / "checkpoint.safetensors", pipeline)
    save_file({"scaled_fp8": numpy.zeros(1)}, folder / "packed.safetensors")
    sepia = base_settings("made/sepia", source=single(file, whole), fused=[{"id": SEPIA}])
    packed = base_settings("made/packed", source=single(folder / "packed.safetensors", whole))
    int8 = base_settings("made/int8", source={"embedded": "demo/sd15"}, quantization="int8")
    for name, more in {"style": {}, "dora": {"dora": True}}.items():
        write_adapter(folder / "adapters" / "me" / name, lora(pipeline, strength=0.5, **more), "made/int8")
    bases = base_settings("demo/sd15"), sepia, packed, int8
    with service(cluster, folder, *bases, adapters=folder / "adapters") as running:
        yield running


def test_a_single_file_with_a_fused_adapter_draws_as_its_folder_does_with_that_adapter(made: Service) -> None:
    plain = made.draw("a house", model="demo/sd15", seed=3)
    sepia = made.draw("a house", model="demo/sd15", lora=SEPIA, seed=3)
    assert not numpy.array_equal(plain, sepia)
    assert numpy.array_equal(made.draw("a house", model="made/sepia", seed=3), sepia)
    told = {base["id"]: base["fused"] for base in made.http.get("v1/bases").json()}
    assert told == {"demo/sd15": [], "made/sepia": [{"id": SEPIA, "scale": 1.0}], "made/packed": [], "made/int8": []}


@pytest.mark.skipif(not TORCHAO.is_dir(), reason="torchao is not in build/torchao: make .venv/.dev")
def test_a_quantised_base_serves_adapters_unfused_and_refuses_what_must_be_fused(made: Service) -> None:
    plain, adapted, again = (
        made.draw("a house", model="made/int8", lora=name, seed=3) for name in ("", "me/style", "")
    )
    assert numpy.array_equal(plain, again)
    assert not numpy.array_equal(plain, adapted)
    full = made.draw("a house", model="demo/sd15", seed=3)
    assert 0 < abs(plain.astype(int) - full).mean() < abs(plain.astype(int) - adapted).mean()
    refusal = made.ask("a house", model="made/int8", lora="me/dora")
    assert refusal.status_code == 422
    assert "is DoRA, which must be fused into full weights; this base is quantised" in refusal.text
    told = {base["id"]: base["fuses_adapters"] for base in made.http.get("v1/bases").json()}
    assert (told["made/int8"], told["demo/sd15"]) == (False, True)


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
    write_adapter(tmp_path / "adapters" / "me" / "style", lora(pipeline, strength=0.5), "me/checkpoint")
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
