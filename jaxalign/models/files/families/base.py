"""Parts of a family's table: tensors of the Hugging Face file, leaves of our trees, and the map between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import LayerKind, Rope

HfConfig = Mapping[str, Any]


class TensorMap(NamedTuple):
    """One tensor of the file and the leaves that it fills; several leaves where the family fuses them.

    With "{layer}" in its name it stands for one tensor per layer, and the leaves lie under "blocks/".
    """

    name: str
    leaves: tuple[str, ...]
    to_ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_hf: Callable[[tuple[np.ndarray, ...]], np.ndarray]


def same(name: str, leaf: str) -> TensorMap:
    """A tensor that is the leaf itself."""
    return TensorMap(name, (leaf,), lambda x: (x,), lambda parts: parts[0])


def transposed(name: str, leaf: str) -> TensorMap:
    """A kernel [out, in] of torch's Linear, which is [in, out] here."""
    return TensorMap(name, (leaf,), lambda x: (x.T,), lambda parts: parts[0].T)


def fused_rows(name: str, leaves: tuple[str, ...], sizes: tuple[int, ...]) -> TensorMap:
    """Several Linear kernels stacked on torch's output axis: [Σ sizes, in]."""
    cuts = np.cumsum(sizes)[:-1]
    return TensorMap(
        name,
        leaves,
        lambda x: tuple(part.T for part in np.split(x, cuts, axis=0)),
        lambda parts: np.concatenate([part.T for part in parts], axis=0),
    )


def fused_last(name: str, leaves: tuple[str, ...], sizes: tuple[int, ...]) -> TensorMap:
    """Several kernels [in, out], or biases, side by side on the last axis: GPT-2's Conv1D keeps our orientation."""
    cuts = np.cumsum(sizes)[:-1]
    return TensorMap(
        name, leaves, lambda x: tuple(np.split(x, cuts, axis=-1)), lambda parts: np.concatenate(parts, axis=-1)
    )


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise Mistake(f"activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def require(hf: HfConfig, **expected: Any) -> None:
    """Raises Mistake if the config sets a variant that changes the numbers and is not implemented."""
    for name, value in expected.items():
        if hf.get(name, value) not in (value, None):
            raise Mistake(f"{name}={hf[name]!r} is not supported; only {value!r} is")


def rope(hf: HfConfig, head_dim: int, *, layer_type: str | None = None, theta: float = 10000.0) -> Rope:
    """Rotary positions from `rope_parameters` (transformers 5; maybe one per layer type) or rope_theta/rope_scaling."""
    settings = dict(hf.get("rope_parameters") or {})
    if layer_type in settings:
        settings = dict(settings[layer_type] or {})
    if not settings:
        settings = dict(hf.get("rope_scaling") or {})
        settings.setdefault("rope_theta", hf.get("rope_theta", theta))
    settings.setdefault("rope_theta", theta)
    share = settings.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1.0
    dims = int(head_dim * share)
    kind = settings.get("rope_type", settings.get("type", "default"))
    base = {"dims": dims, "theta": float(settings["rope_theta"])}
    if kind == "default":
        return Rope(**base)
    if kind == "linear":
        return Rope(**base, scaling="linear", factor=float(settings["factor"]))
    if kind == "llama3":
        return Rope(
            **base,
            scaling="llama3",
            factor=float(settings["factor"]),
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
            original_length=int(settings["original_max_position_embeddings"]),
        )
    raise Mistake(f"rope_type={kind!r} is not supported; known are default, linear, llama3")


def kinds(layers: list[LayerKind]) -> dict[str, tuple]:
    """The distinct kinds of the layers, and each layer's index among them."""
    distinct = tuple(dict.fromkeys(layers))
    return {"kinds": distinct, "layer_kinds": tuple(distinct.index(layer) for layer in layers)}


def layer_types(hf: HfConfig, default: list[str]) -> list[str]:
    """The kind of each layer, "sliding_attention" or "full_attention"."""
    types = list(hf.get("layer_types") or default)
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise Mistake(f"layer_types {sorted(unknown)} are not supported; known are sliding_attention, full_attention")
    return types
