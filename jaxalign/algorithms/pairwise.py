"""Direct preference optimisation with any loss of pairs: of the table, a weighted sum of several, or your own.

One forward reads chosen and rejected together. The reference runs in `prepare`, unless its log-probabilities came with
the batch (precomputed) or the loss needs none. With LoRA the reference is the base, which is in memory anyway.

Losses that look at the whole batch (its mean margin, or its order, as AOT's sort) see the whole batch whatever the
microbatches: `prepare` reads the policy's log-probabilities without gradient, `across` computes from all of them the
statistic, or the exact derivative of the loss with respect to each log-probability, and the differentiated loss of a
microbatch is linear in its own log-probabilities with that derivative as its slope. That costs one forward more.

Running means (BCO's reward shift, β-DPO's M₀) are of the same statistics; `remember` stores them in the train state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.algorithms import memory
from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.columns import OLD, REF, columns_of, with_averages, with_columns
from jaxalign.losses import contract
from jaxalign.mistake import Mistake
from jaxalign.models.reading import COLLISION, LOGPS, PUBLIC, ResponseStats, response_lengths, response_logps
from jaxalign.types import Average, PyTree, ResponseBatch

RATIO_STATISTICS = ("mean_log_ratio", "mean_margin", "running_log_ratio", "running_margin")
STATISTICS = ("mean_chosen_length", *RATIO_STATISTICS)
SLOPES, VALUE = "slopes_", "whole_batch_loss"


def pairwise(
    policy: Any,
    reference: Any = None,
    *,
    loss: Callable,
    pairs: int | None = None,
    implementation: str | None = None,
    epochs: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """Minimise the mean over pairs of `loss`.

    Args:
      policy: graphdef of the model that is trained.
      reference: graphdef of the frozen model, whose parameters are `frozen`; None if the loss needs none, or if its
        log-probabilities come with the batch.
      loss: one value per pair; its parameters name its inputs (`losses/contract.py`: PAIR_INPUTS).
      pairs: number of pairs in a batch; only losses that sort the whole batch need it.
      implementation: an implementation of `ops/logprobs.py`; None is its default.
      epochs: passes over a batch.
      minibatches: optimizer updates in each pass.

    Batches are `ResponseBatch`es of K = 2, chosen first. Logs, in TRL's names and as means over pairs: the implicit
    rewards β (log π - log π_ref) as `rewards/chosen`, `rewards/rejected`, `rewards/margins` and `rewards/accuracies`;
    log π of whole responses as `logps/chosen` and `logps/rejected`, which may both fall while their margin grows.

    Raises:
      Mistake: the loss has an unknown input, or sorts a batch and `pairs` is not given.
    """
    names = contract.check_inputs(loss, contract.PAIR_INPUTS)
    wanted, sorts = _wanted(names), contract.needs_whole_batch(loss)
    needs_ref, has_statistics = contract.needs_reference(loss), any(name in STATISTICS for name in names)
    reads_twice = sorts or any(name in RATIO_STATISTICS for name in names)
    if sorts and pairs is None:
        raise Mistake(f"{contract.loss_name(loss)} compares all pairs of a batch; give `pairs`, their number")
    beta, momenta = contract.keyword(loss, "beta", 1.0), contract.momenta(loss)

    def stats_of(graphdef: nnx.GraphDef, params: PyTree, batch: ResponseBatch) -> ResponseStats:
        return response_logps(nnx.merge(graphdef, params), batch, wanted=wanted, implementation=implementation)

    def prepare(params: PyTree, frozen: PyTree, batch: ResponseBatch) -> ResponseBatch:
        if needs_ref and REF + LOGPS not in batch.columns:
            batch = with_columns(batch, stats_of(reference, frozen, batch), prefix=REF)
        if reads_twice:
            batch = with_columns(batch, jax.lax.stop_gradient(stats_of(policy, params, batch)), prefix=OLD)
        return batch

    def remember(carry: memory.Means, batch: ResponseBatch) -> tuple[memory.Means, ResponseBatch]:
        if not momenta:
            return carry, batch
        carry = memory.advance_means(carry, _statistics(batch), momenta)
        return carry, with_averages(batch, carry)

    def across(batch: ResponseBatch) -> ResponseBatch:
        if sorts or has_statistics:
            batch = with_averages(batch, _statistics(batch))
        return _with_slopes(batch, loss, pairs) if sorts else batch

    def pair_loss(params: PyTree, batch: ResponseBatch) -> tuple[Average, dict[str, Average]]:
        stats = stats_of(policy, params, batch)
        if sorts:
            values = batch.columns[VALUE] + _linear(stats, batch)
        else:
            values = contract.checked(loss, pair_inputs(stats, batch), (batch.valid.size,))
            values = values.reshape(batch.valid.shape)
        return Average.of(values, batch.valid), _metrics(stats, batch, beta)

    return Algorithm(
        loss=pair_loss,
        prepare=prepare,
        across=across,
        epochs=epochs,
        minibatches=minibatches,
        carry=memory.start_means(momenta) if momenta else (),
        remember=remember,
    )


def _wanted(names: tuple[str, ...]) -> tuple[str, ...]:
    kinds = {PUBLIC: "public_logps", COLLISION: "collision_logps"}
    return (LOGPS, *(kind for kind, end in kinds.items() if any(name.endswith(end) for name in names)))


def pair_inputs(stats: ResponseStats, batch: ResponseBatch) -> dict[str, jax.Array]:
    """By the names of PAIR_INPUTS, flat [B·G] each, absent pairs too; statistics of the whole batch as scalars."""
    lengths = jnp.maximum(response_lengths(batch), 1.0)
    inputs = {"chosen_lengths": lengths[..., 0].reshape(-1), "rejected_lengths": lengths[..., 1].reshape(-1)}
    for model, model_stats in (("policy", stats), ("ref", columns_of(batch, REF))):
        for name, values in model_stats.items():
            for k, side in enumerate(("chosen", "rejected")):
                inputs[f"{model}_{side}_{name}"] = values[..., k].reshape(-1)
    # a scalar travels as a column so that a microbatch has it; every entry is the same
    return inputs | {name: batch.columns[name][0, 0] for name in STATISTICS if name in batch.columns}


def _statistics(batch: ResponseBatch) -> dict[str, Average]:
    """Over the pairs of the whole batch, without gradient."""
    averages = {"mean_chosen_length": Average.of(response_lengths(batch)[..., 0], batch.valid)}
    if {OLD + LOGPS, REF + LOGPS} <= set(batch.columns):
        ratio = batch.columns[OLD + LOGPS] - batch.columns[REF + LOGPS]
        averages["mean_log_ratio"] = Average.of(ratio.mean(2), batch.valid)
        averages["mean_margin"] = Average.of(ratio[..., 0] - ratio[..., 1], batch.valid)
    return averages


def _with_slopes(batch: ResponseBatch, loss: Callable, pairs: int) -> ResponseBatch:
    """The batch with the derivative of its loss for each log-probability, and each pair's share of its value."""
    # a batch holds so many pairs: the valid ones
    first = jnp.argsort(~batch.valid.reshape(-1), stable=True)[:pairs]

    def total(stats: ResponseStats) -> jax.Array:
        inputs = pair_inputs(stats, batch)
        inputs = {name: value if value.ndim == 0 else value[first] for name, value in inputs.items()}
        return jnp.sum(contract.checked(loss, inputs, first.shape))

    value, slopes = jax.value_and_grad(total)(columns_of(batch, OLD))
    batch = with_columns(batch, slopes, prefix=SLOPES)
    return with_columns(batch, {VALUE: jnp.where(batch.valid, value / pairs, 0.0)})


def _linear(stats: ResponseStats, batch: ResponseBatch) -> jax.Array:
    """Σ slope (log π - its value): 0, with the gradient of the whole batch's loss."""
    slopes = columns_of(batch, SLOPES)
    return sum(jnp.sum(slopes[n] * (stats[n] - jax.lax.stop_gradient(stats[n])), axis=2) for n in slopes)


def _metrics(stats: ResponseStats, batch: ResponseBatch, beta: float) -> dict[str, Average]:
    logps = stats[LOGPS]
    if REF + LOGPS in batch.columns:
        rewards = beta * (logps - batch.columns[REF + LOGPS])
    else:
        rewards = beta * logps / jnp.maximum(response_lengths(batch), 1.0)
    margins = rewards[..., 0] - rewards[..., 1]
    values = {
        "logps/chosen": logps[..., 0],
        "logps/rejected": logps[..., 1],
        "rewards/chosen": rewards[..., 0],
        "rewards/rejected": rewards[..., 1],
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
    }
    return {name: Average.of(value, batch.valid) for name, value in values.items()}
