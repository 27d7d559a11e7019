"""Supervised fine-tuning: the mean cross-entropy of the tokens that the model must produce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxalign.algorithms.base import Algorithm
from jaxalign.losses import contract
from jaxalign.losses.language import cross_entropy
from jaxalign.models.reading import hidden_states, shards_of
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.types import Average, PyTree, TokenBatch


def sft(graphdef: Any, *, loss: Callable = cross_entropy, implementation: str | None = None) -> Algorithm:
    """Minimise Σ loss(token) / number of tokens, over the `mask` of the whole batch.

    A token mean over the global batch, not a mean of rows' means, nor of microbatches' means.

    Args:
      graphdef: the structure of a model that returns hidden states and has `unembed()`.
      loss: one value per token; its parameters name its inputs (`losses/contract.py`: LANGUAGE_INPUTS).
      implementation: of `next_token_logps`; None picks the best for the platform.

    Logs `mean_token_accuracy` and `entropy` (nats) over the same tokens.

    Raises:
      Mistake: the loss has an unknown input.
    """
    contract.check_inputs(loss, contract.LANGUAGE_INPUTS)

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
        inputs = {name: getattr(token, name) for name in contract.LANGUAGE_INPUTS}
        values = contract.checked(loss, inputs, batch.mask.shape)
        return Average.of(values, batch.mask), {
            "mean_token_accuracy": Average.of(token.correct, batch.mask),
            "entropy": Average.of(token.entropy, batch.mask),
        }

    return Algorithm(loss=token_loss)
