"""Process reward models: a score at the end of each step of a solution, the logit that the step is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.responses import hidden_states
from jaxalign.algorithms.reward import laid_over
from jaxalign.losses import contract
from jaxalign.losses.ranking import process
from jaxalign.models import heads
from jaxalign.types import Average, PyTree, ResponseBatch

ENDS, LABELS = (
    "step_ends",
    "step_labels",
)  # columns [B G S]: index in the sequence, and label; -1 where there is no step


def process_reward(graphdef: Any, *, loss: Callable = process) -> Algorithm:
    """Minimise the mean over steps and members of `loss`; every step counts once, however long its solution is.

    Args:
      graphdef: the trunk's structure; params are those of `algorithms/reward.py`.
      loss: one value per step, of (step_scores, step_labels).

    Batches are `ResponseBatch`es of K = 1 with the columns ENDS and LABELS. Logs `accuracy`, the share of steps whose
    score is above 0 where the label is above 1/2, and elsewhere not; `mean_reward`; and `disagreement` of members.

    Raises:
      Mistake: the loss asks for anything else.
    """
    contract.check_inputs(loss, contract.STEP_INPUTS)

    def step_loss(params: PyTree, batch: ResponseBatch) -> tuple[Average, dict[str, Average]]:
        found, labels = step_scores(graphdef, params, batch), batch.columns[LABELS]
        here = (labels >= 0) & batch.valid[..., None]
        labels = jnp.where(here, labels, 0.0)
        inputs = [{"step_scores": found[..., m], "step_labels": labels} for m in range(found.shape[-1])]
        members = [contract.checked(loss, values, labels.shape) for values in inputs]
        together = heads.combine(found)
        metrics = {
            "accuracy": Average.of((together > 0) == (labels > 0.5), here),
            "mean_reward": Average.of(together, here),
        }
        if len(members) > 1:
            metrics["disagreement"] = Average.of(heads.disagreement(found), here)
        return Average.of(sum(members) / len(members), here), metrics

    return Algorithm(loss=step_loss, assemble=laid_over)


def step_scores(graphdef: Any, params: PyTree, batch: ResponseBatch) -> jax.Array:
    """Float32[B G S M], each member's score at the end of each step; of any number where there is none."""
    rows, _, length = batch.sequences.tokens.shape
    time = jnp.broadcast_to(jnp.arange(length), batch.sequences.tokens.shape)
    opens = (batch.sequences.positions == 0) & (batch.sequences.segment_ids > 0)
    starts = batch.per_response(jnp.where(opens, time, 0))[..., 0].astype(jnp.int32)  # [B G]
    starts += batch.slots[..., 0] // batch.stride * length  # of its plane
    places = starts[..., None] + jnp.maximum(batch.columns[ENDS], 0)

    def read(model: Any, head: jax.Array) -> jax.Array:
        every = heads.scores(hidden_states(model, batch), head)
        flat = every.reshape(rows, -1, head.shape[0])
        return jnp.take_along_axis(flat, places.reshape(rows, -1, 1), axis=1).reshape(*places.shape, -1)

    return heads.each_member(graphdef, params, read)
