"""`loraplex inspect`, over the embedded models, a Hub on loopback and broken files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.demo.embedded import embedded_root
from tests.broken_adapters import FILE, write_broken_adapters
from tests.hub_server import CDN, HubServer
from tests.serve_files import applications
from tests.unit.cli.conftest import Run

SEPIA = embedded_root() / "demo" / "sdxl-sepia" / FILE


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.push_folder("acme/base", embedded_root() / "demo" / "sdxl")
        server.push_folder("acme/sepia", embedded_root() / "demo" / "sdxl-sepia")
        server.push("acme/unplaced", {FILE: SEPIA})
        server.push_folder("acme/foreign", embedded_root() / "demo" / "sd15-night")
        yield server


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    write_broken_adapters(root, embedded_root())
    return root


def serve_file(folder: Path, bases: list[dict[str, Any]], **adapters: Any) -> Path:
    arguments = {"bases": bases, "adapters": adapters, "cache_dir": str(folder / "cache")}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": applications(arguments)}))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, broken: Path) -> Path:
    """Both embedded bases, their adapters and the broken ones; no Hub."""
    bases = [{"id": base, "source": {"embedded": base}} for base in ("demo/sdxl", "demo/sd15")]
    folder = tmp_path_factory.mktemp("config")
    return serve_file(folder, bases, embedded=True, folders=[str(broken)], hub={"enabled": False})


@pytest.fixture(scope="module")
def hub_config(tmp_path_factory: pytest.TempPathFactory, hub: HubServer) -> Path:
    """One base that lies on the Hub, and no adapters but the Hub's."""
    bases = [{"id": "acme/base", "aliases": ["demo/sdxl"], "source": {"hub": "acme/base"}}]
    return serve_file(tmp_path_factory.mktemp("config"), bases, hub={"endpoint": hub.endpoint})


def test_an_adapter_that_fits_is_described_and_fits(run: Run, config: Path) -> None:
    result = run("inspect", "demo/sdxl-sepia", "--config", config)
    assert result.exit_code == 0, result.output
    digest = hashlib.sha256(SEPIA.read_bytes()).hexdigest()
    for part in ("made for demo/sdxl", digest, "sepia style", "lora, rank 4", "✓ demo/sdxl", "layers matched, rank 4"):
        assert part in result.stdout


def test_a_file_of_a_flat_folder_is_described_by_its_sidecars_or_refused_by_name(run: Run, tmp_path: Path) -> None:
    name = "Lora/sub/sdxl_lightning_4step_lora"
    (tmp_path / "Lora" / "sub").mkdir(parents=True)
    shutil.copy(SEPIA, tmp_path / f"{name}.safetensors")
    (tmp_path / f"{name}.json").write_text('{"activation text": "sks", "preferred weight": 0.75}')
    (tmp_path / "Lora" / "empty one.safetensors").write_bytes(b"x")
    bases = [{"id": "demo/sdxl", "source": {"embedded": "demo/sdxl"}}]
    folders = [{"path": str(tmp_path / "Lora"), "layout": "flat"}]
    config = serve_file(tmp_path, bases, folders=folders, hub={"enabled": False})
    for asked in (name.removeprefix("Lora/"), tmp_path / f"{name}.safetensors"):
        result = run("inspect", asked, "--config", config)
        assert result.exit_code == 0, result.output
        for part in ("sks", "scale 0.75, steps 4, guidance 0, scheduler Euler Trailing", "✓ demo/sdxl"):
            assert part in result.stdout
    refused = run("inspect", "empty one", "--config", config)
    assert refused.exit_code == 1
    assert "too short to be a safetensors file" in refused.output


def test_json_counts_every_layer(run: Run, config: Path) -> None:
    told = json.loads(run("inspect", "demo/sdxl-sepia", "--config", config, "--json").stdout)
    (verdict,) = told["verdicts"]
    assert told["is_served"] is True
    assert verdict["layers_matched"] == verdict["layers_in_file"] == told["header"]["layers"] > 50
    assert told["size_bytes"] == SEPIA.stat().st_size


