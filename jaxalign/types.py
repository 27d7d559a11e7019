"""What every floor shares: averages that merge, batches, and the names of a tree's leaves.

Axis letters: B rows, T positions in a row, D model width, V vocabulary, N = B*T tokens, L layers, H heads.

Time index: `x[:, t]` is about `tokens[:, t]`. `logps[:, t] = log p(tokens[t] | tokens[<t])` and `logps[:, 0] = 0`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Average(NamedTuple):
    """A mean kept as (total, count) until it is printed, so that averages merge exactly.

    The mean over a batch cut into parts of unequal weight is the sum of totals over the sum of
    counts; the mean of the parts' means is something else. Both fields are float32 scalars.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> Average:
        """Σ values / number of values, over the positions where `mask` is True (default: all)."""
        values = jnp.asarray(values, jnp.float32)
        if mask is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, jnp.float32))
        if mask.shape != values.shape:
            raise ValueError(f"values have shape {values.shape} and mask {mask.shape}; they must be equal")
        return cls(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=jnp.float32))

    def __add__(self, other: Average) -> Average:  # type: ignore[override]
        return Average(self.total + other.total, self.count + other.count)

    def compute(self) -> jax.Array:
        """total / count; 0 where nothing was counted."""
        return self.total / jnp.where(self.count == 0, 1.0, self.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, padded anywhere or packed with several sequences each.

    The loss reads `mask` alone: it is made from lengths and roles, never from comparing ids.
    """

    tokens: jax.Array  # Int32[B T]
    mask: jax.Array  # Bool[B T], True exactly on tokens the model must produce, the terminator included
    positions: jax.Array  # Int32[B T], 0 at each sequence's first token
    segment_ids: jax.Array  # Int32[B T], 1, 2, ... for the sequences of a row; 0 is padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unembedding:
    """From hidden states to logits: `softcap(hidden @ weightᵀ + bias)`, with softcap(x) = c tanh(x / c).

    Models hand this over in place of logits, so that only `ops/` decides when, and how much of, [N, V] exists.
    """

    weight: jax.Array  # [V D], the tied embedding or the model's own output matrix, transposed
    bias: jax.Array | None = None  # [V]
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})


def leaf_names(tree: PyTree) -> PyTree:
    """The tree with every leaf replaced by its path, as in `blocks/attention/query`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )
