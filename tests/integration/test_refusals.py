"""What cannot be served is refused with a sentence, and leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest

from tests.service import Service

PROMPT = "a white star on a black background"

REFUSALS = {
    "wrong base named": ({"model": "demo/sd15", "lora": "demo/sdxl-sepia"}, 400, ("demo/sdxl", "demo/sd15")),
    "does not exist": ({"lora": "demo/no-such-adapter"}, 404, ("demo/no-such-adapter",)),
    "no layer matches": ({"model": "broken/no-layer"}, 422, ("broken/no-layer", "layer")),
    "pickle": ({"model": "broken/pickled"}, 422, ("broken/pickled", "safetensors")),
    "truncated": ({"model": "broken/truncated"}, 422, ("broken/truncated",)),
    "not a number": ({"model": "broken/nan"}, 422, ("broken/nan",)),
    "card says another base": ({"model": "broken/mislabelled"}, 422, ("broken/mislabelled",)),
    "out of bounds": ({"width": 4096}, 400, ("width", "128")),
    "unknown parameter": ({"stepz": 3}, 400, ("stepz",)),
    "unknown scheduler": ({"scheduler": "Nope"}, 400, ("EulerDiscreteScheduler",)),
}


@pytest.fixture(scope="module")
def before(service: Service) -> np.ndarray:
    return drawn(service)


def drawn(service: Service) -> np.ndarray:
    return service.draw(PROMPT, model="demo/sdxl", seed=21, num_inference_steps=3)


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_its_reason_and_the_next_image_is_as_before(
    service: Service, before: np.ndarray, case: str
) -> None:
    asked, status, words = REFUSALS[case]
    reply = service.ask(PROMPT, **asked)  # type: ignore[arg-type]
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) >= {"error", "code"}
    for word in words:
        assert word in body["error"]
    assert "/tmp" not in reply.text
    assert "Traceback" not in reply.text
    assert np.array_equal(drawn(service), before)
