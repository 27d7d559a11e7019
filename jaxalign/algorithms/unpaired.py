"""Kahneman-Tversky optimisation and its family: responses with a label each, no pairs.

The KL that KTO compares with is estimated from mismatched responses, which the data loader makes and which are the same
for policy and reference. Its mean is taken over the global batch: `prepare` reads both models without gradient, and
`across` sees all rows, so microbatches change nothing. BCO's means are kept from step to step by `remember`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.algorithms import memory
from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.responses import LOGPS, REF, columns_of, response_logps, with_columns
from jaxalign.losses import contract
from jaxalign.losses.unpaired import kto as kahneman_tversky
from jaxalign.types import Average, PyTree, ResponseBatch, UnpairedBatch

RATIO_MEANS = ("mean_desirable_log_ratio", "mean_undesirable_log_ratio")
RUNNING_MEANS = ("running_desirable_log_ratio", "running_undesirable_log_ratio")
SCALARS = ("kl", *RATIO_MEANS, *RUNNING_MEANS)
OLD = "old_"


def kto(
    graphdef: Any,
    *,
    loss: Callable = kahneman_tversky,
    ref_graphdef: Any = None,
    implementation: str | None = None,
) -> Algorithm:
    """Minimise the mean over responses of `loss`.

    Args:
      graphdef: the policy's structure.
      loss: one value per response; its parameters name what it is given (`losses/contract.py`: UNPAIRED_INPUTS).
      ref_graphdef: the structure of the frozen model; `frozen` holds its parameters.
      implementation: of the log-probabilities.

    Batches are `UnpairedBatch`es. Logs, in TRL's names, `kl` (the estimate, before it is clamped at 0), and over the
    desirable (chosen) and undesirable (rejected) responses `rewards/chosen`, `rewards/rejected`, `logps/chosen`,
    `logps/rejected`.

    Raises:
      Mistake: the loss names an unknown input.
    """
    names = contract.check_inputs(loss, contract.UNPAIRED_INPUTS)
    needs_ref = contract.needs_reference(loss)
    needs_kl = "kl" in names
    needs_means = any(name in (*RATIO_MEANS, *RUNNING_MEANS) for name in names)
    beta, momenta = contract.keyword(loss, "beta", 1.0), contract.momenta(loss)

    def logps(structure: Any, params: PyTree, batch: ResponseBatch) -> dict[str, jax.Array]:
        return response_logps(nnx.merge(structure, params), batch, implementation=implementation)

    def with_ref(frozen: PyTree, batch: ResponseBatch) -> ResponseBatch:
        if not needs_ref or REF + LOGPS in batch.columns:
            return batch
        return with_columns(batch, REF, logps(ref_graphdef, frozen, batch))

    def prepare(params: PyTree, frozen: PyTree, batch: UnpairedBatch) -> UnpairedBatch:
        rated, mismatched = with_ref(frozen, batch.rated), batch.mismatched
        if needs_kl:
            mismatched = with_columns(with_ref(frozen, mismatched), OLD, logps(graphdef, params, mismatched))
        if needs_means:
            rated = with_columns(rated, OLD, logps(graphdef, params, rated))
        return UnpairedBatch(rated, mismatched)

    def remember(carry: memory.Carry, batch: UnpairedBatch) -> tuple[memory.Carry, UnpairedBatch]:
        if not momenta:
            return carry, batch
        carry = memory.advance(carry, _means_by_label(batch.rated), momenta)
        return carry, _everywhere(carry, batch)

    def across(batch: UnpairedBatch) -> UnpairedBatch:
        found = _means_by_label(batch.rated) if needs_means else {}
        if needs_kl:
            found["kl"] = Average.of(_log_ratio(batch.mismatched), batch.mismatched.valid)
        return _everywhere(found, batch)

    def response_loss(params: PyTree, batch: UnpairedBatch) -> tuple[Average, dict[str, Average]]:
        rated = batch.rated
        policy = logps(graphdef, params, rated)[LOGPS][..., 0]
        values = {"policy_logps": policy, "labels": rated.columns["label"]}
        values |= {f"ref_{name}": column[..., 0] for name, column in columns_of(rated, REF).items()}
        metrics = _metrics(values, rated, beta)
        values = {name: value.reshape(-1) for name, value in values.items()}
        # a scalar travels as a column so that a microbatch has it; every entry is the same
        values |= {name: rated.columns[name][0, 0] for name in SCALARS if name in rated.columns}
        if "kl" in values:
            metrics["kl"] = Average.of(rated.columns["kl"], rated.valid)
        values = contract.checked(loss, values, (rated.valid.size,)).reshape(rated.valid.shape)
        return Average.of(values, rated.valid), metrics

    carry = memory.start(momenta) if momenta else ()
    return Algorithm(loss=response_loss, prepare=prepare, across=across, carry=carry, remember=remember)


def _means_by_label(rated: ResponseBatch) -> dict[str, Average]:
    label, ratio = rated.columns["label"], _log_ratio(rated)
    return {
        name: Average.of(ratio, rated.valid & which) for name, which in zip(RATIO_MEANS, (label, ~label), strict=True)
    }


def _everywhere(averages: dict[str, Average], batch: UnpairedBatch) -> UnpairedBatch:
    """The batch with each average's value in every entry of a column of its rated responses."""
    columns = {name: jnp.broadcast_to(a.compute(), batch.rated.valid.shape) for name, a in averages.items()}
    return dataclasses.replace(batch, rated=with_columns(batch.rated, "", columns))


def _log_ratio(batch: ResponseBatch) -> jax.Array:
    return (batch.columns[OLD + LOGPS] - batch.columns[REF + LOGPS])[..., 0]


def _metrics(values: dict[str, jax.Array], rated: ResponseBatch, beta: float) -> dict[str, Average]:
    rewards = beta * (values["policy_logps"] - values.get("ref_logps", 0.0))
    found: dict[str, Average] = {}
    for name, which in (("chosen", values["labels"]), ("rejected", ~values["labels"])):
        found[f"rewards/{name}"] = Average.of(rewards, rated.valid & which)
        found[f"logps/{name}"] = Average.of(values["policy_logps"], rated.valid & which)
    return found
