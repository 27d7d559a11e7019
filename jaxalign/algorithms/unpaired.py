"""Kahneman-Tversky optimisation and its family: responses with a label each, no pairs.

The KL that KTO compares with is estimated from mismatched responses, which the data loader makes and which are the same
for policy and reference. Its mean is taken over the global batch: `prepare` reads both models without gradient, and
`across` sees all rows, so microbatches change nothing. `remember` stores BCO's means from step to step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxalign.algorithms import memory
from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.columns import OLD, REF, columns_of, with_averages, with_columns
from jaxalign.losses import contract
from jaxalign.models.reading import LOGPS, ResponseStats, response_logps
from jaxalign.types import Average, PyTree, ResponseBatch, UnpairedBatch

RATIO_MEANS = ("mean_desirable_log_ratio", "mean_undesirable_log_ratio")
RUNNING_MEANS = ("running_desirable_log_ratio", "running_undesirable_log_ratio")
SCALARS = ("kl", *RATIO_MEANS, *RUNNING_MEANS)


def unpaired(policy: Any, reference: Any = None, *, loss: Callable, implementation: str | None = None) -> Algorithm:
    """Minimise the mean over responses of `loss`.

    Args:
      policy: graphdef of the model that is trained.
      reference: graphdef of the frozen model, whose parameters are `frozen`; None if its log-probabilities come with
        the batch.
      loss: one value per response; its parameters name its inputs (`losses/contract.py`: UNPAIRED_INPUTS).
      implementation: an implementation of `ops/logprobs.py`; None is its default.

    Batches are `UnpairedBatch`es. Logs, in TRL's names, `kl` (the estimate, before it is clamped at 0), and over the
    desirable (chosen) and undesirable (rejected) responses `rewards/chosen`, `rewards/rejected`, `logps/chosen`,
    `logps/rejected`.

    Raises:
      Mistake: the loss has an unknown input.
    """
    names = contract.check_inputs(loss, contract.UNPAIRED_INPUTS)
    needs_ref, needs_kl = contract.needs_reference(loss), "kl" in names
    needs_means = any(name in (*RATIO_MEANS, *RUNNING_MEANS) for name in names)
    beta, momenta = contract.keyword(loss, "beta", 1.0), contract.momenta(loss)

    def stats_of(graphdef: nnx.GraphDef, params: PyTree, batch: ResponseBatch) -> ResponseStats:
        return response_logps(nnx.merge(graphdef, params), batch, implementation=implementation)

    def with_reference(frozen: PyTree, batch: ResponseBatch) -> ResponseBatch:
        if not needs_ref or REF + LOGPS in batch.columns:
            return batch
        return with_columns(batch, stats_of(reference, frozen, batch), prefix=REF)

    def prepare(params: PyTree, frozen: PyTree, batch: UnpairedBatch) -> UnpairedBatch:
        rated, mismatched = with_reference(frozen, batch.rated), batch.mismatched
        if needs_kl:
            mismatched = with_reference(frozen, mismatched)
            mismatched = with_columns(mismatched, stats_of(policy, params, mismatched), prefix=OLD)
        if needs_means:
            rated = with_columns(rated, stats_of(policy, params, rated), prefix=OLD)
        return UnpairedBatch(rated, mismatched)

    def remember(carry: memory.Means, batch: UnpairedBatch) -> tuple[memory.Means, UnpairedBatch]:
        if not momenta:
            return carry, batch
        carry = memory.advance_means(carry, _means_by_label(batch.rated), momenta)
        return carry, dataclasses.replace(batch, rated=with_averages(batch.rated, carry))

    def across(batch: UnpairedBatch) -> UnpairedBatch:
        averages = _means_by_label(batch.rated) if needs_means else {}
        if needs_kl:
            averages["kl"] = Average.of(_log_ratio(batch.mismatched), batch.mismatched.valid)
        return dataclasses.replace(batch, rated=with_averages(batch.rated, averages))

    def response_loss(params: PyTree, batch: UnpairedBatch) -> tuple[Average, dict[str, Average]]:
        rated = batch.rated
        logps = stats_of(policy, params, rated)[LOGPS][..., 0]
        inputs = {"policy_logps": logps, "labels": rated.columns["label"]}
        inputs |= {f"ref_{name}": column[..., 0] for name, column in columns_of(rated, REF).items()}
        metrics = _metrics(inputs, rated, beta)
        inputs = {name: value.reshape(-1) for name, value in inputs.items()}
        # a scalar travels as a column so that a microbatch has it; every entry is the same
        inputs |= {name: rated.columns[name][0, 0] for name in SCALARS if name in rated.columns}
        if "kl" in inputs:
            metrics["kl"] = Average.of(rated.columns["kl"], rated.valid)
        values = contract.checked(loss, inputs, (rated.valid.size,)).reshape(rated.valid.shape)
        return Average.of(values, rated.valid), metrics

    carry = memory.start_means(momenta) if momenta else ()
    return Algorithm(loss=response_loss, prepare=prepare, across=across, carry=carry, remember=remember)


def _means_by_label(rated: ResponseBatch) -> dict[str, Average]:
    label, ratio = rated.columns["label"], _log_ratio(rated)
    masks = (rated.valid & label, rated.valid & ~label)
    return {name: Average.of(ratio, mask) for name, mask in zip(RATIO_MEANS, masks, strict=True)}


def _log_ratio(batch: ResponseBatch) -> jax.Array:
    return (batch.columns[OLD + LOGPS] - batch.columns[REF + LOGPS])[..., 0]


def _metrics(inputs: dict[str, jax.Array], rated: ResponseBatch, beta: float) -> dict[str, Average]:
    rewards = beta * (inputs["policy_logps"] - inputs.get("ref_logps", 0.0))
    metrics: dict[str, Average] = {}
    for name, of_class in (("chosen", inputs["labels"]), ("rejected", ~inputs["labels"])):
        metrics[f"rewards/{name}"] = Average.of(rewards, rated.valid & of_class)
        metrics[f"logps/{name}"] = Average.of(inputs["policy_logps"], rated.valid & of_class)
    return metrics
