"""Which quantised bases are served: by the word of the configuration, or by what a packed part says of itself.

Pure, so that `loraplex check` says as much as a replica does when it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Quantization = Literal["int8", "float8", "nf4"]
# The package that packs weights and computes with them.
PACKAGES: Mapping[Quantization, str] = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}
# What it writes as its kind into the configuration of a packed part.
_TORCHAO_KINDS: Mapping[str, Quantization] = {"Int8WeightOnlyConfig": "int8", "Float8WeightOnlyConfig": "float8"}
SERVED = "int8 and float8 weights of torchao and nf4 weights of bitsandbytes are served"


def quantization_of(packing: Mapping[str, Any]) -> Quantization | None:
    """Return the word for a part's `quantization_config`; None where such weights are not served."""
    if packing.get("quant_method") == "torchao":
        return _TORCHAO_KINDS.get(_torchao_kind(packing))
    is_nf4 = bool(packing.get("load_in_4bit")) and packing.get("bnb_4bit_quant_type") == "nf4"
    return "nf4" if packing.get("quant_method") == "bitsandbytes" and is_nf4 else None


def packing_name(packing: Mapping[str, Any]) -> str:
    """Return how an operator reads of a part's `quantization_config`."""
    return f"{packing.get('quant_method', 'in an unknown way')} {_torchao_kind(packing)}".rstrip()


def _torchao_kind(packing: Mapping[str, Any]) -> str:
    kinds = packing.get("quant_type")
    kind: Any = kinds.get("default") if isinstance(kinds, dict) else None
    return str(kind.get("_type", "")) if isinstance(kind, dict) else ""
