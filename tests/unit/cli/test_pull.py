"""`loraplex pull`, from a Hub on loopback into the cache that replicas read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serve_app.demo.embedded import embedded_root
from tests.broken_adapters import FILE
from tests.hub_client import point_hub_client
from tests.hub_server import CDN, HubServer
from tests.hub_server import FILE as FILE_KIND
from tests.serve_files import applications
from tests.unit.cli.conftest import Run


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.push_folder("acme/base", embedded_root() / "demo" / "sdxl")
        server.push_folder("acme/sepia", embedded_root() / "demo" / "sdxl-sepia")
        server.push_folder("acme/night", embedded_root() / "demo" / "sdxl-night")
        yield server


@pytest.fixture
def config(tmp_path: Path, hub: HubServer) -> Path:
    arguments = {
        "bases": [
            {"id": "demo/sdxl", "source": {"hub": "acme/base"}},
            {"id": "demo/sd15", "source": {"embedded": "demo/sd15"}},
        ],
        "adapters": {"embedded": True, "hub": {"endpoint": hub.endpoint}},
        "cache_dir": str(tmp_path / "cache"),
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": applications(arguments)}))
    return path


def downloads(hub: HubServer) -> int:
    return sum(request.kind in (CDN, FILE_KIND) and request.path.endswith(FILE) and request.range is None
               and request.method == "GET" for request in hub.requests)  # fmt: skip


def test_adapters_land_in_the_cache_of_the_replicas(run: Run, config: Path, tmp_path: Path) -> None:
    result = run("pull", "acme/sepia", "acme/night", "--config", config, "--json")
    assert result.exit_code == 0, result.output
    pulled = json.loads(result.stdout)["pulled"]
    assert [(model["id"], model["base_id"]) for model in pulled] == [
        ("acme/sepia", "demo/sdxl"),
        ("acme/night", "demo/sdxl"),
    ]
    for model, name in zip(pulled, ("sdxl-sepia", "sdxl-night"), strict=True):
        path = Path(model["path"])
        assert path.is_relative_to(tmp_path / "cache" / "hub")
        assert path.read_bytes() == (embedded_root() / "demo" / name / FILE).read_bytes()


def test_what_is_there_is_not_fetched_again(run: Run, config: Path, hub: HubServer) -> None:
    run("pull", "acme/sepia", "--config", config)
    before = downloads(hub)
    assert run("pull", "acme/sepia", "--config", config).exit_code == 0
    assert downloads(hub) == before


def test_an_embedded_adapter_needs_no_fetching(run: Run, config: Path) -> None:
    result = run("pull", "demo/sd15-night", "--config", config)
    assert result.exit_code == 0
    assert "demo/sd15-night for demo/sd15" in result.stdout
    assert "already here: embedded" in result.stdout


def test_an_adapter_that_is_not_there_is_told(run: Run, config: Path) -> None:
    result = run("pull", "acme/nothing", "--config", config)
    assert result.exit_code == 1
    assert "model acme/nothing was not found" in result.stderr


def test_bases_land_in_the_hub_client_s_own_cache(
    run: Run, config: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_hub_client(monkeypatch, hub, tmp_path / "home")
    result = run("pull", "--bases", "--config", config, "--json")
    assert result.exit_code == 0, result.output
    (base,) = json.loads(result.stdout)["pulled"]
    assert (base["id"], base["base_id"]) == ("demo/sdxl", None)
    folder = Path(base["path"])
    assert folder.is_relative_to(tmp_path / "home")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
