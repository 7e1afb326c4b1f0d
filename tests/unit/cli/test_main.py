from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from serve_app.demo.embedded import embedded_serve_file
from tests.unit.cli.conftest import Run

SHIPPED = Path(__file__).parents[3] / "serve_config.yaml"


def test_the_version_is_the_package_s(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"loraplex {version('loraplex')}\n")


@pytest.mark.parametrize("command", ["check", "serve", "init", "models", "generate", "inspect", "pull", "bench"])
def test_every_command_explains_itself(run: Run, command: str) -> None:
    assert command in run("--help").stdout
    assert "Usage:" in run(command, "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("models", "--nonsense"),
        ("models", "--url", "127.0.0.1:8000"),
        ("models", "--url", "http://user:secret@127.0.0.1"),
        ("models", "--url", "ftp://127.0.0.1"),
        ("check", "no-such-file.yaml"),
        ("generate", "a cat"),
        ("generate", "a cat", "-o", "cat.gif"),
        ("generate", "a cat", "-o", "no-such-folder/cat.png"),
        ("generate", "a cat", "-o", "cat.png", "--size", "512"),
        ("generate", "a cat", "-o", "cat.png", "--lora", "a/b:strong"),
        ("generate", "a cat", "-o", "cat.png", "--strength", "0.5"),
        ("generate", "a cat", "-o", "cat.png", "--sheet", "--count", "2"),
        ("pull",),
    ],
)
def test_wrong_usage_exits_with_2_and_says_so(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "secret" not in result.stderr
    assert result.stdout == "" or "Usage:" in result.stdout


def test_check_prints_a_valid_file_as_json(run: Run) -> None:
    result = run("check", SHIPPED, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "valid": True,
        "url": "http://127.0.0.1:8000",
        "bases": ["demo/sdxl", "demo/sd15"],
        "gpus": {"fewest_replicas": 0, "most_replicas": 0},
    }


def test_check_compares_the_gpus_that_bases_need_with_those_there_are(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(SHIPPED.read_text().replace("num_cpus: 0.4", "num_cpus: 0.4, num_gpus: 1"))
    said, enough, short = run("check", path), run("check", path, "--gpus", 2), run("check", path, "--gpus", 1)
    assert "GPUs: 2 for the fewest replicas of all bases, 4 for the most" in said.stdout
    assert "with 2 some bases have fewer replicas than they could use when all are busy" in enough.stdout
    assert (said.exit_code, enough.exit_code, short.exit_code) == (0, 0, 1)
    assert "the fewest replicas of all bases need 2 GPUs, and there are 1: lower min_replicas" in short.stderr


def test_check_says_how_long_a_base_waits_for_a_gpu_at_most(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    on_gpus = SHIPPED.read_text().replace("num_cpus: 0.4", "num_cpus: 0.4, num_gpus: 1")
    path.write_text(on_gpus.replace("min_replicas: 1", "min_replicas: 0"))
    said, told = run("check", path, "--gpus", 1), run("check", path, "--gpus", 1, "--json")
    assert "one without a replica waits for at most 6 starts, and 2 times for others to finish" in said.stdout
    assert json.loads(told.stdout)["gpus"]["longest_wait"] == {"starts": 6.0, "drains": 2}
    path.write_text(on_gpus.replace("min_replicas: 1", "min_replicas: 0", 1))
    assert "those with `min_replicas: 0` never get one" in run("check", path, "--gpus", 1).stdout


def test_check_prints_the_faults_of_an_invalid_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(SHIPPED.read_text().replace("default_base", "default_bass"))
    said, told = run("check", path), run("check", path, "--json")
    assert (said.exit_code, told.exit_code) == (1, 1)
    assert f"{path}: " in said.stderr
    assert "default_bass" in said.stderr
    assert "default_bass" in json.loads(told.stdout)["faults"][0]


def test_serve_refuses_an_invalid_file_before_it_starts_anything(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: []")
    result = run("serve", path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["valid"] is False


def test_init_writes_a_file_that_check_accepts_and_never_overwrites_one(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert run("init", path).exit_code == 0
    checked = run("check", path, "--json")
    assert json.loads(checked.stdout)["bases"] == ["stabilityai/stable-diffusion-xl-base-1.0"]
    path.write_text("mine")
    again = run("init", path)
    assert (again.exit_code, path.read_text()) == (1, "mine")
    assert "exists already" in again.stderr


def test_init_says_why_a_file_cannot_be_written(run: Run, tmp_path: Path) -> None:
    result = run("init", tmp_path / "no-such-folder" / "mine.yaml")
    assert result.exit_code == 1
    assert "No such file or directory" in result.stderr


def test_serve_without_a_file_means_the_demo_bases() -> None:
    assert embedded_serve_file().read_text() == SHIPPED.read_text()
