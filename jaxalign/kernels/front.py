"""Computation on the first rows of arrays, whose number only the device knows.

Shapes are static, so each height is a program of its own, and the number picks one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PARTS, WORTH_A_CHOICE = 4, 2**20  # heights; number of logits below which all rows are computed


def on_first(run: Callable[..., Any], count: jax.Array | None, columns: int, *rows: Any) -> Any:
    """`run(height, *rows)`, with a quarter, a half, three quarters or all of the rows: the least that holds `count`.

    Args:
      run: returns arrays of the same shapes for every height.
      count: number of rows that count; None: all.
      columns: logits of a row.
      rows: arrays, or trees of them, of as many rows.
    """
    total = len(jax.tree.leaves(rows)[0])
    if count is None or total * columns < WORTH_A_CHOICE:
        return run(total, *rows)
    heights = sorted({-(-total * part // PARTS) for part in range(1, PARTS + 1)})
    which = jnp.searchsorted(jnp.array(heights), count)
    return jax.lax.switch(which, [functools.partial(run, height) for height in heights], *rows)


def tall(x: jax.Array, rows: int) -> jax.Array:
    """x with rows of zeros behind it, `rows` in all."""
    return jnp.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1)))
