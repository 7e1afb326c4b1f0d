"""Loading a base from a Hub: through the real client, against a Hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serve_app.config import BaseModelConfig
from serve_app.core import PixelImage
from serve_app.engine.base.fetching import hub_needs, resolve_source
from serve_app.engine.drawing.pipeline import BasePipeline
from serve_app.errors import BaseUnusable, HubUnavailable
from serve_app.settings import ModelSource
from tests.engine_cases import load, one_image, request
from tests.hub_client import point_hub_client
from tests.hub_server import CDN, ErrorDetail, HubServer
from tests.single_files import original_vae, write_single_file
from tests.tiny import tiny_folder, tiny_pipeline


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer() as server, pytest.MonkeyPatch.context() as monkeypatch:
        point_hub_client(monkeypatch, server, tmp_path_factory.mktemp("cache"))
        yield server


def from_hub(repository: str, *, vae: Any = None, **source: Any) -> BasePipeline:
    source["hub"] = repository
    config = BaseModelConfig(id="tiny/base", source=ModelSource(**source), vae=vae, schedulers=("DDIMScheduler",))
    parts = {name: resolve_source(part, None) for name, part in config.part_sources.items()}
    return BasePipeline.load(config, resolve_source(config.source, None), parts=parts, device=torch.device("cpu"))


def drawn(pipeline: BasePipeline) -> PixelImage:
    return one_image(pipeline, request())


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


def test_a_base_comes_from_the_hub_and_then_from_its_cache(hub: HubServer) -> None:
    files = files_of(tiny_folder("sd15"))
    more = dict.fromkeys(("unet/diffusion_pytorch_model.fp16.safetensors", "all.safetensors"), b"not asked for")
    files |= {**more, "unet/diffusion_pytorch_model.bin": b"pickled", "big.ckpt": b"pickled"}
    hub.push("me/base", files)
    expected = drawn(load("sd15"))
    first = from_hub("me/base")
    assert drawn(first) == expected
    assert not [asked for asked in hub.requests if asked.path.endswith((".bin", ".ckpt"))]
    assert weights_fetched(hub, "me/base") == weights_needed("me/base", files, hub="me/base") != set()
    hub.fail("me/base", ErrorDetail(status=503))
    again = from_hub("me/base")
    assert (again.manifest.fingerprint, drawn(again)) == (first.manifest.fingerprint, expected)


def test_a_single_file_comes_from_the_hub_with_the_configuration_of_another_repository(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.push(
        "me/checkpoints", {"sd.safetensors": write_single_file(tmp_path / "sd.safetensors", tiny_pipeline("sd15"))}
    )
    hub.push("me/configuration", files_of(tiny_folder("sd15")))
    expected = drawn(load("sd15"))
    source = {"filename": "sd.safetensors", "config": {"hub": "me/configuration"}}
    assert drawn(from_hub("me/checkpoints", **source)) == expected
    weights = [asked.path for asked in hub.requests if "me/configuration" in asked.path and "safetensors" in asked.path]
    assert weights == []
    assert weights_needed("me/configuration", files_of(tiny_folder("sd15")), hub="me/checkpoints", **source) == set()
    names = dict.fromkeys(("sd.safetensors", "other.safetensors"), b"")
    needed = weights_needed("me/checkpoints", names, hub="me/checkpoints", **source)
    assert needed == weights_fetched(hub, "me/checkpoints")
    with pytest.raises(
        BaseUnusable, match=r"^tiny/base cannot be served: its repository has no file other\.safetensors$"
    ):
        from_hub("me/checkpoints", filename="other.safetensors", config={"hub": "me/configuration"})
    for repository in ("me/checkpoints", "me/configuration"):
        hub.fail(repository, ErrorDetail(status=503))
    assert drawn(from_hub("me/checkpoints", **source)) == expected


def test_a_part_that_a_single_file_replaces_is_not_fetched_with_its_base(hub: HubServer, tmp_path: Path) -> None:
    files = files_of(tiny_folder("sd15"))
    hub.push("me/other-base", files)
    vae = {name: tensor.contiguous() for name, tensor in original_vae(tiny_pipeline("sd15").vae).items()}
    save_file(vae, tmp_path / "vae.safetensors")
    expected = drawn(load("sd15"))
    place = {"file": str(tmp_path / "vae.safetensors")}
    assert drawn(from_hub("me/other-base", vae=place)) == expected
    assert not [asked for asked in hub.requests if "me/other-base" in asked.path and "vae/diffusion" in asked.path]
    needed = weights_needed("me/other-base", files, hub="me/other-base", vae=place)
    assert needed == weights_fetched(hub, "me/other-base")


def test_a_base_that_the_hub_cannot_give_is_refused_with_the_reason(hub: HubServer) -> None:
    with pytest.raises(BaseUnusable, match="does not exist"):
        from_hub("me/nothing")
    files = files_of(tiny_folder("sd15"))
    hub.push("me/pickled", {name: data for name, data in files.items() if not name.endswith(".safetensors")})
    with pytest.raises(BaseUnusable):
        from_hub("me/pickled")
    own = {**files, "model_index.json": b'{"_class_name": ["pipeline", "Mine"]}', "pipeline.py": b"raise SystemExit"}
    hub.push("me/own", own)
    with pytest.raises(BaseUnusable, match="no code of a base is ever run"):
        from_hub("me/own")
    assert not [asked for asked in hub.requests if asked.path.endswith(".py")]
    hub.fail("me/later", ErrorDetail(status=503))
    with pytest.raises(HubUnavailable) as failing:
        from_hub("me/later")
    hub.down()  # for good
    with pytest.raises(HubUnavailable) as down:
        from_hub("me/later")
    assert "127.0.0.1" not in f"{failing.value} {down.value}"
