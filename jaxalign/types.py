"""Types that every floor shares: averages that merge, batches, and the names of a tree's leaves.

Axis letters: B rows, T positions in a row, D model width, V vocabulary, N = B*T tokens, L layers, H heads.

Time index: `x[:, t]` is about `tokens[:, t]`. `logps[:, t] = log p(tokens[t] | tokens[<t])` and `logps[:, 0] = 0`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.mistake import Mistake

PyTree = Any
Array = jax.Array | np.ndarray  # batches are made by numpy on the host, and lie on the devices afterwards


class Average(NamedTuple):
    """A mean kept as (total, count) until it is printed, so that averages merge exactly.

    The mean over a batch cut into parts of unequal weight is the sum of totals over the sum of
    counts, not the mean of the parts' means. Both fields are float32 scalars.
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
            raise Mistake(f"values have shape {values.shape} and mask {mask.shape}; they must be equal")
        return cls(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=jnp.float32))

    def __add__(self, other: Average) -> Average:  # type: ignore[override]
        return Average(self.total + other.total, self.count + other.count)

    def compute(self) -> jax.Array:
        """total / count; 0 if nothing was counted."""
        return self.total / jnp.where(self.count == 0, 1.0, self.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, padded anywhere or packed with several sequences each.

    The loss reads `mask` only, which is made from lengths and roles, never by comparing ids.
    """

    tokens: Array  # Int32[B T]
    mask: Array  # Bool[B T], True exactly on tokens that the model must produce, the terminator included
    positions: Array  # Int32[B T], 0 at each sequence's first token
    segment_ids: Array  # Int32[B T], 1, 2, ... for the sequences of a row; 0 is padding
    prefix_ids: Array | None = None  # Int32[B T], the segment that each token sees besides its own; None: no other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseBatch:
    """Groups of K responses to one prompt, each after its prompt: K = 2 is a pair, chosen first; K = 1 is rated alone.

    Batches are cut between rows, so all responses of a group are in one row, and a loss that compares them never looks
    beyond it. A row has Q planes of T tokens; a plane has several sequences, with segment ids 1, 2, ..., stride - 1. A
    slot is the address of a response in its row: plane · stride + segment, and 0 if there is none. A row with Q = 2,
    T = 13, stride = 4 and two pairs (p prompt, c chosen, r rejected, . padding):

        plane 0        p p p c c p p p r p p r .        plane 1        p p c c c . . . . . . . .
        segment_ids    1 1 1 1 1 2 2 2 2 3 3 3 0        segment_ids    1 1 1 1 1 0 0 0 0 0 0 0 0

        slots = [[1, 2],    group 0: chosen in plane 0, segment 1 (0 · 4 + 1); rejected in plane 0, segment 2
                 [5, 3]]    group 1: chosen in plane 1, segment 1 (1 · 4 + 1); rejected in plane 0, segment 3

    Axis letters: G groups of a row, K responses of a group, Q planes of a row.
    """

    sequences: TokenBatch  # leaves [B Q T]; a segment is a prompt with its response, or a prompt that several share
    slots: Array  # Int32[B G K], plane · stride + segment of response k of group g; 0 if there is none
    columns: Mapping[str, Array]  # [B G ...], further values of each group or response: margin, label, ref_logps
    stride: int = dataclasses.field(metadata={"static": True})  # segment ids of a plane, that of padding included

    @property
    def present(self) -> jax.Array:
        """Bool[B G K], True on slots with a response."""
        return self.slots > 0

    @property
    def valid(self) -> jax.Array:
        """Bool[B G], True on groups with a response."""
        return jnp.any(self.present, axis=2)

    def per_response(self, values: jax.Array) -> jax.Array:
        """Float32[B G K]: Σ values [B Q T] over each response's segment; 0 where there is no response."""
        own = self.sequences.segment_ids[..., None] == jnp.arange(self.stride).reshape(1, 1, 1, -1)
        sums = jnp.sum(jnp.where(own, values[..., None].astype(jnp.float32), 0.0), axis=2)  # [B Q stride]
        rows, groups, responses = self.slots.shape
        flat = jnp.take_along_axis(sums.reshape(rows, -1), self.slots.reshape(rows, -1), axis=1)
        return jnp.where(self.present, flat.reshape(rows, groups, responses), 0.0)

    def to_tokens(self, values: jax.Array) -> jax.Array:
        """[B Q T]: the value [B G K] of the response that each token belongs to; 0 on padding."""
        rows, planes = self.sequences.segment_ids.shape[:2]
        row = jnp.arange(rows)[:, None]
        table = jnp.zeros((rows, planes * self.stride), values.dtype)
        table = table.at[row, self.slots.reshape(rows, -1)].set(values.reshape(rows, -1)).at[:, 0].set(0)
        plane = jnp.arange(planes)[None, :, None] * self.stride
        index = jnp.where(self.sequences.segment_ids > 0, plane + self.sequences.segment_ids, 0)
        return jnp.take_along_axis(table, index.reshape(rows, -1), axis=1).reshape(index.shape)

    def flat(self) -> TokenBatch:
        """The planes as rows [B·Q T], the shape that a model reads."""
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), self.sequences)

    def unflat(self, values: jax.Array) -> jax.Array:
        """The inverse of `flat` for values: [B·Q T] -> [B Q T]."""
        return values.reshape(self.sequences.tokens.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnpairedBatch:
    """Responses with a label each, and the same prompts with responses to others, from which KTO estimates its KL.

    Both have K = 1 and as many rows; row b of the one need not hold the prompts of row b of the other.
    """

    rated: ResponseBatch  # columns["label"]: Bool[B G], True where desirable
    mismatched: ResponseBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Responses drawn from the policy, one a row, after its prompt; empty rows fill up a batch."""

    sequences: TokenBatch  # the mask is True on response tokens, the terminator included
    columns: Mapping[str, Array]  # [B T] about tokens (old_logps, advantages, ref_logps), [B] about responses
    pretraining: TokenBatch | None = None  # as many rows of pretraining text, whose loss PPO-ptx adds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unembedding:
    """The map from hidden states to logits: `softcap(hidden @ weightᵀ + bias)`, with softcap(x) = c tanh(x / c).

    Models return it instead of logits, so that only `ops/` decides when, and how much of, [N, V] exists.
    """

    weight: jax.Array  # [V D], the tied embedding, or the transpose of the output matrix
    bias: jax.Array | None = None  # [V]
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})


def leaf_names(tree: PyTree) -> PyTree:
    """The tree with every leaf replaced by its path, as in `blocks/attention/query`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )
