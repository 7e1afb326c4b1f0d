"""Clients of other people against the real service, each in a process of its own: they draw and edit with an adapter.

Those without a seed are known by the adapter's colours: what sepia draws has more red than blue.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.clients.installed import node_packages, python_packages
from tests.clients.python_clients import PROMPT
from tests.service import Service, pixels_of

ADAPTER = "demo/sdxl-sepia"
FOLDER = Path(__file__).parent
# Neither asks anybody else for anything.
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HAYSTACK_TELEMETRY_ENABLED": "False", "LANGSMITH_TRACING": "false"}


@pytest.fixture(scope="module")
def picture(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture that is edited."""
    path = tmp_path_factory.mktemp("picture") / "a.png"
    path.write_bytes(service.ask(PROMPT, model="demo/sdxl", seed=7).content)
    return path


@pytest.fixture(scope="module")
def expected(service: Service, picture: Path) -> dict[str, NDArray[np.uint8]]:
    """What a client with the seed 7 gets for each step."""
    asked = {"prompt": PROMPT, "strength": 0.5, "seed": 7, "lora_adapter": ADAPTER}
    body = {"inputs": base64.b64encode(picture.read_bytes()).decode(), "parameters": asked}
    edited = service.http.post("/", json=body, headers={"accept": "image/png"})
    return {"generate": service.draw(PROMPT, model=ADAPTER, seed=7), "edit": pixels_of(edited)}


@pytest.fixture
def dall_e(service: Service) -> Iterator[str]:
    """A name that clients made for DALL-E insist on, given to the adapter."""
    alias = {"lora_name": "dall-e-3", "source": {"uri": ADAPTER}}
    assert service.http.post("/v1/loras", json=alias).status_code == 200
    yield "dall-e-3"
    service.http.delete("/v1/loras/dall-e-3")


def told(command: Sequence[str | Path], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Return what a client's script prints, each image decoded."""
    surroundings = dict(os.environ) | QUIET | environment
    done = subprocess.run(
        command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line | {"image": decoded(line["image"])} for line in lines]


def decoded(encoded: str) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)


def told_by(client: str, packages: str | None, service: Service, adapter: str, picture: Path) -> list[dict[str, Any]]:
    ours = os.pathsep.join(path for path in sys.path if path)
    path = ours if packages is None else f"{python_packages(packages)}{os.pathsep}{ours}"
    command = [sys.executable, "-W", "ignore", FOLDER / "python_clients.py", client, service.url, adapter, picture]
    return told(command, FOLDER, PYTHONPATH=path)


def is_same(image: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two images differ by no more than JPEG makes of one."""
    return image.shape == other.shape and bool(abs(image - other.astype(int)).mean() < 6)


def is_sepia(image: NDArray[Any]) -> bool:
    red, _, blue = image.mean(axis=(0, 1))
    return bool(red > blue + 10)


@pytest.mark.parametrize(
    ("client", "packages"),
    [
        ("huggingface_hub", None),
        pytest.param("huggingface_hub", "huggingface_hub_0", marks=pytest.mark.slow),
        pytest.param("huggingface_hub", "huggingface_hub_1", marks=pytest.mark.slow),
        pytest.param("litellm", "applications", marks=pytest.mark.slow),
    ],
)
def test_a_client_of_python_draws_and_edits_with_an_adapter(
    service: Service, picture: Path, expected: dict[str, NDArray[np.uint8]], client: str, packages: str | None
) -> None:
    lines = told_by(client, packages, service, ADAPTER, picture)
    assert [line["step"] for line in lines] == ["generate", "edit"]
    assert [line["step"] for line in lines if not is_same(line["image"], expected[line["step"]])] == []


@pytest.mark.slow
def test_haystack_draws_with_an_adapter(service: Service, picture: Path) -> None:
    (line,) = told_by("haystack", "applications", service, ADAPTER, picture)
    assert is_sepia(line["image"])


@pytest.mark.slow
def test_langchain_draws_with_an_adapter_that_has_a_name_of_dall_e(
    service: Service, picture: Path, dall_e: str
) -> None:
    (line,) = told_by("langchain", "applications", service, dall_e, picture)
    assert is_sepia(line["image"])


@pytest.mark.slow
def test_the_clients_of_node_draw_and_edit_with_an_adapter(
    service: Service, picture: Path, expected: dict[str, NDArray[np.uint8]]
) -> None:
    folder = node_packages()
    shutil.copy(FOLDER / "node_clients.mjs", folder)
    # The AI SDK has no field for a strength: what is masked, here everything, is redrawn.
    Image.new("RGBA", (64, 64)).save(folder / "mask.png")
    lines = told(["node", "node_clients.mjs", service.url, ADAPTER, picture, "mask.png"], folder)
    steps = [(client, step) for client in ("openai", "huggingface", "ai") for step in ("generate", "edit")]
    assert [(line["client"], line["step"]) for line in lines] == [*steps, ("langchain", "generate")]
    seeded, unseeded = lines[:4], lines[4:]
    assert [line["client"] for line in seeded if not is_same(line["image"], expected[line["step"]])] == []
    assert [line["client"] for line in unseeded if not is_sepia(line["image"])] == []


def test_the_measures_of_these_tests_tell_the_adapter_from_the_base(
    service: Service, expected: dict[str, NDArray[np.uint8]]
) -> None:
    plain = service.draw(PROMPT, model="demo/sdxl", seed=7).astype(int)
    assert not is_same(plain, expected["generate"])
    assert not is_sepia(plain)
