"""What a model says of the responses of a batch: the statistics that preference losses ask for, one per response."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.reading import shards_of
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.types import ResponseBatch

LOGPS, PUBLIC, COLLISION = "logps", "public_logps", "collision_logps"
REF = "ref_"  # columns of the reference

Stats = dict[str, jax.Array]  # by LOGPS, PUBLIC, COLLISION: [B G K]


def hidden_states(model: Any, batch: ResponseBatch) -> jax.Array:
    """[B·Q T D] of all planes in one forward."""
    rows = batch.flat()
    return model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids, prefix_ids=rows.prefix_ids)


def response_logps(
    model: Any, batch: ResponseBatch, *, wanted: tuple[str, ...] = (LOGPS,), implementation: str | None = None
) -> Stats:
    """Sums over the tokens of each response, float32 [B G K].

    Args:
      model: returns hidden states and has `unembed()`.
      batch: of any K.
      wanted: LOGPS, log π(response) in nats; PUBLIC, the same over its first min_k length_k tokens, which every
        response of the group has; COLLISION, Σ_t log Σ_v π(v)², the log-chance that two samples agree.
      implementation: of `next_token_logps`.
    """
    rows, unembedding = batch.flat(), model.unembed()
    hidden = hidden_states(model, batch)
    read = lambda **options: next_token_logps(  # noqa: E731
        hidden, unembedding, rows.tokens, rows.mask, implementation=implementation, shards=shards_of(model), **options
    )
    token = read(log_normalizer=COLLISION in wanted)
    found = {LOGPS: batch.per_response(batch.unflat(token.logps))}
    if PUBLIC in wanted:
        public = jnp.where(_is_public(batch), batch.unflat(token.logps), 0.0)
        found[PUBLIC] = batch.per_response(public)
    if COLLISION in wanted:
        # Σ_v π(v)² = Σ exp 2z / (Σ exp z)², and Σ exp 2z is the normalizer at temperature 1/2
        doubled = read(temperature=0.5, log_normalizer=True).log_normalizer
        found[COLLISION] = batch.per_response(batch.unflat(doubled - 2.0 * token.log_normalizer))
    return found


def response_lengths(batch: ResponseBatch) -> jax.Array:
    """Float32[B G K], tokens that the model must produce, the terminator included."""
    return batch.per_response(batch.sequences.mask)


def _is_public(batch: ResponseBatch) -> jax.Array:
    """Bool[B Q T], True on the first min_k length_k tokens of each response."""
    # counted by position, for a shared prompt is not in the sequence's own segment
    lengths, whole = (
        response_lengths(batch),
        batch.per_response(jnp.where(ends(batch), 1 + batch.sequences.positions, 0)),
    )
    shortest = jnp.min(jnp.where(batch.present, lengths, jnp.inf), axis=2, keepdims=True)
    end = batch.to_tokens(whole - lengths + jnp.minimum(shortest, lengths))  # a response ends its sequence
    return batch.sequences.mask & (batch.sequences.positions < end)


def ends(batch: ResponseBatch) -> jax.Array:
    """Bool[B Q T], True on the last token of each sequence. From lengths, never from ids: pad may equal EOS."""
    ids = batch.sequences.segment_ids
    following = jnp.pad(ids[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return (ids > 0) & (following != ids)


def with_columns(batch: ResponseBatch, prefix: str, values: Stats) -> ResponseBatch:
    """The batch with more columns, their names behind `prefix`."""
    more = {prefix + name: value for name, value in values.items()}
    return dataclasses.replace(batch, columns={**batch.columns, **more})


def columns_of(batch: ResponseBatch, prefix: str) -> Stats:
    """The columns behind `prefix`, without it."""
    return {n.removeprefix(prefix): v for n, v in batch.columns.items() if n.startswith(prefix)}
