"""Spelling x method x family: each file through catalog and engine, against the change in float64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from serve_app.catalog.reading.header import describe, read_header
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.families.structure import FAMILIES as TRANSFORMERS
from serve_app.refusals import UnsupportedMethod
from serve_app.settings import AdapterLimits
from tests.adapter_changes import changes
from tests.spelt_adapters import FAMILIES, METHODS, SPELLINGS, base_of, is_indivisible, spelt

DOCS = Path(__file__).parents[4] / "docs/adapters.md"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_of_a_method_is_read_by_catalog_and_engine(family: str, method: str, tmp_path: Path) -> None:
    base, path = base_of(family), tmp_path / "adapter.safetensors"
    for name, spelling in SPELLINGS.items():
        tensors, truth = spelt(base, spelling, method)
        save_file(tensors, path)

        seen = describe(read_header(path))
        assert seen.has_pairs, name
        assert seen.components == {base.component}, name
        if base.component == "transformer":
            assert family in seen.families, name

        if is_indivisible(base, spelling, method):
            with pytest.raises(UnsupportedMethod, match="cannot be divided"):
                parse_adapter(path, "a/b", base.manifest, AdapterLimits())
            continue
        adapter = parse_adapter(path, "a/b", base.manifest, AdapterLimits())
        assert adapter.coverage.layers_matched == adapter.coverage.layers_in_file == seen.layers, name
        found = changes(base, adapter)
        assert found.keys() == truth.keys(), name
        for module, expected in truth.items():
            torch.testing.assert_close(found[module], expected, rtol=1e-4, atol=2e-6, msg=f"{name}: {module}")


def test_the_table_of_the_docs_has_every_spelling_method_and_family() -> None:
    text = DOCS.read_text(encoding="utf-8")
    table = text.split("## What is served", 1)[1].split("\n## ", 1)[0]
    for name in (*SPELLINGS, *METHODS):
        assert f"| {name} |" in table, name
    named = set(re.findall(r"`([a-z0-9-]+)`", text.split("Families:", 1)[1].split("\n", 1)[0]))
    assert named == set(FAMILIES)
    assert {family.name for family in TRANSFORMERS} <= named | {"lumina2", "fibo"}
