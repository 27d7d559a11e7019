"""Reward models: scores of whole responses that put the better one first, by any loss of losses/ranking.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithms.base import Algorithm
from jaxalign.losses import contract
from jaxalign.models import heads
from jaxalign.models.reading import hidden_of, last_tokens
from jaxalign.types import Average, PyTree, ResponseBatch

COLUMNS = {"margin": "margins", "preference": "preferences", "tie": "ties"}  # column of a batch -> input of losses


def reward(trunk: Any, *, loss: Callable) -> Algorithm:
    """Minimise the mean over groups and members of `loss`.

    Args:
      trunk: graphdef; params are {"model": the trunk's, "head": [M D]}, with {"members": [M ...]} where each member
        has adapters of its own.
      loss: one value per group; its parameters name its inputs (`losses/contract.py`: OUTCOME_INPUTS).

    Batches are `ResponseBatch`es, the best response first, unless columns["ranks"] says otherwise; COLUMNS of pairs
    are optional. Logs, in TRL's names: `accuracy`, `margin` and `mean_reward` of the members' mean (over all pairs of
    different rank that are no tie), and `disagreement` where there are several.

    Raises:
      Mistake: the loss has an input that a batch of responses does not have.
    """
    contract.check_inputs(loss, contract.OUTCOME_INPUTS)

    def group_loss(params: PyTree, batch: ResponseBatch) -> tuple[Average, dict[str, Average]]:
        scores = response_scores(trunk, params, batch)
        shape, inputs = (batch.valid.size,), [_inputs(scores[..., m], batch) for m in range(scores.shape[-1])]
        members = [contract.checked(loss, member_inputs, shape) for member_inputs in inputs]
        values = sum(members) / len(members)
        return Average.of(values.reshape(batch.valid.shape), _compared(batch)), _metrics(scores, batch)

    return Algorithm(loss=group_loss)


def response_scores(trunk: Any, params: PyTree, batch: ResponseBatch) -> jax.Array:
    """Float32[B G K M], each member's score at the last token of each response; 0 where there is none."""
    last = last_tokens(batch)

    def of_member(scores: jax.Array) -> jax.Array:
        return batch.per_response(jnp.where(last, batch.unflat(scores), 0.0))

    def read(model: Any, head: jax.Array) -> jax.Array:
        scores = heads.scores(hidden_of(model, batch.flat()), head)  # [B·Q T M]
        return jax.vmap(of_member, in_axes=-1, out_axes=-1)(scores)

    return heads.each_member(trunk, params, read)


def _ranks(batch: ResponseBatch) -> jax.Array:
    best_first = jnp.arange(batch.slots.shape[2], dtype=jnp.int32).reshape(1, 1, -1)
    return batch.columns.get("ranks", jnp.broadcast_to(best_first, batch.slots.shape))


def _compared(batch: ResponseBatch) -> jax.Array:
    """Bool[B G], True where two responses of different rank exist."""
    ranks, present = _ranks(batch), batch.present
    low = jnp.min(jnp.where(present, ranks, jnp.iinfo(jnp.int32).max), axis=2)
    return batch.valid & (jnp.max(jnp.where(present, ranks, -1), axis=2) > low)


def _inputs(scores: jax.Array, batch: ResponseBatch) -> dict[str, jax.Array]:
    candidates = {"scores": scores, "ranks": _ranks(batch), "candidates": batch.present}
    inputs = {name: value.reshape(-1, value.shape[-1]) for name, value in candidates.items()}
    if scores.shape[2] == 2:
        inputs |= {"chosen_scores": scores[..., 0].reshape(-1), "rejected_scores": scores[..., 1].reshape(-1)}
    return inputs | {ours: batch.columns[name].reshape(-1) for name, ours in COLUMNS.items() if name in batch.columns}


def _metrics(member_scores: jax.Array, batch: ResponseBatch) -> dict[str, Average]:
    """Accuracy and margin over all pairs of different rank, of which a pair of responses has one."""
    scores, ranks, present = heads.combine(member_scores), _ranks(batch), batch.present
    better = (ranks[..., :, None] < ranks[..., None, :]) & present[..., :, None] & present[..., None, :]
    if "tie" in batch.columns:
        better &= ~batch.columns["tie"][..., None, None]
    margins = scores[..., :, None] - scores[..., None, :]
    metrics = {
        "accuracy": Average.of(margins > 0, better),
        "margin": Average.of(margins, better),
        "mean_reward": Average.of(scores, present),
    }
    if member_scores.shape[-1] > 1:
        metrics["disagreement"] = Average.of(heads.disagreement(member_scores), present)
    return metrics
