"""Supervised fine-tuning: the mean cross-entropy of the tokens that the model must produce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithms.base import Algorithm
from jaxalign.losses.language import cross_entropy
from jaxalign.mistake import Mistake
from jaxalign.models.reading import hidden_states, shards_of
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.types import Average, PyTree, TokenBatch


def check_loss(loss: Callable, name: str) -> None:
    """Raises Mistake, with its `name`, unless the loss takes three arrays and gives one value per token."""
    token = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    try:
        found = jax.eval_shape(loss, token, token, token)
    except Exception as error:  # a user's function raises what it likes
        raise Mistake(
            f"loss {name!r} cannot be called as loss(logps, log_normalizer, mean_logit): {_first_line(error)}"
        ) from error
    given = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(found)]
    if given != ["float32[2, 4]"]:
        raise Mistake(f"loss {name!r} gives {', '.join(given)} for tokens [2, 4]; it must give one float32 a token")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def sft(graphdef: Any, *, loss: Callable = cross_entropy, implementation: str | None = None) -> Algorithm:
    """Minimise Σ loss(token) / number of tokens, over the `mask` of the whole batch.

    A token mean over the global batch, not a mean of rows' means, nor of microbatches' means.

    Args:
      graphdef: the structure of a model that returns hidden states and has `unembed()`.
      loss: one value per token, from `losses/language.py` or your own: `(logps, log_normalizer, mean_logit)` in nats.
      implementation: of `next_token_logps`; None picks the best for the platform.

    Logs `mean_token_accuracy` and `entropy` (nats) over the same tokens.
    """

    def token_loss(params: PyTree, batch: TokenBatch) -> tuple[Average, dict[str, Average]]:
        model, hidden = hidden_states(graphdef, params, batch)
        token = next_token_logps(
            hidden,
            model.unembed(),
            batch.tokens,
            batch.mask,
            entropy=True,
            log_normalizer=True,
            mean_logit=True,
            correct=True,
            implementation=implementation,
            shards=shards_of(model),
        )
        values = loss(token.logps, token.log_normalizer, token.mean_logit)
        return Average.of(values, batch.mask), {
            "mean_token_accuracy": Average.of(token.correct, batch.mask),
            "entropy": Average.of(token.entropy, batch.mask),
        }

    return Algorithm(loss=token_loss)
