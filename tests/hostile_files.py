"""A corpus of adapter files that must be refused, and with which error, made for the tiny SD1.5."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from serve_app.refusals import (
    MalformedFile,
    NoLayerMatches,
    NonFinite,
    NotAnAdapter,
    RankTooHigh,
    RefusedAdapter,
    ShapeMismatch,
    UnsafeFile,
    UnsupportedMethod,
)
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import as_kohya, loha, lokr, lora
from tests.tiny_forms import described, modules_in

Case = tuple[type[RefusedAdapter], Callable[[], bytes]]


class Evil:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/loraplex-was-here",)


def good() -> dict[str, Tensor]:
    """Return the tensors of an ordinary file."""
    return lora(tiny_pipeline("sd15"))


def kohya() -> dict[str, Tensor]:
    """Return the tensors of an ordinary kohya file."""
    return as_kohya(good(), alpha=4)


FIRST = next(iter(good()))
SECOND = FIRST.replace("lora_A", "lora_B")
ALPHA = next(key for key in kohya() if key.endswith(".alpha"))
KOHYA_DOWN = ALPHA.replace(".alpha", ".lora_down.weight")


def raw(header: Any, body: bytes = b"", *, size: int | None = None) -> bytes:
    """Return a file with this header, as JSON unless it is bytes, and this claim of the header's size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def entry(shape: list[Any], start: Any, end: Any, dtype: Any = "F16") -> dict[str, Any]:
    """Return one tensor's line of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def changed(**tensors: Tensor | None) -> Callable[[], bytes]:
    """Return the ordinary file with tensors replaced, by their names here, or left out."""
    names = {"down": FIRST, "up": SECOND}

    def make() -> bytes:
        merged = good() | {names[name]: tensor for name, tensor in tensors.items()}
        return save({key: tensor for key, tensor in merged.items() if tensor is not None})

    return make


def with_tensor(key: str, tensor: Tensor) -> Callable[[], bytes]:
    """Return the ordinary file with one more tensor."""
    return lambda: save({**good(), key: tensor})


def with_alpha(alpha: Tensor) -> Callable[[], bytes]:
    """Return the kohya file with one layer's alpha replaced."""
    return lambda: save({**kohya(), ALPHA: alpha})


def with_metadata(text: str) -> Callable[[], bytes]:
    """Return the ordinary file with this metadata."""
    return lambda: save(good(), metadata={"lora_adapter_metadata": text})


def with_settings(**settings: Any) -> Callable[[], bytes]:
    """Return the ordinary file with these settings in its metadata."""
    return lambda: with_metadata(json.dumps(described(good(), "unet", **{"r": 4, "lora_alpha": 4, **settings})))()


def cut(share: float) -> Callable[[], bytes]:
    """Return the beginning of the ordinary file."""

    def make() -> bytes:
        whole = save(good())
        return whole[: int(len(whole) * share)]

    return make


def archive() -> bytes:
    """Return what `torch.save` writes, with a payload."""
    file = io.BytesIO()
    torch.save({FIRST: Evil()}, file)
    return file.getvalue()


