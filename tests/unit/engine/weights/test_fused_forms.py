"""Fused weights equal diffusers' own, bit for bit, in every form and dtype that diffusers applies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serve_app.engine.adapters.canonical import read_canonical, write_canonical
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.base.manifest import adaptable_components, manifest_of
from serve_app.engine.weights.fused import FusedWeights
from serve_app.settings import AdapterLimits
from tests.tiny import FAMILIES, tiny_pipeline
from tests.tiny_forms import forms_of, fused_by_diffusers, put, unequal, weights_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# SDXL's tree is the large one: it is tried where it differs from SD1.5's, two text encoders and kohya's layers.
SDXL_FORMS = ("peft, attention", "peft, text encoders", "peft, DoRA", "kohya, convolutions", "kohya, text encoders")


def _matrix() -> list[object]:
    """Every form in bfloat16 for SD1.5, and in one dtype in turn for each family."""
    cases: list[object] = []
    for family in FAMILIES:
        forms = [form for form in forms_of(family) if family != "sdxl" or form in SDXL_FORMS]
        for place, form in enumerate(forms):
            dtypes = {DTYPES[place % 3], torch.bfloat16 if family == "sd15" else DTYPES[place % 3]}
            cases.append(pytest.param(family, form, dtypes, id=f"{family}: {form}"))
    return cases


@pytest.mark.parametrize(("family", "form", "dtypes"), _matrix())
def test_fused_weights_equal_a_fresh_load_and_fuse_by_diffusers(
    family: str, form: str, dtypes: set[torch.dtype], tmp_path: Path
) -> None:
    path = put(tmp_path, form, forms_of(family)[form](tiny_pipeline(family)))
    for dtype in dtypes:
        live = tiny_pipeline(family, dtype)
        adapter = parse_adapter(path, form, manifest_of(live), AdapterLimits())
        write_canonical(adapter, tmp_path / "canonical")
        weights = FusedWeights(adaptable_components(live))
        weights.apply([(read_canonical(tmp_path / "canonical"), 0.7)])

        expected = weights_of(fused_by_diffusers(family, dtype, [(path, 0.7)]))

        assert unequal(weights_of(live), expected) == [], f"in {dtype}"
        assert unequal(expected, weights_of(tiny_pipeline(family, dtype))) != [], "diffusers changed nothing"

        narrow = tiny_pipeline(family, dtype)
        in_place = FusedWeights(adaptable_components(narrow), base_weights="host")
        in_place.apply([(read_canonical(tmp_path / "canonical"), 0.7)])
        assert unequal(weights_of(narrow), expected) == [], f"in {dtype}, in place"
        assert adapter.coverage.layers_matched == adapter.coverage.layers_in_file
