"""The place of each row's largest value, in passes that XLA vectorises on a CPU."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEIGHBOURS = 128  # values that are looked at as one at first


def blocks(x: Float[Array, "B N"]) -> Float[Array, "B M 128"]:
    """Neighbours side by side; where N is no multiple of 128, zeros behind the last of them."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % NEIGHBOURS))).reshape(len(x), -1, NEIGHBOURS)


def inside(split: Float[Array, "B M 128"], block: Int[Array, "B"]) -> Float[Array, "B 128"]:
    """One block of each row."""
    return jnp.take_along_axis(split, block[:, None, None], axis=1)[:, 0]


def largest(x: Float[Array, "B N"]) -> Int[Array, "B"]:
    """`jnp.argmax(x, axis=-1)`: the first of equals, and a NaN before any number.

    First the block with the largest maximum, then the place in it: a maximum is reduced by whole vectors, a maximum
    with its place value by value. Where N is no multiple of 128 the copy that fills it up would cost what that saves.
    """
    if x.shape[1] % NEIGHBOURS:
        return jnp.argmax(x, axis=-1)
    split = blocks(x)
    block = jnp.argmax(jnp.max(split, axis=-1), axis=-1)
    return block * NEIGHBOURS + jnp.argmax(inside(split, block), axis=-1)