def test_a_local_file_is_held_against_every_base(run: Run, config: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(SEPIA, tmp_path / "mine.safetensors"))
    result = run("inspect", path, "--config", config, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    verdicts = {verdict["base_id"]: verdict["code"] for verdict in told["verdicts"]}
    assert verdicts == {"demo/sdxl": None, "demo/sd15": "shape_mismatch"}
    assert told["bases"] == ["demo/sdxl"]


def test_a_base_that_is_named_decides_alone(run: Run, config: Path) -> None:
    result = run("inspect", SEPIA, "--base", "demo/sd15", "--config", config)
    assert result.exit_code == 1
    assert "✗ demo/sd15" in result.stdout
    assert "✓" not in result.stdout


def test_the_wrong_base_for_an_id_is_told_as_the_service_would(run: Run, config: Path) -> None:
    result = run("inspect", "demo/sdxl-sepia", "--base", "demo/sd15", "--config", config)
    assert result.exit_code == 1
    assert "was made for demo/sdxl, but the request names demo/sd15" in result.stdout


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("broken/truncated", "malformed_file"),
        ("broken/pickled", "unsafe_file"),
        ("broken/nan", "non_finite"),
        ("broken/no-layer", "no_layer_matches"),
        ("broken/mislabelled", "shape_mismatch"),
        ("demo/sdxl", "not_an_adapter"),
    ],
)
def test_what_is_refused_says_why(run: Run, config: Path, model: str, code: str) -> None:
    result = run("inspect", model, "--config", config, "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert told["is_served"] is False
    assert code in (told["code"], *(verdict["code"] for verdict in told["verdicts"]))


def test_a_refused_adapter_still_shows_its_card_and_weights(run: Run, config: Path) -> None:
    said = run("inspect", "broken/mislabelled", "--config", config).stdout
    assert "made for demo/sdxl" in said
    assert "lora, rank 4" in said
    assert "✗ adapter broken/mislabelled is refused" in said


@pytest.mark.parametrize("name", ["sepia", "nan", "truncated", "no-layer", "mislabelled"])
def test_a_file_is_judged_as_its_id_is(run: Run, config: Path, broken: Path, name: str) -> None:
    model, path = ("demo/sdxl-sepia", SEPIA) if name == "sepia" else (f"broken/{name}", broken / "broken" / name / FILE)
    of_id, of_file = (json.loads(run("inspect", one, "--config", config, "--json").stdout) for one in (model, path))
    for verdict in (*of_id["verdicts"], *of_file["verdicts"], of_id, of_file):
        verdict["refusal"] = verdict["refusal"] and verdict["refusal"].replace(model, "it").replace(FILE, "it")
    for fact in ("code", "refusal", "verdicts", "header", "is_served"):
        assert of_file[fact] == of_id[fact], fact


@pytest.mark.parametrize(("name", "code"), [("a.bin", "unsafe_file"), ("a.safetensors", "malformed_file")])
def test_a_local_file_of_no_use_is_refused(run: Run, config: Path, tmp_path: Path, name: str, code: str) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    result = run("inspect", tmp_path / name, "--config", config, "--json")
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (1, code)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no-such-file.safetensors",), "there is no file 'no-such-file.safetensors'"),
        (("acme/nothing",), "model acme/nothing was not found"),
        (("../../no/such/thing",), "was not found"),
        (
            ("demo/sdxl-sepia", "--base", "acme/base"),
            "base acme/base is not configured; there are demo/sdxl, demo/sd15",
        ),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    run: Run, config: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = run("inspect", *arguments, "--config", config)
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_invalid_config_is_told_in_one_line(run: Run, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(config.read_text().replace("embedded: true", "embeded: true"))
    result = run("inspect", "demo/sdxl-sepia", "--config", path)
    assert result.exit_code == 1
    assert "did you mean 'embedded'?" in result.stderr


def test_a_base_on_the_hub_is_known_from_its_configuration_files_alone(
    run: Run, hub: HubServer, hub_config: Path
) -> None:
    result = run("inspect", "acme/sepia", "--config", hub_config)
    assert result.exit_code == 0, result.output
    assert "✓ acme/base" in result.stdout
    of_base = [request.path for request in hub.requests if request.repo_id == "acme/base"]
    assert any(path.endswith("unet/config.json") for path in of_base)
    assert not any(path.endswith(".safetensors") for path in of_base)


def test_header_only_fetches_no_weights(run: Run, hub: HubServer, hub_config: Path) -> None:
    before = len(hub.requests)
    result = run("inspect", "acme/unplaced", "--config", hub_config, "--header-only")
    assert result.exit_code == 0, result.output
    assert "? for acme/base; its layers were not compared" in result.stdout
    downloads = [request for request in hub.requests[before:] if request.kind == CDN and request.range is None]
    assert downloads == []


def test_an_adapter_of_a_base_that_is_not_configured_is_refused(run: Run, hub_config: Path) -> None:
    result = run("inspect", "acme/foreign", "--config", hub_config)
    assert result.exit_code == 1
    assert "it was made for demo/sd15, which is not served; served are acme/base" in result.stdout
