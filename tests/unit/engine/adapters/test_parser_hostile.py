"""Files that must be refused are, each for its own reason, quickly, and without a trace of where they lie."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import BaseManifest, manifest_of
from serve_app.settings import AdapterLimits
from tests.hostile_files import CORPUS
from tests.tiny import tiny_pipeline

LIMIT_S = 5.0


@pytest.fixture(scope="module")
def manifest() -> BaseManifest:
    return manifest_of(tiny_pipeline("sd15"))


@pytest.mark.parametrize("case", CORPUS)
def test_a_hostile_file_is_refused_for_its_own_reason(case: str, manifest: BaseManifest, tmp_path: Path) -> None:
    kind, make = CORPUS[case]
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(make())
    started = time.process_time()
    with pytest.raises(kind) as refusal:
        parse_adapter(path, "owner/adapter", manifest, AdapterLimits())
    assert time.process_time() - started < LIMIT_S
    sentence = str(refusal.value)
    assert sentence.startswith("adapter owner/adapter is refused: ")
    assert str(tmp_path) not in sentence
    assert len(sentence) < 500
    assert sentence.isprintable()


def test_the_corpus_has_at_least_forty_files() -> None:
    assert len(CORPUS) >= 40
