"""Direct preference optimisation with any loss of pairs: of the table, a weighted sum of several, or your own.

One forward reads chosen and rejected together. The reference runs in `prepare`, unless its log-probabilities came with
the batch (precomputed) or the loss needs none. With LoRA the reference is the base, which the policy holds anyway.

Losses that look at the whole batch (its mean margin, or its order, as AOT's sort) see the whole batch whatever the
microbatches: `prepare` reads the policy's log-probabilities without gradient, `across` computes from all of them the
statistic, or the exact derivative of the loss with respect to each log-probability, and the differentiated loss of a
microbatch is linear in its own log-probabilities with that derivative as its slope. That costs one forward more.

Running means (BCO's reward shift, β-DPO's M₀) are of the same statistics; `remember` keeps them in the train state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.algorithms import memory
from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.responses import (
    COLLISION,
    LOGPS,
    PUBLIC,
    REF,
    Stats,
    columns_of,
    response_lengths,
    response_logps,
    with_columns,
)
from jaxalign.losses import contract
from jaxalign.losses.pairs.margin import dpo as sigmoid
from jaxalign.mistake import Mistake
from jaxalign.types import Average, PyTree, ResponseBatch

RATIO_STATISTICS = ("mean_log_ratio", "mean_margin", "running_log_ratio", "running_margin")
STATISTICS = ("mean_chosen_length", *RATIO_STATISTICS)
OLD, SLOPES, VALUE = "old_", "slopes_", "whole_batch_loss"


def dpo(
    graphdef: Any,
    *,
    loss: Callable = sigmoid,
    ref_graphdef: Any = None,
    groups: int | None = None,
    implementation: str | None = None,
) -> Algorithm:
    """Minimise the mean over pairs of `loss`.

    Args:
      graphdef: the policy's structure.
      loss: one value per pair; its parameters name what it is given (`losses/contract.py`: PAIR_INPUTS).
      ref_graphdef: the structure of the frozen model, if the loss needs a reference: `frozen` holds its parameters.
      groups: pairs in a batch; losses that look at the whole batch need to know.
      implementation: of the log-probabilities.

    Batches are `ResponseBatch`es of K = 2, chosen first. Logs, in TRL's names and as means over pairs: the implicit
    rewards β (log π - log π_ref) as `rewards/chosen`, `rewards/rejected`, `rewards/margins` and `rewards/accuracies`;
    log π of whole responses as `logps/chosen` and `logps/rejected`, which may both fall while their margin grows.

    Raises:
      Mistake: the loss names an unknown input, or sorts a batch whose size is not told.
    """
    names = contract.check_inputs(loss, contract.PAIR_INPUTS)
    wanted, compares = _wanted(names), contract.needs_whole_batch(loss)
    needs_ref, around = contract.needs_reference(loss), any(name in STATISTICS for name in names)
    reads_twice = compares or any(name in RATIO_STATISTICS for name in names)
    if compares and groups is None:
        raise Mistake(f"{contract.loss_name(loss)} compares pairs of the whole batch; say how many it has (groups=)")
    beta, momenta = contract.keyword(loss, "beta", 1.0), contract.momenta(loss)

    def stats_of(structure: Any, params: PyTree, batch: ResponseBatch) -> Stats:
        return response_logps(nnx.merge(structure, params), batch, wanted=wanted, implementation=implementation)

    def prepare(params: PyTree, frozen: PyTree, batch: ResponseBatch) -> ResponseBatch:
        if needs_ref and REF + LOGPS not in batch.columns:
            batch = with_columns(batch, REF, stats_of(ref_graphdef, frozen, batch))
        if reads_twice:
            batch = with_columns(batch, OLD, jax.lax.stop_gradient(stats_of(graphdef, params, batch)))
        return batch

    def remember(carry: memory.Carry, batch: ResponseBatch) -> tuple[memory.Carry, ResponseBatch]:
        if not momenta:
            return carry, batch
        carry = memory.advance(carry, _statistics(batch), momenta)
        return carry, with_columns(batch, "", everywhere(carry, batch))

    def across(batch: ResponseBatch) -> ResponseBatch:
        if compares or around:
            batch = with_columns(batch, "", everywhere(_statistics(batch), batch))
        return _linearised(batch, columns_of(batch, OLD)) if compares else batch

    def _linearised(batch: ResponseBatch, old: Stats) -> ResponseBatch:
        """With the derivative of the batch's loss for each log-probability, and each pair's share of its value."""
        first = jnp.argsort(~batch.valid.reshape(-1), stable=True)[
            :groups
        ]  # a batch holds so many pairs: the valid ones

        def total(stats: Stats) -> jax.Array:
            values = pair_inputs(stats, batch)
            values = {name: value if value.ndim == 0 else value[first] for name, value in values.items()}
            return jnp.sum(contract.checked(loss, values, first.shape))

        value, slopes = jax.value_and_grad(total)(old)
        batch = with_columns(batch, SLOPES, slopes)
        return with_columns(batch, "", {VALUE: jnp.where(batch.valid, value / groups, 0.0)})

    def pair_loss(params: PyTree, batch: ResponseBatch) -> tuple[Average, dict[str, Average]]:
        policy = stats_of(graphdef, params, batch)
        if compares:
            values = batch.columns[VALUE] + _linear(policy, batch)
        else:
            values = contract.checked(loss, pair_inputs(policy, batch), (batch.valid.size,))
            values = values.reshape(batch.valid.shape)
        return Average.of(values, batch.valid), _metrics(policy, batch, beta)

    carry = memory.start(momenta) if momenta else ()
    return Algorithm(loss=pair_loss, prepare=prepare, across=across, carry=carry, remember=remember)


def _wanted(names: tuple[str, ...]) -> tuple[str, ...]:
    kinds = {PUBLIC: "public_logps", COLLISION: "collision_logps"}
    return (LOGPS, *(kind for kind, end in kinds.items() if any(name.endswith(end) for name in names)))


def pair_inputs(policy: Stats, batch: ResponseBatch) -> dict[str, jax.Array]:
    """By the names of PAIR_INPUTS, flat [B·G] each, absent pairs too; statistics of the whole batch as scalars."""
    lengths = jnp.maximum(response_lengths(batch), 1.0)
    found = {"chosen_lengths": lengths[..., 0].reshape(-1), "rejected_lengths": lengths[..., 1].reshape(-1)}
    for model, stats in (("policy", policy), ("ref", columns_of(batch, REF))):
        for name, values in stats.items():
            for k, side in enumerate(("chosen", "rejected")):
                found[f"{model}_{side}_{name}"] = values[..., k].reshape(-1)
    # a scalar travels as a column so that a microbatch has it; every entry is the same
    return found | {name: batch.columns[name][0, 0] for name in STATISTICS if name in batch.columns}


def everywhere(averages: dict[str, Average], batch: ResponseBatch) -> Stats:
    """Each average's value in every entry of a column [B G]."""
    return {name: jnp.broadcast_to(average.compute(), batch.valid.shape) for name, average in averages.items()}


