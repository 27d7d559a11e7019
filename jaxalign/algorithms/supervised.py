"""Supervised fine-tuning: the mean loss of the tokens that the model must produce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxalign.algorithms.base import Algorithm
from jaxalign.losses import contract
from jaxalign.models.reading import hidden_states, token_stats
from jaxalign.types import Average, PyTree, TokenBatch


def supervised(policy: Any, *, loss: Callable, implementation: str | None = None) -> Algorithm:
    """Minimise Σ loss(token) / number of tokens, over the `mask` of the whole batch.

    A token mean over the global batch, not a mean of rows' means, nor of microbatches' means.

    Args:
      policy: graphdef of a model that returns hidden states and has `unembed()`.
      loss: one value per token; its parameters name its inputs (`losses/contract.py`: LANGUAGE_INPUTS).
      implementation: an implementation of `ops/logprobs.py`; None is its default.

    Logs `mean_token_accuracy` and `entropy` (nats) over the same tokens.

    Raises:
      Mistake: the loss has an unknown input.
    """
    contract.check_inputs(loss, contract.LANGUAGE_INPUTS)
    extras = {"entropy": True, "log_normalizer": True, "mean_logit": True, "correct": True}

    def token_loss(params: PyTree, batch: TokenBatch) -> tuple[Average, dict[str, Average]]:
        model, hidden = hidden_states(policy, params, batch)
        token = token_stats(model, hidden, batch, **extras, implementation=implementation)
        inputs = {name: getattr(token, name) for name in contract.LANGUAGE_INPUTS}
        values = contract.checked(loss, inputs, batch.mask.shape)
        return Average.of(values, batch.mask), {
            "mean_token_accuracy": Average.of(token.correct, batch.mask),
            "entropy": Average.of(token.entropy, batch.mask),
        }

    return Algorithm(loss=token_loss)
