"""Random files: every tensor is applied or listed as unmatched, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from serve_app.engine.adapters.parser import parse_adapter
from serve_app.refusals import RefusedAdapter
from serve_app.settings import AdapterLimits
from tests.adapter_changes import changes
from tests.spelt_adapters import METHODS, SPELLINGS, Base, base_of

EXTRAS = ("iteration", "v_pred", "ztsnr", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha", "unet.gone.alpha")
NEEDED = ("<down>", "<up>", "hada_w1_a", "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w2_a")
Layer = tuple[str, str, bool]  # spelling, method, whether a part that it needs is left out


@st.composite
def files(draw: st.DrawFn) -> tuple[Base, list[Layer], list[str]]:
    """Draw a base, what each of its layers is spelt as, and tensors that are no part of any."""
    base = base_of(draw(st.sampled_from(("sd15", "flux", "chroma"))))
    spellings = [name for name, spelling in SPELLINGS.items() if not spelling.is_original]
    layer = st.tuples(
        st.sampled_from(spellings), st.sampled_from(list(METHODS)), st.integers(0, 9).map(lambda n: n == 0)
    )
    count = draw(st.integers(1, len(base.modules)))
    return (
        base,
        draw(st.lists(layer, min_size=count, max_size=count)),
        draw(st.lists(st.sampled_from(EXTRAS), unique=True)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(files())
def test_every_tensor_is_applied_or_listed_or_the_file_is_refused(
    tmp_path_factory: object, file: tuple[Base, list[Layer], list[str]]
) -> None:
    base, layers, extras = file
    tensors, truth, is_whole = {key: torch.ones(1) for key in extras}, {}, True
    for number, (module, (spelling_name, method, is_short)) in enumerate(zip(base.modules, layers, strict=False)):
        spelling = SPELLINGS[spelling_name]
        parts, change = METHODS[method](base.weight([module]), torch.Generator().manual_seed(number))
        left_out = next((part for part in parts if part in NEEDED), None) if is_short else None
        is_whole = is_whole and left_out is None
        ends = {"<down>": spelling.down, "<up>": spelling.up}
        stem = spelling.stem(base.component, module)
        tensors |= {f"{stem}.{ends.get(part, part)}": tensor for part, tensor in parts.items() if part != left_out}
        truth[module] = change
    path = Path(tmp_path_factory.mktemp("file")) / "a.safetensors"  # type: ignore[attr-defined]
    save_file(tensors, path)
    if not is_whole or len(extras) > len(tensors) - len(extras):
        with pytest.raises(RefusedAdapter):
            parse_adapter(path, "a/b", base.manifest, AdapterLimits())
        return
    adapter = parse_adapter(path, "a/b", base.manifest, AdapterLimits())
    coverage = adapter.coverage
    assert (coverage.layers_matched, coverage.layers_in_file) == (len(truth), len(truth) + len(extras))
    assert {name.removesuffix(".alpha") for name in extras} == {
        name.removesuffix(".alpha") for name in coverage.unmatched
    }
    found = changes(base, adapter)
    assert found.keys() == truth.keys()
    for module, expected in truth.items():
        torch.testing.assert_close(found[module], expected, rtol=1e-4, atol=2e-6)