def zipped() -> bytes:
    """Return a small archive that unpacks to a large file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped_file:
        zipped_file.writestr("data.pkl", b"\0" * 10_000_000)
    return file.getvalue()


def without(tensors: Mapping[str, Tensor], ending: str) -> bytes:
    """Return a file of these tensors but for the first that ends so."""
    left_out = next(key for key in tensors if key.endswith(ending))
    return save({key: tensor for key, tensor in tensors.items() if key != left_out})


HALF = torch.float16
ZEROS = torch.zeros
PICKLES: dict[str, Case] = {
    "pickle with a payload": (UnsafeFile, lambda: pickle.dumps(Evil())),
    "torch.save with a payload": (UnsafeFile, archive),
    "old pickle protocol": (UnsafeFile, lambda: pickle.dumps({"a": 1}, protocol=2)),
    "zip bomb": (UnsafeFile, zipped),
}
CONTAINERS: dict[str, Case] = {
    "empty file": (MalformedFile, lambda: b""),
    "five bytes": (MalformedFile, lambda: b"hello"),
    "text": (MalformedFile, lambda: b"version https://git-lfs.example/spec/v1 oid sha256:0 size 12345"),
    "noise": (MalformedFile, lambda: b"\x00" + os.urandom(4095)),
    "cut in the body": (MalformedFile, cut(0.5)),
    "cut in the header": (MalformedFile, cut(0.01)),
    "cut by one byte": (MalformedFile, lambda: save(good())[:-1]),
    "one byte too many": (MalformedFile, lambda: save(good()) + b"\0"),
    "header size of 2^62": (MalformedFile, lambda: raw(b"{}", size=2**62)),
    "header size past the end": (MalformedFile, lambda: raw(b"{}", size=1000)),
    "header size of zero": (MalformedFile, lambda: raw(b"{}", size=0)),
    "header that is no JSON": (MalformedFile, lambda: raw(b"{nope nope}")),
    "header that is a list": (MalformedFile, lambda: raw(b"[1, 2, 3]")),
    "header nested without end": (MalformedFile, lambda: raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    "header of no text": (MalformedFile, lambda: raw(b'{"\xff\xfe": 1}')),
    "metadata that is a number": (MalformedFile, lambda: raw({"__metadata__": 7, FIRST: entry([1], 0, 2)}, b"\0\0")),
    "metadata of numbers": (MalformedFile, lambda: raw({"__metadata__": {"a": 1}, FIRST: entry([1], 0, 2)}, b"\0\0")),
    "no tensors": (NotAnAdapter, lambda: raw({})),
    "same key twice": (
        MalformedFile,
        lambda: raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 2)).encode(),) * 2), b"\0\0"),
    ),
    "entry that is a number": (MalformedFile, lambda: raw({FIRST: 3})),
    "entry without a shape": (MalformedFile, lambda: raw({FIRST: {"dtype": "F16", "data_offsets": [0, 2]}}, b"\0\0")),
    "entry with more than is known": (MalformedFile, lambda: raw({FIRST: {**entry([1], 0, 2), "x": 1}}, b"\0\0")),
    "unknown type": (MalformedFile, lambda: raw({FIRST: entry([1], 0, 2, "Q9")}, b"\0\0")),
    "type that is a list": (MalformedFile, lambda: raw({FIRST: entry([1], 0, 2, ["F16"])}, b"\0\0")),
    "whole numbers": (MalformedFile, lambda: save({key: tensor.long() for key, tensor in good().items()})),
    "booleans": (MalformedFile, lambda: save({key: tensor.bool() for key, tensor in good().items()})),
    "huge shape over a small body": (MalformedFile, lambda: raw({FIRST: entry([2**31, 2**31], 0, 16)}, b"\0" * 16)),
    "shape whose product wraps": (MalformedFile, lambda: raw({FIRST: entry([2**40, 2**40, 0], 0, 2)}, b"\0\0")),
    "negative shape": (MalformedFile, lambda: raw({FIRST: entry([-1, -1], 0, 2)}, b"\0\0")),
    "fractional shape": (MalformedFile, lambda: raw({FIRST: entry([1.0], 0, 2)}, b"\0\0")),
    "shape of true": (MalformedFile, lambda: raw({FIRST: entry([True], 0, 2)}, b"\0\0")),
    "too many dimensions": (MalformedFile, lambda: raw({FIRST: entry([1] * 40, 0, 2)}, b"\0\0")),
    "negative offset": (MalformedFile, lambda: raw({FIRST: entry([1], -2, 0)}, b"\0\0")),
    "offsets swapped": (MalformedFile, lambda: raw({FIRST: entry([1], 2, 0)}, b"\0\0")),
    "offsets overlapping": (
        MalformedFile,
        lambda: raw({FIRST: entry([4, 2], 0, 16), SECOND: entry([4, 2], 8, 24)}, b"\0" * 24),
    ),
    "offsets with a gap": (
        MalformedFile,
        lambda: raw({FIRST: entry([4, 2], 0, 16), SECOND: entry([4, 2], 24, 40)}, b"\0" * 40),
    ),
    "body that nothing describes": (MalformedFile, lambda: raw({FIRST: entry([1], 0, 2)}, b"\0" * 4096)),
    "name of a thousand letters": (MalformedFile, lambda: raw({"a" * 1000: entry([1], 0, 2)}, b"\0\0")),
    "thirty thousand tensors": (
        RefusedAdapter,
        lambda: raw({f"unet.m{number}.lora_A.weight": entry([0], 0, 0) for number in range(30_000)}),
    ),
}
VALUES: dict[str, Case] = {
    "NaN in one factor": (NonFinite, changed(down=torch.full_like(good()[FIRST], float("nan")))),
    "infinity in one factor": (NonFinite, changed(up=torch.full_like(good()[SECOND], float("inf")))),
    "one NaN among many values": (NonFinite, lambda: _with_one_nan()),
    "float64 beyond float32": (NonFinite, changed(down=torch.full(good()[FIRST].shape, 1e300, dtype=torch.float64))),
    "product that overflows": (
        NonFinite,
        lambda: save({key: torch.full_like(tensor, 1e30, dtype=torch.float32) for key, tensor in good().items()}),
    ),
    "alpha NaN": (NonFinite, with_alpha(torch.tensor(float("nan")))),
    "alpha infinite": (NonFinite, with_alpha(torch.tensor(float("inf")))),
    "alpha of 1e38": (NonFinite, with_alpha(torch.tensor(1e38))),
    "alpha of three values": (MalformedFile, with_alpha(torch.ones(3))),
    "alpha of no value": (MalformedFile, with_alpha(torch.ones(0))),
}
LAYERS: dict[str, Case] = {
    "factors of different rank": (ShapeMismatch, changed(down=good()[FIRST][:2])),
    "one factor missing": (MalformedFile, changed(up=None)),
    "other factor missing": (MalformedFile, changed(down=None)),
    "kohya factor missing": (MalformedFile, lambda: without(kohya(), "lora_up.weight")),
    "wrong input width": (ShapeMismatch, changed(down=ZEROS(4, 7, dtype=HALF))),
    "wrong output width": (ShapeMismatch, changed(up=ZEROS(7, 4, dtype=HALF))),
    "rank zero": (MalformedFile, changed(down=good()[FIRST][:0], up=good()[SECOND][:, :0])),
    "rank over the limit": (RankTooHigh, changed(down=ZEROS(600, 32, dtype=HALF), up=ZEROS(32, 600, dtype=HALF))),
    "flat factors": (ShapeMismatch, changed(down=good()[FIRST].flatten(), up=good()[SECOND].flatten())),
    "kernels on a linear layer": (ShapeMismatch, changed(down=ZEROS(4, 32, 3, 3, dtype=HALF))),
    "bias where the base has none": (ShapeMismatch, with_tensor(SECOND.replace(".weight", ".bias"), ZEROS(32))),
    "magnitudes of another width": (
        ShapeMismatch,
        with_tensor(FIRST.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(7)),
    ),
    "kohya magnitudes of another width": (
        ShapeMismatch,
        lambda: save({**kohya(), ALPHA.replace("alpha", "dora_scale"): torch.ones(1, 7)}),
    ),
    "same layer under two names": (MalformedFile, lambda: save({**good(), **kohya()})),
    "LoHa with a part missing": (MalformedFile, lambda: without(loha(tiny_pipeline("sd15")), "hada_w2_b")),
    "LoHa of another width": (
        ShapeMismatch,
        lambda: save({key: _halved(tensor) for key, tensor in loha(tiny_pipeline("sd15")).items()}),
    ),
    "LoKr with a part missing": (MalformedFile, lambda: without(lokr(tiny_pipeline("sd15")), "lokr_w2")),
    "LoKr of another width": (
        ShapeMismatch,
        lambda: save({key: _halved(tensor) for key, tensor in lokr(tiny_pipeline("sd15")).items()}),
    ),
    "LoRA and LoHa in one layer": (
        UnsupportedMethod,
        lambda: save({**kohya(), ALPHA.replace("alpha", "hada_w1_a"): torch.ones(32, 4)}),
    ),
}
BASES: dict[str, Case] = {
    "made for SDXL": (RefusedAdapter, lambda: save(lora(tiny_pipeline("sdxl")))),
    "made for FLUX": (NoLayerMatches, lambda: save(lora(tiny_pipeline("flux")))),
    "made for SD3": (NoLayerMatches, lambda: save(lora(tiny_pipeline("sd3")))),
    "layers that no base has": (
        NoLayerMatches,
        lambda: save({"unet.nope.lora_A.weight": ZEROS(4, 8), "unet.nope.lora_B.weight": ZEROS(8, 4)}),
    ),
    "kohya layers that no base has": (
        NoLayerMatches,
        lambda: save({"lora_unet_nope.lora_down.weight": ZEROS(4, 8), "lora_unet_nope.lora_up.weight": ZEROS(8, 4)}),
    ),
    "mostly another base's layers": (NoLayerMatches, lambda: save(_mostly_strange())),
    "a base model's own weights": (NotAnAdapter, lambda: save({"unet.conv_in.weight": ZEROS(32, 4, 3, 3)})),
    "a weight of the base beside": (MalformedFile, with_tensor("unet.conv_in.bias", torch.full((32,), 7.0))),
    "a wrapped weight of the base": (
        MalformedFile,
        with_tensor(FIRST.replace("lora_A.weight", "base_layer.weight"), ZEROS(32, 32)),
    ),
    "mostly keys of no part": (
        MalformedFile,
        lambda: save({**kohya(), **{f"lora_unet_bogus.weird{number}": torch.ones(1) for number in range(500)}}),
    ),
    "one layer in two spellings": (
        MalformedFile,
        lambda: save({**kohya(), KOHYA_DOWN.replace("lora_down", "lora_A"): kohya()[KOHYA_DOWN]}),
    ),
    "nothing but zeros": (
        NotAnAdapter,
        lambda: save({key: torch.zeros_like(tensor) for key, tensor in good().items()}),
    ),
    "alphas of zero": (
        NotAnAdapter,
        lambda: save({key: tensor * (0 if key.endswith("alpha") else 1) for key, tensor in kohya().items()}),
    ),
    "an empty layer name": (MalformedFile, with_tensor(".lora_A.weight", ZEROS(4, 8))),
    "a full change of a weight": (
        UnsupportedMethod,
        lambda: save({**kohya(), ALPHA.replace("alpha", "diff"): torch.ones(32, 32)}),
    ),
    "a change of a bias that the base lacks": (
        ShapeMismatch,
        lambda: save({**kohya(), ALPHA.replace("alpha", "diff_b"): torch.ones(32)}),
    ),
    "OFT": (UnsupportedMethod, lambda: save({"lora_unet_conv_in.oft_blocks": torch.ones(4, 8, 8)})),
    "BOFT": (UnsupportedMethod, lambda: save({"lora_unet_conv_in.boft_P": torch.ones(4, 8, 8)})),
    "GLoRA": (UnsupportedMethod, lambda: save({"lora_unet_conv_in.a1.weight": torch.ones(4, 8)})),
    "cloneofsimo's form": (UnsupportedMethod, lambda: save({"unet:0:up": torch.ones(4, 8)})),
    "IA3": (UnsupportedMethod, lambda: save({"lora_unet_conv_in.on_input": torch.ones(1)})),
    "control LoRA": (UnsupportedMethod, lambda: save({**good(), "lora_controlnet": torch.ones(1)})),
}
METADATA: dict[str, Case] = {
    "metadata that is no JSON": (MalformedFile, with_metadata("{nope")),
    "metadata that is a list": (MalformedFile, with_metadata("[1, 2]")),
    "metadata nested without end": (MalformedFile, with_metadata("[" * 200_000)),
    "metadata with an unknown setting": (UnsupportedMethod, with_settings(wizardry=1)),
    "metadata with a rank of text": (MalformedFile, with_settings(r="x")),
    "metadata with another rank": (MalformedFile, with_settings(r=8)),
    "metadata with a fractional rank": (MalformedFile, with_settings(r=4.5)),
    "metadata with alpha 1e38": (NonFinite, with_settings(lora_alpha=1e38)),
    "metadata with alpha NaN": (MalformedFile, with_settings(lora_alpha=float("nan"))),
    "metadata with alpha true": (MalformedFile, with_settings(lora_alpha=True)),
    "metadata with a back reference": (UnsupportedMethod, with_settings(alpha_pattern={r"([a-z_.]+)\1": 4})),
    "metadata with patterns in a list": (MalformedFile, with_settings(alpha_pattern=[1])),
    "metadata with a pattern of text": (MalformedFile, with_settings(alpha_pattern={modules_in(good())[0]: "x"})),
    "metadata with flags of text": (MalformedFile, with_settings(use_rslora="yes")),
    "metadata with whole modules": (UnsupportedMethod, with_settings(modules_to_save=["conv_in"])),
    "metadata that replicates layers": (UnsupportedMethod, with_settings(layer_replication=[[0, 1]])),
    "metadata that trains biases": (UnsupportedMethod, with_settings(bias="all")),
    "metadata that transposes": (UnsupportedMethod, with_settings(fan_in_fan_out=True)),
    "metadata that rewrites the base": (UnsupportedMethod, with_settings(init_lora_weights="olora")),
    "metadata that wants PiSSA": (UnsupportedMethod, with_settings(init_lora_weights="pissa_niter_4")),
    "metadata with a list for a start": (UnsupportedMethod, with_settings(init_lora_weights=["gaussian"])),
    "metadata that imports a module": (UnsupportedMethod, with_settings(megatron_config={"a": 1})),
    "metadata that targets parameters": (UnsupportedMethod, with_settings(target_parameters=["conv_in.weight"])),
    "metadata that trains tokens": (UnsupportedMethod, with_settings(trainable_token_indices=[0, 1])),
    "metadata of DoRA without magnitudes": (MalformedFile, with_settings(use_dora=True)),
    "metadata beside alphas": (
        MalformedFile,
        lambda: save(
            {**good(), FIRST.replace("lora_A.weight", "alpha"): torch.tensor(1.0)},
            metadata={"lora_adapter_metadata": json.dumps(described(good(), "unet", r=4, lora_alpha=4))},
        ),
    ),
}
CORPUS: dict[str, Case] = PICKLES | CONTAINERS | VALUES | LAYERS | BASES | METADATA


def _with_one_nan() -> bytes:
    tensors = good()
    tensors[SECOND] = tensors[SECOND].clone()
    tensors[SECOND][-1, -1] = float("nan")
    return save(tensors)


def _halved(tensor: Tensor) -> Tensor:
    return tensor[: tensor.shape[0] // 2].contiguous() if tensor.ndim else tensor


def _mostly_strange() -> dict[str, Tensor]:
    strange = {f"unet.other.{number}.lora_{half}.weight": ZEROS(4, 4) for number in range(40) for half in "AB"}
    return {**good(), **strange}
