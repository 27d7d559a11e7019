"""Parts of a family's table: tensors of the Hugging Face file, leaves of our trees, and the map between them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import LayerKind, Rope
from jaxalign.outside import Fields, brief

log = logging.getLogger(__name__)


class HfConfig(Fields):
    """The fields of a config.json, which remembers those that were read: the others are judged afterwards."""

    def __init__(self, content: Any, where: str = "config.json"):
        super().__init__(content, where)
        self.keys_read: set[str] = set()

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """`Fields.get`, remembered."""
        self.keys_read.add(key)
        return super().get(key, kind, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A number of parts, such as heads or layers. Raises Mistake unless it is from 1 to its limit in LARGEST."""
        value, largest = self.get(key, int, ... if default is None else default), LARGEST.get(key, 1 << 24)
        if not 1 <= value <= largest:
            raise Mistake(f"{self.where}: {key!r} is {brief(value)}; it must be from 1 to {largest:,}")
        return value

    def defaults(self, **values: Any) -> HfConfig:
        """The same fields, with values for those that are absent; null is a value."""
        return self._with(values | self.content)

    def replaced(self, **values: Any) -> HfConfig:
        """The same fields with other values."""
        return self._with(self.content | values)

    def _with(self, content: dict[str, Any]) -> HfConfig:
        other = HfConfig(content, self.where)
        other.keys_read = self.keys_read
        return other

    def object(self, key: str) -> HfConfig:
        """The object under a key, of which the caller checks what was read; an empty one if it is absent."""
        return HfConfig(self.get(key, dict, {}), f"{self.where}: {key!r}")


# Sizes above these belong to no model: a damaged or hostile config is refused before anything has its size.
LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "head_dim": 65_536}


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


def norm_eps(hf: HfConfig, key: str, default: float) -> float:
    eps = hf.get(key, float, default)
    if eps < 0 or (key in hf.content and key not in hf):
        raise Mistake(f"{hf.where}: {key!r} is {brief(hf.content[key])}; it must be a number of at least 0")
    return eps


def activation(hf: HfConfig, key: str, default: str) -> str:
    name = hf.get(key, str, default)
    if name not in ACTIVATIONS:
        raise Mistake(
            f"{hf.where}: {key!r}: activation {brief(name)!r} is not supported; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def require(hf: HfConfig, **expected: Any) -> None:
    """Raises Mistake if the config sets a variant that changes the numbers and that our decoder does not compute.

    Args:
      expected: the one value that each field may have, besides null; a tuple holds several.
    """
    for name, values in expected.items():
        hf.keys_read.add(name)
        value, values = hf.content.get(name), values if isinstance(values, tuple) else (values,)
        if value is not None and not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            only = " or ".join(map(repr, values)) or "null"
            raise Mistake(f"{hf.where}: {name}={brief(value)} is not supported; only {only} is")


def rope_settings(hf: HfConfig) -> HfConfig:
    """Settings of rotary positions: `rope_scaling`, or `rope_parameters` where it is empty."""
    newer = hf.object("rope_parameters")
    older = hf.object("rope_scaling")
    return older if older.content else newer


def rope(
    hf: HfConfig,
    settings: HfConfig,
    head_dim: int,
    *,
    theta: float | None = None,
    share: float | None = None,
    kinds: tuple[str, ...] = ("default", "linear", "llama3"),
) -> Rope:
    """Rotary positions of one kind of layer.

    Args:
      hf: the whole config.
      settings: from `rope_settings`, or the part of it for this kind of layer.
      head_dim: width of a head.
      theta: base of the frequencies where `settings` has none; by default the config's rope_theta, or 10,000.
      share: part of a head that turns, where `settings` has none. None: the family turns whole heads, and transformers
        does not read a partial_rotary_factor there.
      kinds: values of rope_type that transformers computes for this family, of those known here.

    Raises:
      Mistake: a kind, a key or a value that our decoder does not compute.
    """
    kind = settings.get("rope_type", str, settings.get("type", str, "default"))
    if kind not in kinds:
        raise Mistake(f"{settings.where}: rope_type={brief(kind)!r} is not supported; known are {', '.join(kinds)}")
    for key, value in settings.content.items():
        if isinstance(value, dict):
            raise Mistake(f"{settings.where}: {brief(key)!r} is an object; this family has one rope for all layers")
    base = positive(settings, "rope_theta", positive(hf, "rope_theta", 10_000.0) if theta is None else theta)
    if share is not None:
        share = positive(settings, "partial_rotary_factor", share)
        if share > 1:
            raise Mistake(f"{settings.where}: 'partial_rotary_factor' (or 'rotary_pct') is {share:g}; it is at most 1")
    elif kind != "default":  # transformers makes tables of another width than the head, and fails
        require(settings, partial_rotary_factor=1.0)
        require(hf, partial_rotary_factor=1.0)
    dims = int(head_dim * (1.0 if share is None else share))
    if dims % 2 or not 0 < dims <= head_dim:
        raise Mistake(
            f"{settings.where}: {dims} of the {head_dim} numbers of a head turn, by 'head_dim' or 'hidden_size' and "
            "'num_attention_heads'; it must be an even number"
        )
    scaling = {}
    if kind != "default":
        scaling = {"scaling": kind, "factor": positive(settings, "factor")}
    if kind == "llama3":
        scaling |= {name: positive(settings, name) for name in ("low_freq_factor", "high_freq_factor")}
        longest = hf.get("max_position_embeddings", int, 2048)
        length = settings.get("original_max_position_embeddings", int, longest)
        scaling["original_length"] = hf.get("original_max_position_embeddings", int, length)
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise Mistake(f"{settings.where}: 'low_freq_factor' must be below 'high_freq_factor'")
    check_read(settings, harmless=("type",))
    return Rope(dims, base, **scaling)


def positive(fields: HfConfig, key: str, default: Any = ...) -> float:
    """A number above 0."""
    value = fields.get(key, float, default)
    if not 0 < value < math.inf:
        raise Mistake(f"{fields.where}: {key!r} is {value}; it must be above 0")
    return value


def check_read(hf: HfConfig, harmless: tuple[str, ...] = ()) -> None:
    """Logs the keys that neither this package nor transformers reads; they have no effect in either."""
    others = [brief(key) for key in hf if key not in hf.keys_read and key not in harmless]
    if others:
        note_once(f"{hf.where}: nothing reads {', '.join(others)}")


@functools.cache
def note_once(text: str) -> None:
    """Logs a text the first time that it comes."""
    log.info("%s", text)


def kinds(layers: list[LayerKind]) -> dict[str, tuple]:
    """The distinct kinds of the layers, and each layer's index among them."""
    distinct = tuple(dict.fromkeys(layers))
    return {"kinds": distinct, "layer_kinds": tuple(distinct.index(layer) for layer in layers)}


def layer_types(hf: HfConfig, default: list[str]) -> list[str]:
    """The kind of each layer, "sliding_attention" or "full_attention"."""
    types = hf.texts("layer_types") or default
    hf.keys_read.add("layer_types")
    if len(types) != len(default):
        raise Mistake(f"{hf.where}: 'layer_types' has {len(types)} entries, 'num_hidden_layers' is {len(default)}")
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise Mistake(
            f"{hf.where}: 'layer_types' holds {brief(', '.join(unknown))}; known are sliding_attention, full_attention"
        )
    return types
