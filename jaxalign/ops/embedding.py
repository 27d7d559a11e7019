"""Rows of an embedding table that a mesh cuts: the ids travel, which are small, and the rows; never the table.

XLA would gather the rows of all devices onto each of them. Here a device reads, for the tokens of all that share its
vocabulary, the part of each row that it holds, and hands it to the token's device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxalign.ops.mesh import Shards


def rows_of(
    table: jax.Array, ids: jax.Array, dtype: Any, *, shards: Shards | None = None, cut: str | None = None
) -> jax.Array:
    """[B T D], row `ids[b, t]` of the table [V D] in `dtype`; its gradient is summed in float32.

    Args:
      table: the parameters, V cut over the vocabulary's axis and D over the last axis of rows.
      ids: Int32[B T].
      dtype: dtype of compute.
      shards: the mesh; None, or a mesh that does not divide B and D: as XLA places it.
      cut: the mesh axis that cuts T in the result; it divides T.
    """
    if shards is None or shards.local(len(ids), table.shape[0]) is None or table.shape[1] % _parts(shards):
        return jnp.take(table, ids, axis=0).astype(dtype)
    return _rows_of(table, ids, dtype, shards, cut)


def _parts(shards: Shards) -> int:
    return shards.mesh.shape[shards.rows[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rows_of(table: jax.Array, ids: jax.Array, dtype: Any, shards: Shards, cut: str | None) -> jax.Array:
    last, axis = shards.rows[-1], shards.axis(table.shape[0])

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        own, here = _own(table, ids, shards, axis)
        rows = jnp.where(here[..., None], jnp.take(table, own, axis=0, mode="clip").astype(dtype), 0)
        if axis is not None:  # one of the terms of the sum is not 0
            scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)
            rows = jax.lax.psum(rows, axis) if cut is None else scatter(rows, axis)
        return jax.lax.all_to_all(rows, last, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(P(axis, last), _ids_spec(shards, axis, cut)),
        out_specs=P(shards.rows, cut, None),
        check_vma=False,
    )(table, ids)


def _forward(table: jax.Array, ids: jax.Array, dtype: Any, shards: Shards, cut: str | None) -> tuple:
    return _rows_of(table, ids, dtype, shards, cut), (table, ids)


def _backward(dtype: Any, shards: Shards, cut: str | None, residuals: tuple, g: jax.Array) -> tuple:
    table, ids = residuals
    last, axis = shards.rows[-1], shards.axis(table.shape[0])
    others = shards.rows[:-1] if axis is not None or cut is None else (*shards.rows[:-1], cut)

    def local(table: jax.Array, ids: jax.Array, g: jax.Array) -> jax.Array:
        own, here = _own(table, ids, shards, axis)
        g = jax.lax.all_to_all(g, last, split_axis=2, concat_axis=0, tiled=True)
        if axis is not None and cut is not None:
            g = jax.lax.all_gather(g, cut, axis=1, tiled=True)
        g = jnp.where(here[..., None], g.astype(jnp.float32), 0)
        return jax.lax.psum(jnp.zeros(table.shape, jnp.float32).at[own].add(g, mode="drop"), others)

    d_table = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(P(axis, last), _ids_spec(shards, axis, cut), P(shards.rows, cut, None)),
        out_specs=P(axis, last),
        check_vma=False,
    )(table, ids, g)
    return d_table.astype(table.dtype), None


_rows_of.defvjp(_forward, _backward)


def _ids_spec(shards: Shards, axis: str | None, cut: str | None) -> P:
    """A vocabulary that is whole on every device needs no other device's tokens."""
    return P(shards.rows, cut if axis is None else None)


def _own(table: jax.Array, ids: jax.Array, shards: Shards, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """(ids within this device's vocabulary, whether they are there) of all devices along the last axis of rows."""
    ids = jax.lax.all_gather(ids, shards.rows[-1], axis=0, tiled=True)
    own = ids if axis is None else ids - jax.lax.axis_index(axis) * table.shape[0]
    return own, (own >= 0) & (own < table.shape[0])
