"""Every row of the table of refusals in docs/adapters.md: its file is refused with that code and that sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from serve_app.catalog.reading.base_match import match_bases
from serve_app.catalog.reading.bases import BaseArchitecture
from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.header import describe, joined, read_header
from serve_app.catalog.reading.inspector import AdapterInfo
from serve_app.catalog.reading.repository import RepositoryFile, RepositoryListing
from serve_app.catalog.reading.selection import candidates
from serve_app.engine.adapters.parser import parse_adapter
from serve_app.engine.adapters.safetensors_file import FilePart
from serve_app.refusals import RefusedAdapter
from serve_app.settings import AdapterLimits
from tests.spelt_adapters import KOHYA, SPELLINGS, base_of, spelt

DOCS = (Path(__file__).parents[4] / "docs/adapters.md").read_text()
SECTION = DOCS.split("## What is refused")[1].split("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("| ")
][1:]
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
Changes = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


DOWN, UP = f"{kohya(TO_Q)}.{KOHYA['down']}", f"{kohya(TO_Q)}.{KOHYA['up']}"


def file(
    change: Changes, family: str = "sd15", method: str = "LoRA", metadata: dict[str, Any] | None = None,
    *, fuses: bool = True,
) -> Any:  # fmt: skip
    """Return what reads an ordinary file with a change; one of FLUX is in ComfyUI's names."""

    def read(folder: Path) -> None:
        base = base_of(family)
        spelling = "kohya, diffusers' names" if family == "sd15" else "ComfyUI, original names"
        tensors, _ = spelt(base, SPELLINGS[spelling], method)
        said = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
        save_file(change(tensors), folder / "a.safetensors", metadata=said)
        manifest = replace(base.manifest, fuses=fuses)
        parse_adapter(folder / "a.safetensors", "a/b", manifest, AdapterLimits(max_rank=8))

    return read


def listed(*names: str, filename: str | None = None, index: dict[str, str] | None = None) -> Callable[[Path], object]:
    files = RepositoryListing("a/b", "hub", "a/b", None, tuple(RepositoryFile(name, 9) for name in names), Card())
    return lambda _: candidates(files, filename, {"x.safetensors.index.json": index} if index else {})


def two_alike(folder: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.ones(4, 4)}, folder / "a.safetensors")
    parts = [FilePart(folder / "a.safetensors")] * 2
    parse_adapter(parts, "a/b", base_of("sd15").manifest, AdapterLimits())


def fits_two_families(folder: Path) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 3072), f"{name}.lora_B.weight": torch.ones(3072, 1)}
    save_file(tensors, folder / "a.safetensors")
    facts = describe(read_header(folder / "a.safetensors"))
    match = match_bases("a/b", [], [], facts, [BaseArchitecture("flux", "flux", "transformer")])
    raise AdapterInfo("a/b", "hub", "a/b", "r", ("a.safetensors",), 1, None, facts, match).ambiguity()


def extra(name: str, tensor: Tensor | None = None) -> Any:
    return file(lambda t: t | {name: torch.ones(4, 64) if tensor is None else tensor})


UNSERVED = ("oft_blocks", "boft_x", "on_input", "a1.weight", "lora_controlnet", "modules_to_save.weight")
CASES: dict[str, list[Callable[[Path], object]]] = {
    "OFT, BOFT": [extra("unet:0:up"), *(extra(f"{kohya(TO_Q)}.{ending}") for ending in UNSERVED)],
    "anything but LoRA factors": [
        file(lambda t: t, method=method, fuses=False)
        for method in ("DoRA, a magnitude per output", "LoHa", "LoKr", "full differences")
    ],
    "methods mixed": [extra(f"{kohya(TO_Q)}.hada_w1_a")],
    "a magnitude per input": [file(lambda t: t, "flux", "DoRA, a magnitude per input")],
    "one layer in two spellings": [
        file(
            lambda t: t | {f"unet.{TO_Q}.lora_A.weight": t[DOWN].clone(), f"unet.{TO_Q}.lora_B.weight": t[UP].clone()}
        ),
        extra(f"{kohya(TO_Q)}.lora_A.weight"),
    ],
    "a factor that is missing": [
        file(lambda t: {key: tensor for key, tensor in t.items() if key != UP}),
        file(lambda t: t | {UP: t[UP].to(torch.int32)}),
    ],
    "a weight of the base": [extra(f"unet.{TO_Q}.weight")],
    "mostly tensors": [file(lambda t: t | {f"whatever{n}": torch.ones(1) for n in range(40)})],
    "no factors": [
        file(lambda _: {"whatever": torch.ones(1)}),
        file(lambda t: {key: tensor * 0 for key, tensor in t.items()}),
    ],
    "shards of which": [
        listed("x-00001-of-00002.safetensors"),
        listed("one.safetensors", index={"a": "one.safetensors", "b": "two.safetensors"}),
        listed(*(f"x-{n:05}-of-00033.safetensors" for n in range(1, 34))),
    ],
    "one shard named": [
        listed(*(f"x-0000{n}-of-00002.safetensors" for n in (1, 2)), filename="x-00001-of-00002.safetensors")
    ],
    "a shard that lacks": [two_alike],
    "fewer than half": [file(lambda t: {key.replace("_unet_", "_unet_gone_"): tensor for key, tensor in t.items()})],
    "other widths": [file(lambda t: t | {DOWN: t[DOWN][:, :-1].contiguous()})],
    "a rank over": [file(lambda t: t | {DOWN: torch.ones(9, t[DOWN].shape[1]), UP: torch.ones(len(t[UP]), 9)})],
    "NaN, infinity": [
        file(lambda t: t | {UP: t[UP] * float("nan")}),
        file(lambda t: t | {UP: t[UP] * 1e30}),
    ],
    "metadata or": [file(lambda t: t, metadata={"unet.r": 4, "unet.bias": "all"})],
    "alphas by": [file(lambda t: t, metadata={"unet.r": 4, "unet.alpha_pattern": {"(?=a)": 1}})],
    "a file that fits several": [fits_two_families],
}


def test_the_table_and_the_cases_have_the_same_rows() -> None:
    assert len(ROWS) == len(CASES)
    assert all(sum(row[0].startswith(start) for row in ROWS) == 1 for start in CASES)


@pytest.mark.parametrize("start", CASES)
def test_each_row_of_the_table_is_refused_with_its_sentence(start: str, tmp_path: Path) -> None:
    (what, code, sentence) = next(row for row in ROWS if row[0].startswith(start))
    told = [re.compile(".*".join(map(re.escape, part.strip().split("...")))) for part in sentence.split(";")]
    for case in CASES[start]:
        with pytest.raises(RefusedAdapter) as refusal:
            case(tmp_path)
        assert refusal.value.code == code.strip("`"), what
        assert any(one.search(refusal.value.reason) for one in told), refusal.value.reason


def test_a_joined_header_holds_no_tensor_twice(tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="two of its files hold the tensor"):
        joined([("", read_header(tmp_path / "a.safetensors"))] * 2)
