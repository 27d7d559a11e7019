"""Process reward models: a score at the end of each step of a solution, the logit that the step is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithms.base import Algorithm
from jaxalign.losses import contract
from jaxalign.models import heads
from jaxalign.models.reading import hidden_of
from jaxalign.types import Average, PyTree, ResponseBatch

# Columns [B G S]: index of the step's last token in its sequence, and label; -1 where there is no step
ENDS, LABELS = "step_ends", "step_labels"


def process_reward(trunk: Any, *, loss: Callable) -> Algorithm:
    """Minimise the mean over steps and members of `loss`; every step counts once, however long its solution is.

    Args:
      trunk: graphdef; params are those of `algorithms/reward.py`.
      loss: one value per step; its parameters name its inputs (`losses/contract.py`: STEP_INPUTS).

    Batches are `ResponseBatch`es of K = 1 with the columns ENDS and LABELS. Logs `accuracy`, the share of steps whose
    score is above 0 where the label is above 1/2, and elsewhere not; `mean_reward`; and `disagreement` of members.

    Raises:
      Mistake: the loss has any other input.
    """
    contract.check_inputs(loss, contract.STEP_INPUTS)

    def step_loss(params: PyTree, batch: ResponseBatch) -> tuple[Average, dict[str, Average]]:
        member_scores, labels = step_scores(trunk, params, batch), batch.columns[LABELS]
        labelled = (labels >= 0) & batch.valid[..., None]
        labels = jnp.where(labelled, labels, 0.0)
        count = member_scores.shape[-1]
        inputs = [{"step_scores": member_scores[..., m], "step_labels": labels} for m in range(count)]
        members = [contract.checked(loss, member_inputs, labels.shape) for member_inputs in inputs]
        scores = heads.combine(member_scores)
        metrics = {
            "accuracy": Average.of((scores > 0) == (labels > 0.5), labelled),
            "mean_reward": Average.of(scores, labelled),
        }
        if count > 1:
            metrics["disagreement"] = Average.of(heads.disagreement(member_scores), labelled)
        return Average.of(sum(members) / count, labelled), metrics

    return Algorithm(loss=step_loss)


def step_scores(trunk: Any, params: PyTree, batch: ResponseBatch) -> jax.Array:
    """Float32[B G S M], each member's score at the end of each step; of any number where there is none."""
    rows, _, length = batch.sequences.tokens.shape
    time = jnp.broadcast_to(jnp.arange(length), batch.sequences.tokens.shape)
    opens = (batch.sequences.positions == 0) & (batch.sequences.segment_ids > 0)
    starts = batch.per_response(jnp.where(opens, time, 0))[..., 0].astype(jnp.int32)  # [B G]
    starts += batch.slots[..., 0] // batch.stride * length  # of its plane
    places = starts[..., None] + jnp.maximum(batch.columns[ENDS], 0)

    def read(model: Any, head: jax.Array) -> jax.Array:
        scores = heads.scores(hidden_of(model, batch.flat()), head)
        flat = scores.reshape(rows, -1, head.shape[0])
        return jnp.take_along_axis(flat, places.reshape(rows, -1, 1), axis=1).reshape(*places.shape, -1)

    return heads.each_member(trunk, params, read)
