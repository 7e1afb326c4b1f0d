"""Loading a base from a Hub: through the real client, against a Hub on loopback, in a process of its own.

The Hub client takes its endpoint from the environment when it is imported, hence the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from serve_app.config import BaseModelConfig
from serve_app.engine.base.fetching import hub_needs
from serve_app.settings import ModelSource
from tests.engine_cases import load, one_image, request
from tests.hub_server import CDN, ErrorDetail, HubServer
from tests.single_files import original_vae, write_single_file
from tests.tiny import tiny_folder, tiny_pipeline

WAIT_S = 120.0
LOADER = """
import hashlib, json, sys
from pathlib import Path
from serve_app.config import BaseModelConfig
from serve_app.settings import ModelSource
from serve_app.engine.base.fetching import HubAccess, resolve_source
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import LoraplexError
from tests.engine_cases import one_image, request

for line in sys.stdin:
    source = json.loads(line)
    vae = source.pop("vae", None)
    config = BaseModelConfig(id="tiny/base", source=ModelSource(**source), vae=vae, schedulers=("DDIMScheduler",))
    parts = {name: resolve_source(part, None) for name, part in config.part_sources.items()}
    hub = HubAccess(cache_dir=Path(sys.argv[1]))
    try:
        pipeline = BasePipeline.load(config, resolve_source(config.source, None), parts=parts, hub=hub)
        answer = {
            "fingerprint": pipeline.manifest.fingerprint,
            "image": hashlib.sha256(one_image(pipeline, request()).pixels).hexdigest(),
        }
    except LoraplexError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Loader:
    """A process that loads bases from the Hub, one per question."""

    def __init__(self, endpoint: str, cache: Path) -> None:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADER, str(cache / "hub")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def load(self, repository: str, **source: Any) -> dict[str, str]:
        """Load one base; return what came of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"hub": repository, **source}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=WAIT_S)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def loader(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    made = Loader(hub.endpoint, tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


def weights_needed(repository: str, files: dict[str, Any], **source: Any) -> set[str]:
    """Return the weights of a repository that peers would be asked for."""
    vae = source.pop("vae", None)
    base = BaseModelConfig(id="tiny/base", source=ModelSource(**source), vae=vae)
    chosen = [name for need in hub_needs(base) if need.repository == repository for name in need.choose(files)]
    return {name for name in chosen if name.endswith(".safetensors")}


def weights_fetched(hub: HubServer, repository: str) -> set[str]:
    """Return the weights of a repository that the Hub's client fetched."""
    asked = [one for one in hub.requests if one.repo_id == repository and one.kind == CDN]
    return {one.path.split("/", 5)[5] for one in asked}


def files_of(folder: Path) -> dict[str, bytes | Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_a_base_comes_from_the_hub_and_then_from_its_cache(hub: HubServer, loader: Loader) -> None:
    files = files_of(tiny_folder("sd15"))
    more = dict.fromkeys(("unet/diffusion_pytorch_model.fp16.safetensors", "all.safetensors"), b"not asked for")
    files |= {**more, "unet/diffusion_pytorch_model.bin": b"pickled", "big.ckpt": b"pickled"}
    hub.push("me/base", files)
    expected = hashlib.sha256(one_image(load("sd15"), request()).pixels).hexdigest()
    first = loader.load("me/base")
    assert first["image"] == expected
    assert not [asked for asked in hub.requests if asked.path.endswith((".bin", ".ckpt"))]
    assert weights_fetched(hub, "me/base") == weights_needed("me/base", files, hub="me/base") != set()
    hub.fail("me/base", ErrorDetail(status=503))
    assert loader.load("me/base") == first


def test_a_single_file_comes_from_the_hub_with_the_configuration_of_another_repository(
    hub: HubServer, loader: Loader, tmp_path: Path
) -> None:
    hub.push(
        "me/checkpoints", {"sd.safetensors": write_single_file(tmp_path / "sd.safetensors", tiny_pipeline("sd15"))}
    )
    hub.push("me/configuration", files_of(tiny_folder("sd15")))
    expected = hashlib.sha256(one_image(load("sd15"), request()).pixels).hexdigest()
    source = {"filename": "sd.safetensors", "config": {"hub": "me/configuration"}}
    assert loader.load("me/checkpoints", **source)["image"] == expected
    weights = [asked.path for asked in hub.requests if "me/configuration" in asked.path and "safetensors" in asked.path]
    assert weights == []
    assert weights_needed("me/configuration", files_of(tiny_folder("sd15")), hub="me/checkpoints", **source) == set()
    names = dict.fromkeys(("sd.safetensors", "other.safetensors"), b"")
    needed = weights_needed("me/checkpoints", names, hub="me/checkpoints", **source)
    assert needed == weights_fetched(hub, "me/checkpoints")
    refused = loader.load("me/checkpoints", filename="other.safetensors", config={"hub": "me/configuration"})
    assert refused["message"] == "tiny/base cannot be served: its repository has no file other.safetensors"
    for repository in ("me/checkpoints", "me/configuration"):
        hub.fail(repository, ErrorDetail(status=503))
    assert loader.load("me/checkpoints", **source)["image"] == expected


def test_a_part_that_a_single_file_replaces_is_not_fetched_with_its_base(
    hub: HubServer, loader: Loader, tmp_path: Path
) -> None:
    files = files_of(tiny_folder("sd15"))
    hub.push("me/other-base", files)
    vae = {name: tensor.contiguous() for name, tensor in original_vae(tiny_pipeline("sd15").vae).items()}
    save_file(vae, tmp_path / "vae.safetensors")
    expected = hashlib.sha256(one_image(load("sd15"), request()).pixels).hexdigest()
    place = {"file": str(tmp_path / "vae.safetensors")}
    assert loader.load("me/other-base", vae=place)["image"] == expected
    assert not [asked for asked in hub.requests if "me/other-base" in asked.path and "vae/diffusion" in asked.path]
    needed = weights_needed("me/other-base", files, hub="me/other-base", vae=place)
    assert needed == weights_fetched(hub, "me/other-base")


def test_a_base_that_the_hub_cannot_give_is_refused_with_the_reason(hub: HubServer, loader: Loader) -> None:
    missing = loader.load("me/nothing")
    assert missing["error"] == "BaseUnusable"
    assert "does not exist" in missing["message"]
    files = files_of(tiny_folder("sd15"))
    hub.push("me/pickled", {name: data for name, data in files.items() if not name.endswith(".safetensors")})
    assert loader.load("me/pickled")["error"] == "BaseUnusable"
    own = {**files, "model_index.json": b'{"_class_name": ["pipeline", "Mine"]}', "pipeline.py": b"raise SystemExit"}
    hub.push("me/own", own)
    refused = loader.load("me/own")
    assert (refused["error"], "no code of a base is ever run" in refused["message"]) == ("BaseUnusable", True)
    assert not [asked for asked in hub.requests if asked.path.endswith(".py")]
    hub.fail("me/later", ErrorDetail(status=503))
    failing = loader.load("me/later")
    hub.down()  # for good
    down = loader.load("me/later")
    for answer in (failing, down):
        assert answer["error"] == "HubUnavailable"
        assert "127.0.0.1" not in answer["message"]
