"""Reward models: scores of whole responses that put the better one first, by any loss of losses/ranking.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.responses import ends, hidden_states
from jaxalign.losses import contract
from jaxalign.losses.ranking import bradley_terry
from jaxalign.models import heads
from jaxalign.types import Average, PyTree, ResponseBatch

COLUMNS = {"margin": "margins", "preference": "preferences", "tie": "ties"}  # of a batch, and what losses call them


def reward(graphdef: Any, *, loss: Callable = bradley_terry) -> Algorithm:
    """Minimise the mean over groups and members of `loss`.

    Args:
      graphdef: the trunk's structure; params are {"model": the trunk's, "head": [M D]}, with {"members": [M ...]} where
        each member has adapters of its own.
      loss: one value per group; its parameters name what it is given (OUTCOME_INPUTS).

    Batches are `ResponseBatch`es, the best response first, unless columns["ranks"] says otherwise; COLUMNS of pairs,
    if there are any, are for losses that ask for them. Logs, in TRL's names: `accuracy`, `margin` and `mean_reward` of
    the members' mean (over all pairs of different rank that are no tie), and `disagreement` where there are several.

    Raises:
      Mistake: the loss names an input that a batch of responses does not have.
    """
    contract.check_inputs(loss, contract.OUTCOME_INPUTS)

    def group_loss(params: PyTree, batch: ResponseBatch) -> tuple[Average, dict[str, Average]]:
        found = response_scores(graphdef, params, batch)
        shape, inputs = (batch.valid.size,), [_inputs(found[..., m], batch) for m in range(found.shape[-1])]
        members = [contract.checked(loss, values, shape) for values in inputs]
        values = sum(members) / len(members)
        return Average.of(values.reshape(batch.valid.shape), _compared(batch)), _metrics(found, batch)

    return Algorithm(loss=group_loss, assemble=laid_over)


def laid_over(trained: PyTree, frozen: PyTree) -> PyTree:
    """Whole params: the heads, and the adapters or the trunk, over a frozen trunk where there is one."""
    return {**(frozen or {}), **trained}


def response_scores(graphdef: Any, params: PyTree, batch: ResponseBatch) -> jax.Array:
    """Float32[B G K M], each member's score at the last token of each response; 0 where there is none."""
    last = ends(batch)

    def read(model: Any, head: jax.Array) -> jax.Array:
        every = heads.scores(hidden_states(model, batch), head)  # [B·Q T M]
        one = lambda member: batch.per_response(jnp.where(last, batch.unflat(member), 0.0))  # noqa: E731
        return jax.vmap(one, in_axes=-1, out_axes=-1)(every)

    return heads.each_member(graphdef, params, read)


def _ranks(batch: ResponseBatch) -> jax.Array:
    best_first = jnp.arange(batch.slots.shape[2], dtype=jnp.int32).reshape(1, 1, -1)
    return batch.columns.get("ranks", jnp.broadcast_to(best_first, batch.slots.shape))


def _compared(batch: ResponseBatch) -> jax.Array:
    """Bool[B G], True where two responses of different rank exist."""
    ranks, here = _ranks(batch), batch.present
    low = jnp.min(jnp.where(here, ranks, jnp.iinfo(jnp.int32).max), axis=2)
    return batch.valid & (jnp.max(jnp.where(here, ranks, -1), axis=2) > low)


def _inputs(scores: jax.Array, batch: ResponseBatch) -> dict[str, jax.Array]:
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    found = {"scores": flat(scores), "ranks": flat(_ranks(batch)), "candidates": flat(batch.present)}
    if scores.shape[2] == 2:
        found |= {"chosen_scores": scores[..., 0].reshape(-1), "rejected_scores": scores[..., 1].reshape(-1)}
    return found | {ours: batch.columns[name].reshape(-1) for name, ours in COLUMNS.items() if name in batch.columns}


def _metrics(found: jax.Array, batch: ResponseBatch) -> dict[str, Average]:
    """Accuracy and margin over all pairs of different rank, of which a pair of responses has one."""
    scores, ranks, here = heads.combine(found), _ranks(batch), batch.present
    better = (ranks[..., :, None] < ranks[..., None, :]) & here[..., :, None] & here[..., None, :]
    if "tie" in batch.columns:
        better &= ~batch.columns["tie"][..., None, None]
    margins = scores[..., :, None] - scores[..., None, :]
    metrics = {
        "accuracy": Average.of(margins > 0, better),
        "margin": Average.of(margins, better),
        "mean_reward": Average.of(scores, here),
    }
    if found.shape[-1] > 1:
        metrics["disagreement"] = Average.of(heads.disagreement(found), here)
    return metrics
