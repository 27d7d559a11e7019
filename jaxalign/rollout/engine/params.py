"""A model's parameters as generation reads them: layer by layer, in the dtype of compute, and in a layout of its own.

Training cuts kernels over the mesh's `fsdp` axis and gathers each once for thousands of tokens. A step of generation
needs all kernels for one token a slot; gathered for each, they would cross the wires as often.
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


class Weights(NamedTuple):
    """A model's parameters, and those of its layers one by one, made once for many calls."""

    params: PyTree  # whose blocks are the stack as it is given, which nothing reads
    layers: tuple[PyTree, ...]


class _Wanted(NamedTuple):
    """What a leaf becomes; hashable. None stands for what it is."""

    dtype: jnp.dtype | None
    sharding: NamedSharding | None


def weights_of(graphdef: Any, params: PyTree, *, layout: str = "training") -> Weights:
    """With a second copy of the blocks: a token's products cost no more than taking layers out of the stack.

    Kernels and embeddings are cast to the dtype of compute here and not for every token; what they are multiplied with
    is the same to the bit.

    Args:
      graphdef: of a decoder.
      params: cut for training, as arrays.
      layout: "training" leaves the copy cut as it is, and every token gathers it; "tensor" gathers it here, so that
        each device holds 1/tensor of the model in the dtype of compute beside its share of the params.
    """
    compute = nnx.merge(graphdef, params).compute
    rows = compute.layout.rows if layout == "tensor" and compute.layout is not None else ()
    names = leaf_names(params)
    # DoRA takes the norms of kernels as they are stored, so those have to stay
    exact = {
        name.replace("adapter/magnitude", "kernel")
        for name in jax.tree.leaves(names)
        if name.endswith("adapter/magnitude")
    }

    def wanted(name: str, x: jax.Array, axes: int = 0) -> _Wanted:
        """Without the first `axes` axes."""
        casts = re.search(r"(kernel|embedding)$", name) and name not in exact and x.dtype != compute.dtype
        return _Wanted(compute.dtype if casts else None, _gathered(x.sharding, rows, axes))

    rest = {name: x for name, x in params.items() if name != "blocks"}
    leaves, structure = jax.tree.flatten(rest)
    others = [wanted(*each) for each in _pairs({name: names[name] for name in rest}, rest)]
    made = [x if one == _Wanted(None, None) else _made(x, one) for x, one in zip(leaves, others, strict=True)]
    layer = [wanted(*each, axes=1) for each in _pairs(names["blocks"], params["blocks"])]
    return Weights(
        jax.tree.unflatten(structure, made) | {"blocks": params["blocks"]}, _taken(params["blocks"], tuple(layer))
    )


def _pairs(names: PyTree, tree: PyTree) -> list[tuple[str, jax.Array]]:
    return list(zip(jax.tree.leaves(names), jax.tree.leaves(tree), strict=True))


def _gathered(sharding: Any, rows: Collection[str], axes: int) -> NamedSharding | None:
    """The sharding without the mesh axes `rows`; None where there are none to leave out."""
    if not isinstance(sharding, NamedSharding):
        return None
    held = [(axis,) if isinstance(axis, str) else axis or () for axis in sharding.spec[axes:]]
    if not any(name in rows for axis in held for name in axis):
        return None
    return NamedSharding(sharding.mesh, P(*(tuple(name for name in axis if name not in rows) or None for axis in held)))


@functools.partial(jax.jit, static_argnums=1)
def _made(x: jax.Array, wanted: _Wanted) -> jax.Array:
    """Cast before it travels."""
    x = x if wanted.dtype is None else x.astype(wanted.dtype)
    return x if wanted.sharding is None else jax.lax.with_sharding_constraint(x, wanted.sharding)


@functools.partial(jax.jit, static_argnums=1)
def _taken(blocks: PyTree, wanted: tuple[_Wanted, ...]) -> tuple[PyTree, ...]:
    """Each layer is gathered by itself: the whole stack never is."""
    structure = jax.tree.structure(blocks)
    return tuple(
        jax.tree.unflatten(structure, map(_made, jax.tree.leaves(layer), wanted))
        for layer in layer_params({"blocks": blocks})
    )
