"""The index of each row's largest value, in passes that XLA vectorises on a CPU."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEIGHBOURS = 128  # values of a block


def blocks(x: Float[Array, "B N"]) -> Float[Array, "B M 128"]:
    """x in blocks of 128 neighbours; the last block is filled up with zeros."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % NEIGHBOURS))).reshape(len(x), -1, NEIGHBOURS)


def inside(split: Float[Array, "B M 128"], block: Int[Array, "B"]) -> Float[Array, "B 128"]:
    """The values of one block of each row."""
    return jnp.take_along_axis(split, block[:, None, None], axis=1)[:, 0]


def largest(x: Float[Array, "B N"]) -> Int[Array, "B"]:
    """`jnp.argmax(x, axis=-1)`: the first of equals, and a NaN before any number.

    Takes the block with the largest maximum, then the index in it: XLA reduces a maximum by whole vectors, but one with
    its index value by value. If N is no multiple of 128, filling up the last block would cost what that saves.
    """
    if x.shape[1] % NEIGHBOURS:
        return jnp.argmax(x, axis=-1)
    split = blocks(x)
    block = jnp.argmax(jnp.max(split, axis=-1), axis=-1)
    return block * NEIGHBOURS + jnp.argmax(inside(split, block), axis=-1)
