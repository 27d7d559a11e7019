"""Reading rows with a model: hidden states and log-probabilities of tokens and of responses, on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.ops.logprobs import Shards, TokenLogps, next_token_logps
from jaxalign.types import PyTree, ResponseBatch, TokenBatch

LOGPS, PUBLIC, COLLISION = "logps", "public_logps", "collision_logps"

ResponseStats = dict[str, jax.Array]  # by LOGPS, PUBLIC, COLLISION: Float32[B G K]


def shards_of(model: Any) -> Shards | None:
    """A model's layout in the form of `ops`: the mesh, the axes that cut tokens, the axis that cuts the vocabulary."""
    layout = model.compute.layout
    return None if layout is None else Shards(layout.mesh, layout.rows, layout.heads)


def hidden_states(graphdef: nnx.GraphDef, params: PyTree, rows: TokenBatch) -> tuple[Any, jax.Array]:
    """(the model, its hidden states [B T D])."""
    model = nnx.merge(graphdef, params)
    return model, hidden_of(model, rows)


def hidden_of(model: Any, rows: TokenBatch) -> jax.Array:
    """The model's hidden states [B T D]."""
    return model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids, prefix_ids=rows.prefix_ids)


def token_stats(model: Any, hidden: jax.Array, rows: TokenBatch, **options: Any) -> TokenLogps:
    """`next_token_logps` of the tokens in the mask, from the model's hidden states; takes its options."""
    return next_token_logps(hidden, model.unembed(), rows.tokens, rows.mask, shards=shards_of(model), **options)


def token_logps(
    graphdef: nnx.GraphDef, params: PyTree, rows: TokenBatch, *, temperature: float, implementation: str | None = None
) -> jax.Array:
    """log softmax(logits / temperature) of each token in the mask, Float32[B T] in nats; 0 elsewhere.

    Args:
      graphdef: structure of a decoder.
      params: its parameters.
      rows: tokens [B T] and the mask of those that are scored.
      temperature: divisor of the logits.
      implementation: an implementation of `ops/logprobs.py`; None is its default.
    """
    model, hidden = hidden_states(graphdef, params, rows)
    return token_stats(model, hidden, rows, temperature=temperature, implementation=implementation).logps


def response_logps(
    model: Any, batch: ResponseBatch, *, wanted: tuple[str, ...] = (LOGPS,), implementation: str | None = None
) -> ResponseStats:
    """Sums over the tokens of each response, Float32[B G K] by name.

    Args:
      model: returns hidden states and has `unembed()`.
      batch: of any K.
      wanted: LOGPS, log π(response) in nats; PUBLIC, the same over its first min_k length_k tokens, which every
        response of the group has; COLLISION, Σ_t log Σ_v π(v)², the log-chance that two samples agree.
      implementation: an implementation of `ops/logprobs.py`; None is its default.
    """
    rows = batch.flat()
    hidden = hidden_of(model, rows)
    token = token_stats(model, hidden, rows, log_normalizer=COLLISION in wanted, implementation=implementation)
    stats = {LOGPS: batch.per_response(batch.unflat(token.logps))}
    if PUBLIC in wanted:
        public = jnp.where(_is_public(batch), batch.unflat(token.logps), 0.0)
        stats[PUBLIC] = batch.per_response(public)
    if COLLISION in wanted:
        # Σ_v π(v)² = Σ exp 2z / (Σ exp z)², and Σ exp 2z is the normalizer at temperature 1/2
        options = {"temperature": 0.5, "log_normalizer": True, "implementation": implementation}
        doubled = token_stats(model, hidden, rows, **options).log_normalizer
        stats[COLLISION] = batch.per_response(batch.unflat(doubled - 2.0 * token.log_normalizer))
    return stats


def response_lengths(batch: ResponseBatch) -> jax.Array:
    """Float32[B G K], number of tokens that the model must produce, the terminator included."""
    return batch.per_response(batch.sequences.mask)


def last_tokens(batch: ResponseBatch) -> jax.Array:
    """Bool[B Q T], True on the last token of each sequence. From lengths, never from ids: pad may equal EOS."""
    ids = batch.sequences.segment_ids
    following = jnp.pad(ids[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return (ids > 0) & (following != ids)


def _is_public(batch: ResponseBatch) -> jax.Array:
    """Bool[B Q T], True on the first min_k length_k tokens of each response."""
    lengths = response_lengths(batch)
    # counted by position, for a shared prompt is not in the sequence's own segment
    whole = batch.per_response(jnp.where(last_tokens(batch), 1 + batch.sequences.positions, 0))
    shortest = jnp.min(jnp.where(batch.present, lengths, jnp.inf), axis=2, keepdims=True)
    end = batch.to_tokens(whole - lengths + jnp.minimum(shortest, lengths))  # a response ends its sequence
    return batch.sequences.mask & (batch.sequences.positions < end)
