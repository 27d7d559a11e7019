"""Policy gradients without a critic: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE++, each a choice of parts.

Advantages come with the batch (`ops/advantages.py`); this module makes an update of them. In the papers' names:

    GRPO         ppo_clip, aggregate="sequence", kl_coef > 0 with k3; advantages of the group, divided by its std
    Dr. GRPO     ppo_clip, aggregate="fixed"; advantages of the group, not divided
    DAPO         ppo_clip(clip_epsilon_high=0.28), aggregate="token"
    GSPO         ppo_clip(clip_epsilon=3e-4, clip_epsilon_high=4e-4), level="sequence", aggregate="sequence"
    CISPO        cispo, aggregate="token"
    RLOO         reinforce; leave-one-out advantages
    REINFORCE++  ppo_clip; advantages="global": scores less the batch's mean, divided by the batch's std
                 with baseline: ppo_clip, advantages="batch": scores less the group's mean, divided by the batch's std
                 of these differences; kl_coef > 0 with k2

Tokens that were drawn from another distribution than the policy's (a nucleus; an engine of other numerics) are weighted
by the ratio of the two, at most a cap: truncated importance sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.columns import with_columns
from jaxalign.config import limits
from jaxalign.config.on_policy import GRPOAlgorithm
from jaxalign.losses import contract
from jaxalign.losses.policy import sequence_logps, truncated_weights
from jaxalign.mistake import Mistake
from jaxalign.models.reading import token_logps
from jaxalign.ops.kl import KL_ESTIMATORS, k1, k3
from jaxalign.types import Average, PyTree, RolloutBatch

OLD_LOGPS, REF_LOGPS, ADVANTAGES, WEIGHTS = "old_logps", "ref_logps", "advantages", "weights"  # columns [B T]
SCORES, ENDED = "scores", "ended"  # columns [B]


def policy_gradient(
    config: GRPOAlgorithm,
    policy: Any,
    reference: Any = None,
    *,
    loss: Callable,
    longest: int | None = None,
    temperature: float = 1.0,
    corrected: bool = False,
    implementation: str | None = None,
) -> Algorithm:
    """Minimise the aggregate over response tokens of w · [loss(logps, old_logps, advantages) + kl_coef · KL estimate].

    w = 1, unless `corrected` says that the tokens were drawn from some q that is not the policy. Then the policy reads
    them before the first update, ratios are to its log-probabilities, and w = min(π_old(t)/q(t), importance_cap), with
    log q the batch's old_logps. For a nucleus that holds the mass Z, w = Z for every token that can be drawn, so the
    cap is for engines whose numerics differ. Importance weights cannot recover tokens outside the nucleus: they are
    never sampled, so they contribute no gradient terms and no baseline, and their π moves only through the softmax's
    normaliser.

    Reference: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl, truncated importance sampling.

    Args:
      config: its `advantages` are the caller's to compute; `reference` is whether there is one.
      policy: graphdef of the model that is trained.
      reference: graphdef of the frozen reference, whose KL is logged and, with `kl_coef`, a part of the loss.
      loss: one value per token; its parameters name its inputs (`losses/contract.py`: POLICY_INPUTS).
      longest: number of tokens of the longest possible response, for the aggregate 'fixed'.
      temperature: of sampling. Ratios are of tempered policies, so the first is 1.
      corrected: the tokens were not drawn from the policy itself.
      implementation: an implementation of `ops/logprobs.py`; None is its default.

    Batches are `RolloutBatch`es with the columns old_logps, advantages [B T], scores [B] and ended [B]. Logs: `ratio`
    (1 in the first update, or sampling and scoring disagree), `ratio_deviation` (the mean of |ratio - 1|) and
    `clip_fraction` (ratios beyond 1 ± 0.2), `approx_kl` (k3 of the old policy), `entropy` (-log π of the drawn tokens:
    an estimate of it), `score`, `length`, `ended`, and with a reference `kl` of the policy that drew, summed over a
    response, and its never negative estimate `kl_k3`. If corrected, `importance_weight`, the mean of w; entropy and KL
    are then of the tokens as q drew them.

    Raises:
      Mistake: a setting outside its limits, or a reference or length that is needed is missing.
    """
    contract.check_inputs(loss, contract.POLICY_INPUTS)
    check(dataclasses.replace(config, reference=reference is not None), loss)
    if config.aggregate == "fixed" and not longest:
        raise Mistake(
            "`algorithm.aggregate` 'fixed' divides by the length of the longest possible response: give longest="
        )

    def logps_of(graphdef: nnx.GraphDef, params: PyTree, batch: RolloutBatch) -> jax.Array:
        return token_logps(graphdef, params, batch.sequences, temperature=temperature, implementation=implementation)

    def prepare(params: PyTree, frozen: PyTree, batch: RolloutBatch) -> RolloutBatch:
        columns = {}
        if reference is not None:
            columns[REF_LOGPS] = jax.lax.stop_gradient(logps_of(reference, frozen, batch))
        if corrected:
            own = jax.lax.stop_gradient(logps_of(policy, params, batch))
            weights = truncated_weights(own, batch.columns[OLD_LOGPS], config.importance_cap)
            columns |= {OLD_LOGPS: own, WEIGHTS: weights}
        return with_columns(batch, columns)

    def token_loss(params: PyTree, batch: RolloutBatch) -> tuple[Average, dict[str, Average]]:
        logps, mask, old = logps_of(policy, params, batch), batch.sequences.mask, batch.columns[OLD_LOGPS]
        ratio_logps = sequence_logps(logps, old, mask) if config.level == "sequence" else logps
        values = contract.checked(loss, policy_inputs(ratio_logps, batch), mask.shape)
        if config.kl_coef:
            values = values + config.kl_coef * KL_ESTIMATORS[config.kl_estimator](logps - batch.columns[REF_LOGPS])
        if WEIGHTS in batch.columns:
            values = values * batch.columns[WEIGHTS]
        metrics = rollout_metrics(jax.lax.stop_gradient(logps), batch)
        return _aggregated(values, mask, config.aggregate, longest), metrics

    return Algorithm(loss=token_loss, prepare=prepare, epochs=config.epochs, minibatches=config.minibatches)


def check(config: GRPOAlgorithm, loss: Callable) -> None:
    """Raises Mistake on a setting outside its limits, and where a reference is needed and off."""
    limits.check(config, prefix="algorithm.")
    if config.reference:
        return
    if config.kl_coef:
        raise Mistake(f"`algorithm.kl_coef` {config.kl_coef} needs the reference; leave `algorithm.reference` on")
    if contract.needs_reference(loss):
        raise Mistake(
            f"`algorithm.loss` {contract.loss_name(loss)} needs the reference; leave `algorithm.reference` on"
        )


def policy_inputs(logps: jax.Array, batch: RolloutBatch) -> dict[str, jax.Array]:
    """The inputs of a loss by the names of POLICY_INPUTS [B T]; `ref_logps` only where there is a reference."""
    columns = {name: batch.columns[name] for name in (OLD_LOGPS, ADVANTAGES, REF_LOGPS) if name in batch.columns}
    return {"logps": logps, "mask": batch.sequences.mask, **columns}


def rollout_metrics(logps: jax.Array, batch: RolloutBatch) -> dict[str, Average]:
    """The metrics of `policy_gradient`, from the present log π [B T]; `kl` is that of the policy that drew."""
    mask, present = batch.sequences.mask, jnp.any(batch.sequences.mask, axis=1)
    change = jnp.where(mask, logps - batch.columns[OLD_LOGPS], 0.0)
    ratio = jnp.exp(change)

    def per_response(values: jax.Array) -> Average:
        return Average.of(jnp.sum(jnp.where(mask, values, 0.0), axis=1), present)

    metrics = {
        "ratio": Average.of(ratio, mask),
        "ratio_deviation": Average.of(jnp.abs(ratio - 1), mask),
        "clip_fraction": Average.of(jnp.abs(ratio - 1) > 0.2, mask),
        "approx_kl": Average.of(k3(-change), mask),
        "entropy": Average.of(-logps, mask),
        "length": per_response(jnp.ones_like(logps)),
        "score": Average.of(batch.columns[SCORES], present),
        "ended": Average.of(batch.columns[ENDED], present),
    }
    if WEIGHTS in batch.columns:
        metrics["importance_weight"] = Average.of(batch.columns[WEIGHTS], mask)
    if REF_LOGPS in batch.columns:
        kl = log_ratio(batch)
        metrics |= {"kl": per_response(k1(kl)), "kl_k3": per_response(k3(kl))}
    return metrics


def log_ratio(batch: RolloutBatch) -> jax.Array:
    """log π_old - log π_ref of response tokens [B T], 0 elsewhere: how far the policy that drew them had moved."""
    return jnp.where(batch.sequences.mask, batch.columns[OLD_LOGPS] - batch.columns[REF_LOGPS], 0.0)


def _aggregated(values: jax.Array, mask: jax.Array, aggregate: str, longest: int | None) -> Average:
    if aggregate == "token":
        return Average.of(values, mask)
    lengths = jnp.sum(mask, axis=1)
    sums, present = jnp.sum(jnp.where(mask, values, 0.0), axis=1), lengths > 0
    return Average.of(sums / (longest if aggregate == "fixed" else jnp.maximum(lengths, 1)), present)
