"""Reading rows with a model: hidden states and log-probabilities of tokens, on any mesh."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxalign.ops.logprobs import Shards, next_token_logps
from jaxalign.types import PyTree, TokenBatch


def shards_of(model: Any) -> Shards | None:
    """A model's layout in the form of `ops`: the mesh, the axes that cut tokens, the axis that cuts the vocabulary."""
    layout = model.compute.layout
    return None if layout is None else Shards(layout.mesh, layout.rows, layout.heads)


def hidden_states(graphdef: Any, params: PyTree, rows: TokenBatch) -> tuple[Any, jax.Array]:
    """(the model, its hidden states [B T D])."""
    model = nnx.merge(graphdef, params)
    return model, model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)


def token_logps(
    graphdef: Any, params: PyTree, rows: TokenBatch, *, temperature: float, implementation: str | None = None
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
    scored = next_token_logps(
        hidden,
        model.unembed(),
        rows.tokens,
        rows.mask,
        temperature=temperature,
        implementation=implementation,
        shards=shards_of(model),
    )
    return scored.logps
