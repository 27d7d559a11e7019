"""A model's parameters as generation reads them: layer by layer, in the dtype of computation, in a layout of their own.

Training splits kernels over the mesh's `fsdp` axis and gathers each once for thousands of tokens. A step of generation
needs every kernel for one token per slot; in training's layout each would be gathered again for every token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.decoder.decoder import layer_params
from jaxalign.types import PyTree, leaf_names

LAYOUTS = ("training", "tensor")


class DecodingParams(NamedTuple):
    """A model's parameters, and those of each layer by itself, made once for many calls."""

    tree: PyTree  # its stacked blocks are the arrays of training; generation does not read them
    layers: tuple[PyTree, ...]


class _Target(NamedTuple):
    """Target dtype and sharding of a leaf; None keeps the current one. Hashable."""

    dtype: jnp.dtype | None
    sharding: NamedSharding | None


def decoding_params(graphdef: nnx.GraphDef, params: PyTree, *, layout: str = "training") -> DecodingParams:
    """The params with a second copy of the blocks, layer by layer, since a step that took each layer out of the stack
    would spend as long on that as on the matrix products.

    Kernels and embeddings are cast to the dtype of computation once, here, and not for every token; products with them
    are the same to the bit.

    Args:
      graphdef: of a decoder.
      params: arrays, sharded as in training.
      layout: "training" keeps the sharding, and every token gathers the copy; "tensor" gathers it here, so that each
        device holds 1/tensor of the model in the dtype of computation beside its share of the params.
    """
    compute = nnx.merge(graphdef, params).compute
    gathered_axes = compute.layout.rows if layout == "tensor" and compute.layout is not None else ()
    names = leaf_names(params)
    # DoRA computes the norms of kernels from their stored values, so these kernels are not cast
    exact = {
        name.replace("adapter/magnitude", "kernel")
        for name in jax.tree.leaves(names)
        if name.endswith("adapter/magnitude")
    }

    def target(name: str, x: jax.Array, skipped_axes: int = 0) -> _Target:
        """The target of a leaf without its first `skipped_axes` axes."""
        casts = re.search(r"(kernel|embedding)$", name) and name not in exact and x.dtype != compute.dtype
        return _Target(compute.dtype if casts else None, _without(x.sharding, gathered_axes, skipped_axes))

    rest = {name: x for name, x in params.items() if name != "blocks"}
    leaves, structure = jax.tree.flatten(rest)
    targets = [target(*pair) for pair in _named({name: names[name] for name in rest}, rest)]
    leaves = [x if t == _Target(None, None) else _converted(x, t) for x, t in zip(leaves, targets, strict=True)]
    of_layer = tuple(target(*pair, skipped_axes=1) for pair in _named(names["blocks"], params["blocks"]))
    tree = jax.tree.unflatten(structure, leaves) | {"blocks": params["blocks"]}
    return DecodingParams(tree, _layers(params["blocks"], of_layer))


def _named(names: PyTree, tree: PyTree) -> list[tuple[str, jax.Array]]:
    return list(zip(jax.tree.leaves(names), jax.tree.leaves(tree), strict=True))


def _without(sharding: Any, mesh_axes: Collection[str], skipped_axes: int) -> NamedSharding | None:
    """The sharding without `mesh_axes`, of an array without its first `skipped_axes` axes; None if that is the same."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [(axis,) if isinstance(axis, str) else axis or () for axis in sharding.spec[skipped_axes:]]
    if not any(name in mesh_axes for axis in spec for name in axis):
        return None
    remaining = (tuple(name for name in axis if name not in mesh_axes) or None for axis in spec)
    return NamedSharding(sharding.mesh, P(*remaining))


@functools.partial(jax.jit, static_argnums=1)
def _converted(x: jax.Array, target: _Target) -> jax.Array:
    """The leaf cast and then resharded, so that fewer bytes travel."""
    x = x if target.dtype is None else x.astype(target.dtype)
    return x if target.sharding is None else jax.lax.with_sharding_constraint(x, target.sharding)


@functools.partial(jax.jit, static_argnums=1)
def _layers(blocks: PyTree, targets: tuple[_Target, ...]) -> tuple[PyTree, ...]:
    """The layers of the stack, each converted by itself, so that the whole stack is never gathered."""
    structure = jax.tree.structure(blocks)
    return tuple(
        jax.tree.unflatten(structure, map(_converted, jax.tree.leaves(layer), targets))
        for layer in layer_params({"blocks": blocks})
    )
