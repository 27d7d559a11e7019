"""The members of a reward model in a run: what of them is trained, what is frozen, and how they start."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.models.adapters.lora import Lora, init_adapter, split
from jaxalign.models.heads import init_head
from jaxalign.types import PyTree


def divide(abstract: PyTree, lora: Lora | None, count: int, *, freeze_trunk: bool) -> tuple[PyTree, PyTree]:
    """(what is trained, what is frozen), of which `algorithms/reward.py: laid_over` makes whole params.

    The heads [M D] and the trunk, and nothing; the heads alone, and the trunk; or the heads and the members' adapters
    [M ...], and their one base.
    """
    width = abstract["embed"]["embedding"].shape[1]
    head = {"head": jax.ShapeDtypeStruct((count, width), jnp.float32)}
    if lora is not None:
        base, adapter = split(abstract)
        stacked = lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype)  # noqa: E731
        return head | {"members": jax.tree.map(stacked, adapter)}, {"model": base}
    return (head, {"model": abstract}) if freeze_trunk else (head | {"model": abstract}, None)


def new_heads(like: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """Random heads in the place of `like`."""
    return jax.jit(init_head, static_argnums=(1, 2), out_shardings=like.sharding)(key, *like.shape)


def new_adapters(like: PyTree, key: jax.Array, base: PyTree) -> PyTree:
    """Adapters that change nothing yet, with another A for each member, in the places of `like`."""
    count = jax.tree.leaves(like)[0].shape[0]
    alone = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), like)

    def make(key: jax.Array, base: PyTree) -> PyTree:
        return jax.vmap(lambda member_key: init_adapter(alone, member_key, base=base))(jax.random.split(key, count))

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, like))(key, base)
