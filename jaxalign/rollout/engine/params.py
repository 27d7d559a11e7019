"""A model's parameters as generation reads them: layer by layer, in the dtype of computation, in a layout of their own.

Training splits kernels over the mesh's `fsdp` axis and gathers each once for thousands of tokens. A step of generation
needs every kernel for one token per slot; in training's layout each would be gathered again for every token.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.decoder.decoder import layer_params
from jaxalign.models.decoder.layers import CAST
from jaxalign.models.places import Layout
from jaxalign.types import PyTree, leaf_names

LAYOUTS = ("training", "tensor")


class DecodingParams(NamedTuple):
    """A model's parameters, and those of each layer by itself, made once for many calls."""

    tree: PyTree  # the stacked blocks are empty in it: generation reads `layers`
    layers: tuple[PyTree, ...]


class _Target(NamedTuple):
    """Shape, dtype and place of a leaf, and a place on the way to it; hashable."""

    like: jax.ShapeDtypeStruct
    between: NamedSharding | None


def decoding_params(
    graphdef: nnx.GraphDef, params: PyTree, *, layout: str = "training", free: bool = False
) -> DecodingParams:
    """The params with a second copy of the blocks, layer by layer, since a step that took each layer out of the stack
    would spend as long on that as on the matrix products.

    Kernels and embeddings are cast to the dtype of computation once, here, and not for every token; products with them
    are the same to the bit.

    Args:
      graphdef: of a decoder. Its mesh may be another than that of the params, of the same devices in the same order.
      params: arrays, sharded as in training.
      layout: "training" keeps the sharding, and every token gathers the copy; "tensor" gathers it here, so that each
        device holds 1/tensor of the model in the dtype of computation, `tensor` being that of the graphdef's mesh.
      free: free the stack, leaf by leaf, so that the model is there once; `params` cannot be used any more.
    """
    like = decoding_like(graphdef, params, layout=layout)
    rest = {name: x for name, x in params.items() if name != "blocks"}
    tree = {name: jax.tree.map(_moved, x, like.tree[name]) for name, x in rest.items()}
    leaves, structure = jax.tree.flatten(params["blocks"])
    targets = tuple(map(target_of, leaves, jax.tree.leaves(like.layers[0])))
    if free:
        columns = [_freed(leaf, target) for leaf, target in zip(leaves, targets, strict=True)]
        layers = tuple(jax.tree.unflatten(structure, layer) for layer in zip(*columns, strict=True))
    else:
        layers = to_layers(params["blocks"], targets)
    return DecodingParams(tree | {"blocks": jax.tree.map(lambda _: np.zeros(0, np.float32), params["blocks"])}, layers)


def decoding_like(graphdef: nnx.GraphDef, params: PyTree, *, layout: str = "training") -> DecodingParams:
    """Shapes, dtypes and places of `decoding_params`; the params may be ShapeDtypeStructs."""
    compute, names = nnx.merge(graphdef, params).compute, leaf_names(params)
    # DoRA computes the norms of kernels from their stored values, so these kernels are not cast
    exact = {
        name.replace("adapter/magnitude", "kernel")
        for name in jax.tree.leaves(names)
        if name.endswith("adapter/magnitude")
    }

    def like(skipped_axes: int, name: str, x: Any) -> jax.ShapeDtypeStruct:
        casts = re.search(CAST, name) and name not in exact
        shape, sharding = x.shape[skipped_axes:], x.sharding
        if isinstance(sharding, NamedSharding):
            spec = P(*sharding.spec[skipped_axes:])
            to_mesh = layout == "tensor" and compute.layout is not None
            sharding = _over_heads(spec, shape, compute.layout) if to_mesh else NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(shape, compute.dtype if casts else x.dtype, sharding=sharding)

    tree = {name: jax.tree.map(functools.partial(like, 0), names[name], x) for name, x in params.items()}
    layer = jax.tree.map(functools.partial(like, 1), names["blocks"], params["blocks"])
    empty = jax.tree.map(lambda _: jax.ShapeDtypeStruct((0,), np.float32), params["blocks"])
    return DecodingParams(tree | {"blocks": empty}, (layer,) * jax.tree.leaves(params["blocks"])[0].shape[0])


def _over_heads(spec: P, shape: tuple[int, ...], layout: Layout) -> NamedSharding:
    """The sharding of a spec of training without the axes that cut rows; an axis that does not divide is left out."""

    def kept(size: int, entry: Any) -> tuple[str, ...] | None:
        names = tuple(name for name in _axes(entry) if name not in layout.rows)
        return names if names and size % math.prod(layout.mesh.shape[name] for name in names) == 0 else None

    return NamedSharding(layout.mesh, P(*(kept(*pair) for pair in zip(shape, spec, strict=False))))


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def target_of(x: jax.Array, like: jax.ShapeDtypeStruct) -> _Target:
    """The target of a leaf or of a stack of leaves `x`.

    Between two meshes the partitioner exchanges shares of equal size, where it would else gather the whole: a leaf
    first has as many shares as there are devices.
    """
    target = like.sharding
    if not isinstance(target, NamedSharding) or x.sharding.mesh.shape == target.mesh.shape:
        return _Target(like, None)
    used = {name for entry in target.spec for name in _axes(entry)}
    spare = tuple(name for name in target.mesh.axis_names if name not in used and target.mesh.shape[name] > 1)
    cut = next((axis for axis, entry in enumerate(target.spec) if entry), None)
    if not spare or cut is None or like.shape[cut] % target.mesh.size:
        return _Target(like, None)
    finer = (_axes(entry) + spare if axis == cut else entry for axis, entry in enumerate(target.spec))
    return _Target(like, NamedSharding(target.mesh, P(*finer)))


def is_like(x: Any, like: jax.ShapeDtypeStruct) -> bool:
    """True if a leaf has the dtype and place of `like`, so that it is not copied."""
    return x.dtype == like.dtype and x.sharding.is_equivalent_to(like.sharding, len(x.shape))


def _moved(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return x if is_like(x, like) else _converted(x, target_of(x, like))


@functools.partial(jax.jit, static_argnums=1)
def _converted(x: jax.Array, target: _Target) -> jax.Array:
    """The leaf cast and then resharded, so that fewer bytes travel."""
    x = x.astype(target.like.dtype)
    for place in (target.between, target.like.sharding):
        if isinstance(place, NamedSharding):
            x = jax.lax.with_sharding_constraint(x, place)
    return x


@functools.partial(jax.jit, static_argnums=1)
def to_layers(blocks: PyTree, targets: tuple[_Target, ...]) -> tuple[PyTree, ...]:
    """The layers of the stack, each converted by itself, so that the whole stack is never gathered."""
    structure = jax.tree.structure(blocks)
    return tuple(
        jax.tree.unflatten(structure, map(_converted, jax.tree.leaves(layer), targets))
        for layer in layer_params({"blocks": blocks})
    )


def _freed(leaf: jax.Array, target: _Target) -> tuple[jax.Array, ...]:
    layers = to_layers(leaf, (target,))
    leaf.delete()
    return layers
