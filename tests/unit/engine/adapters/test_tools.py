"""Files as the tools themselves write them: what LyCORIS, peft and diffusers compute with them is the truth."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from serve_app.engine.adapters.parser import parse_adapter
from serve_app.settings import AdapterLimits
from tests.adapter_changes import changes
from tests.spelt_adapters import Base, base_of

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FAMILIES = ("sd15", "flux", "sd3", "z-image")


def merged(base: Base, denoiser: nn.Module) -> dict[str, Tensor]:
    """Return what differs between a denoiser with a merged adapter and the base: module -> difference."""
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in denoiser.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, pristine in base.denoiser.state_dict().items():
        if not torch.equal(weights[name], pristine):
            found[name.removesuffix(".weight")] = weights[name].double() - pristine.double()
    return found


def compare(base: Base, path: Path, truth: dict[str, Tensor], settings: str | None = None) -> None:
    """Hold what a file changes against what its tool merged."""
    adapter = parse_adapter(path, "a/b", base.manifest, AdapterLimits(), settings=settings)
    assert adapter.coverage.layers_matched == adapter.coverage.layers_in_file
    found = changes(base, adapter)
    assert found.keys() == truth.keys()
    for module, expected in truth.items():
        torch.testing.assert_close(found[module], expected, rtol=1e-4, atol=1e-6, msg=module)


def computed(base: Base, denoiser: nn.Module) -> dict[str, Tensor]:
    """Return what linear layers with an adapter compute, less their pristine weights: module -> difference."""
    found: dict[str, Tensor] = {}
    for name, module in base.denoiser.named_modules():
        if isinstance(module, nn.Linear):
            layer = denoiser.get_submodule(name)
            with torch.no_grad():
                change = (layer(torch.eye(module.in_features)) - layer(torch.zeros(1, module.in_features))).T
            if (change - module.weight).abs().max() > 1e-5:
                found[name] = change.double() - module.weight.double()
    return found


def lora_config(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=3, init_lora_weights=False, target_modules=list(TARGETS), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_of_diffusers_saves_by_itself_has_its_scale(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    denoiser: Any = copy.deepcopy(base.denoiser)
    denoiser.add_adapter(lora_config())
    denoiser.save_lora_adapter(tmp_path)
    denoiser.fuse_lora()
    compare(base, tmp_path / "pytorch_lora_weights.safetensors", merged(base, denoiser))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["LoRA", "DoRA", "rsLoRA"])
def test_what_peft_saves_has_the_scale_of_its_settings(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = base_of(family)
    model: Any = get_peft_model(copy.deepcopy(base.denoiser), lora_config(**options))
    model.save_pretrained(tmp_path)
    settings = (tmp_path / "adapter_config.json").read_text()
    model.merge_adapter()
    compare(base, tmp_path / "adapter_model.safetensors", merged(base, model.base_model.model), settings)


ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "DoRA per input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha with DoRA": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True, "linear_dim": 10000},
    "lokr with DoRA": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "full": {"algo": "full"},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_what_lycoris_saves_is_what_its_layers_compute(family: str, algorithm: str, tmp_path: Path) -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    import lycoris

    base = base_of(family)
    denoiser = copy.deepcopy(base.denoiser)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention", "FluxAttention", "FeedForward"]})
    settings = {"linear_dim": 4, "linear_alpha": 3} | ALGORITHMS[algorithm]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = lycoris.create_lycoris(denoiser, 1.0, **settings)
        network.apply_to()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "dora_scale" in name:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
                elif parameter.ndim:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path / "lycoris.safetensors"
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}, path)
    compare(base, path, computed(base, denoiser))