def _statistics(batch: ResponseBatch) -> dict[str, Average]:
    """Over the pairs of the whole batch, without gradient."""
    mean = lambda values: Average.of(values, batch.valid)  # noqa: E731
    found = {"mean_chosen_length": mean(response_lengths(batch)[..., 0])}
    if {OLD + LOGPS, REF + LOGPS} <= set(batch.columns):
        ratio = batch.columns[OLD + LOGPS] - batch.columns[REF + LOGPS]
        found |= {"mean_log_ratio": mean(ratio.mean(2)), "mean_margin": mean(ratio[..., 0] - ratio[..., 1])}
    return found


def _linear(policy: Stats, batch: ResponseBatch) -> jax.Array:
    """Σ slope (log π - its value): 0, with the gradient of the whole batch's loss."""
    slopes = columns_of(batch, SLOPES)
    return sum(jnp.sum(slopes[n] * (policy[n] - jax.lax.stop_gradient(policy[n])), axis=2) for n in slopes)


def _metrics(policy: Stats, batch: ResponseBatch, beta: float) -> dict[str, Average]:
    logps = policy[LOGPS]
    mean = lambda values: Average.of(values, batch.valid)  # noqa: E731
    found = {"logps/chosen": mean(logps[..., 0]), "logps/rejected": mean(logps[..., 1])}
    if REF + LOGPS in batch.columns:
        rewards = beta * (logps - batch.columns[REF + LOGPS])
    else:
        rewards = beta * logps / jnp.maximum(response_lengths(batch), 1.0)
    margins = rewards[..., 0] - rewards[..., 1]
    found |= {"rewards/chosen": mean(rewards[..., 0]), "rewards/rejected": mean(rewards[..., 1])}
    return found | {"rewards/margins": mean(margins), "rewards/accuracies": mean(margins > 0)}
