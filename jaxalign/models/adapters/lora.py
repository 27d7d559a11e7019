"""LoRA: a frozen kernel W and a trained update of low rank, y = x W + scale · (x A) B; DoRA, with trained magnitudes.

    lora = Lora(rank=16, alpha=32.0, targets=resolve_targets("all-linear", config))
    graphdef, abstract = make_decoder(config, lora=lora)
    base, adapter = split(abstract)                   # shapes of the frozen leaves and of the trained ones
    adapter = init_adapter(adapter, key, base=params) # params: the leaves that load_params read
    model = nnx.merge(graphdef, join(adapter, params))

Adapters are leaves beside the kernel that they change (`blocks/attention/query/adapter/a`), stacked on the layer axis
and scanned with it. In training `state.params` is the adapter, `frozen` the base, and `Algorithm.assemble` is `join`.
The base alone, with the graphdef of `make_decoder` without `lora`, is the model before training: a reference policy
needs no second copy, and several adapters (policy, critic, members of an ensemble) share one base.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3. rsLoRA: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732. DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.mistake import Mistake
from jaxalign.models.adapters.quantise import kernel_shape, plain_kernel
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files.families import tensor_maps
from jaxalign.ops.product import product
from jaxalign.types import PyTree

ALL = "all-linear"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapted layers, and the rank and scale of their adapters; hashable."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # names of layers, such as attention/query, from `resolve_targets`
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank; with rslora alpha / sqrt(rank), so that the update does not shrink as the rank grows."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def linear_layers(config: ModelConfig) -> dict[str, str]:
    """{our name of a linear layer of a block: the Hugging Face module that holds its kernel, alone or fused}."""
    names = {}
    for tensor in tensor_maps(config):
        module = tensor.name.partition("{layer}.")[2].removesuffix(".weight")
        kernels = (leaf for leaf in tensor.leaves if leaf.startswith("blocks/") and leaf.endswith("/kernel"))
        names |= {leaf.removeprefix("blocks/").removesuffix("/kernel"): module for leaf in kernels}
    return names


def resolve_targets(text: str, config: ModelConfig) -> tuple[str, ...]:
    """The layers that `text` names.

    Args:
      text: "all-linear", or names and regular expressions between commas. Each must match a whole name of a layer: ours
        (`attention/query`), Hugging Face's (`self_attn.q_proj`), or the last part of either (`query`, `q_proj`).

    Raises:
      Mistake: a name that no layer has, or not a regular expression; the message lists what exists.
    """
    layers = linear_layers(config)
    patterns = [part.strip() for part in text.split(",") if part.strip()]
    targets: set[str] = set()
    for pattern in patterns:
        matched = set(layers) if pattern == ALL else {ours for ours in layers if _matches(pattern, ours, layers[ours])}
        if not matched:
            raise Mistake(f"target {pattern!r} names no linear layer; {_listed(layers, config)}")
        targets |= matched
    if not targets:
        raise Mistake(f"targets={text!r} names nothing; {_listed(layers, config)}")
    return tuple(name for name in layers if name in targets)


def _matches(pattern: str, ours: str, theirs: str) -> bool:
    names = ours, ours.rpartition("/")[2], theirs, theirs.rpartition(".")[2]
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise Mistake(f"target {pattern!r} is not a regular expression: {error}") from None


def _listed(layers: dict[str, str], config: ModelConfig) -> str:
    known = ", ".join(f"{ours} ({theirs})" for ours, theirs in layers.items())
    return f"{config.architecture} has {known}; {ALL} is all of them"


class Adapter(nnx.Module):
    """The update of a Linear's product, applied before the layer's bias."""

    def __init__(self, a: jax.Array, b: jax.Array, magnitude: jax.Array | None, *, scale: float):
        self.a, self.b = nnx.Param(a), nnx.Param(b)  # [in r], [r out]
        self.magnitude = None if magnitude is None else nnx.Param(magnitude)  # [out], DoRA's
        self.scale = scale

    def __call__(self, x: jax.Array, base: jax.Array, kernel: jax.Array) -> jax.Array:
        """x W + scale · (x A) B; with magnitudes m, each output times m / ‖W + scale · A B‖.

        Args:
          x: [B T in], in the dtype of compute.
          base: x W.
          kernel: W [in out] as it is stored; DoRA reads its norms.
        """
        a, b = self.a[...], self.b[...]
        adapted = base + self.scale * product(product(x, a), b)
        if self.magnitude is None:
            return adapted
        # The norms are constants to the gradient, which spares the backward pass products as large as the kernel and
        # cost next to no accuracy in section 4.3.
        norms = jax.lax.stop_gradient(merged_norms(kernel, a, b, scale=self.scale))
        ratio = self.magnitude[...].astype(jnp.float32) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
        return (adapted * ratio.reshape((1,) * (x.ndim - 1) + ratio.shape)).astype(base.dtype)


def merged_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    """‖W + s A B‖ of each output (the columns of [in, out]), in float32, without computing the sum itself.

    ‖w + s A b‖² = ‖w‖² + 2 s b·(Aᵀ w) + s² b·(AᵀA) b for a column w of W and b of B.
    """
    kernel, a, b = (part.astype(jnp.float32) for part in (kernel, a, b))
    a_t = jnp.swapaxes(a, -1, -2)
    squares = jnp.sum(kernel**2, axis=-2)
    with jax.default_matmul_precision("highest"):
        squares += jnp.sum(b * (2 * scale * (a_t @ kernel) + scale**2 * (a_t @ a) @ b), axis=-2)
    return jnp.sqrt(jnp.maximum(squares, 0.0))


def attach(blocks: nnx.Module, lora: Lora) -> None:
    """Adds adapters to the target layers of abstract, stacked blocks, in float32 whatever the base is."""
    wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    for name in lora.targets:
        layer = functools.reduce(getattr, name.split("/"), blocks)
        layers, inputs, outputs = kernel_shape(nnx.to_pure_dict(nnx.state(layer))["kernel"])
        magnitude = wide((layers, outputs)) if lora.dora else None
        a, b = wide((layers, inputs, lora.rank)), wide((layers, lora.rank, outputs))
        layer.adapter = Adapter(a, b, magnitude, scale=lora.scale)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """(base, adapter): the tree without its adapters, and the tree of the adapters alone."""
    base, adapter = {}, {}
    for name, value in params.items():
        if name == "adapter":
            adapter[name] = value
        elif isinstance(value, dict):
            base[name], inner = split(value)
            if inner:
                adapter[name] = inner
        else:
            base[name] = value
    return base, adapter


def join(adapter: PyTree, base: PyTree) -> PyTree:
    """The inverse of `split`, with the trained leaves first, as `Algorithm.assemble` takes them. Copies no array."""
    joined = {name: join(adapter[name], value) if name in adapter else value for name, value in base.items()}
    return joined | {name: value for name, value in adapter.items() if name not in base}


def init_adapter(abstract: PyTree, key: jax.Array, *, base: PyTree, shardings: PyTree | None = None) -> PyTree:
    """A uniform in ±1/sqrt(in) (Kaiming's with a = sqrt(5), as in PEFT), B zero, DoRA's magnitudes the base's norms.

    B = 0 makes the first policy the base itself. The paper draws A from a normal distribution and omits its width.

    Args:
      abstract: the adapter of `split`.
      key: typed key.
      base: params without adapters; DoRA's magnitudes are the norms of its kernels.
      shardings: a tree like the adapter.
    """

    def make(key: jax.Array, base: PyTree) -> PyTree:
        layers = jax.tree.leaves_with_path(abstract, is_leaf=_is_adapter)
        keys = jax.random.split(key, len(layers))
        adapters = [
            _init_layer(layer, a_key, _below(base, path[:-1]))
            for (path, layer), a_key in zip(layers, keys, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=_is_adapter), adapters)

    return jax.jit(make, out_shardings=shardings)(key, base)


def _is_adapter(node: Any) -> bool:
    return isinstance(node, dict) and {"a", "b"} <= set(node)


def _below(tree: PyTree, path: tuple) -> PyTree:
    return functools.reduce(lambda node, entry: node[entry.key], path, tree)


def _init_layer(abstract: PyTree, key: jax.Array, base: PyTree) -> PyTree:
    a, b = abstract["a"], abstract["b"]
    bound = a.shape[-2] ** -0.5
    layer = {"a": jax.random.uniform(key, a.shape, a.dtype, -bound, bound), "b": jnp.zeros(b.shape, b.dtype)}
    if "magnitude" in abstract:
        layer["magnitude"] = merged_norms(plain_kernel(base["kernel"]), layer["a"], layer["b"], scale=0.0)
    return layer
