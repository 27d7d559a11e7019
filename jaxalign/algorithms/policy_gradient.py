"""Policy gradients without a critic: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE++, by what is combined.

Advantages come with the batch (`ops/advantages.py`); here is what one update makes of them. In the papers' names:

    GRPO         ppo_clip, aggregate="sequence", kl_coef > 0 with k3; advantages of the group, divided by its std
    Dr. GRPO     ppo_clip, aggregate="fixed"; advantages of the group, not divided
    DAPO         ppo_clip(clip_epsilon_high=0.28), aggregate="token"
    GSPO         ppo_clip(clip_epsilon=3e-4, clip_epsilon_high=4e-4), level="sequence", aggregate="sequence"
    CISPO        cispo, aggregate="token"
    RLOO         reinforce; leave-one-out advantages
    REINFORCE++  ppo_clip; advantages of the group, divided by the std of the batch

Tokens that were drawn from another distribution than the policy's (a nucleus; an engine of other numerics) are weighted
by the ratio of the two, cut at a cap: truncated importance sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithms.base import Algorithm
from jaxalign.losses import contract
from jaxalign.losses.policy import ppo_clip, sequence_logps, truncated_weights
from jaxalign.mistake import Mistake
from jaxalign.models.reading import token_logps
from jaxalign.ops.kl import KL_ESTIMATORS, k1, k3
from jaxalign.types import Average, PyTree, RolloutBatch

OLD, REF, ADVANTAGES, SCORES, ENDED = "old_logps", "ref_logps", "advantages", "scores", "ended"
WEIGHTS = "weights"
AGGREGATES, LEVELS = ("token", "sequence", "fixed"), ("token", "sequence")


def policy_gradient(
    graphdef: Any,
    *,
    loss: Callable = ppo_clip,
    ref_graphdef: Any = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    level: str = "token",
    aggregate: str = "token",
    longest: int | None = None,
    temperature: float = 1.0,
    importance_cap: float | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    implementation: str | None = None,
) -> Algorithm:
    """Minimise the aggregate over response tokens of w · [loss(logps, old_logps, advantages) + kl_coef · KL estimate].

    w = 1, unless `importance_cap` says that the tokens were drawn from some q that is not the policy. Then the policy
    reads them before the first update, that is what ratios are to, and w = min(π_old(t)/q(t), cap), with q the batch's
    old_logps. Of the softmax over a nucleus that holds the mass Z, w = Z for every token that can be drawn, so the cap
    is for engines whose numerics differ. What no weight mends is the support: the terms of tokens outside the nucleus
    are missing, their π moves through the softmax's normaliser alone, and of a group's baseline they are no part.

    Reference: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl, truncated importance sampling.

    Args:
      graphdef: the policy's structure.
      loss: one value per token, of `losses/policy.py` or your own.
      ref_graphdef: of the frozen reference, whose KL is logged and, with kl_coef, paid; None: there is none.
      kl_coef: weight of the KL in the loss, per nat.
      kl_estimator: k1, k2 or k3 of `ops/kl.py`. As a loss k1 does nothing on average; see there.
      level: ratios of each token, or one of the whole sequence (GSPO).
      aggregate: "token", Σ over tokens / tokens of the batch; "sequence", the mean over responses of their token means
        (GRPO); "fixed", Σ over tokens / (responses · longest), so that length has no say (Dr. GRPO).
      longest: tokens of the longest possible response, for "fixed".
      temperature: that the tokens were drawn at: ratios are of tempered policies, so the first is 1.
      importance_cap: C, the most that a token may weigh; None: old_logps are the policy's own, no token is weighted.
      epochs: passes over a batch.
      minibatches: optimizer updates in each pass.
      implementation: of the log-probabilities.

    Batches are `RolloutBatch`es with the columns old_logps, advantages [B T], scores [B] and ended [B]. Logs: `ratio`
    (1 in the first update, or sampling and scoring disagree), `ratio_deviation` (the mean of |ratio - 1|) and
    `clip_fraction` (ratios beyond 1 ± 0.2), `approx_kl` (k3 of the old policy), `entropy` (-log π of the drawn tokens:
    an estimate of it), `score`, `length`, `ended`, and with a reference `kl` of the policy that drew, summed over a
    response, and its never negative estimate `kl_k3`. With a cap `importance_weight`, the mean of w; entropy and KL are
    then of the tokens as q drew them.

    Raises:
      Mistake: an unknown estimator, level or aggregate, or what they need is missing.
    """
    contract.check_inputs(loss, contract.POLICY_INPUTS)
    _check(kl_coef, kl_estimator, level, aggregate, longest, ref_graphdef, importance_cap)
    has_reference = ref_graphdef is not None

    def logps_of(structure: Any, params: PyTree, batch: RolloutBatch) -> jax.Array:
        return token_logps(structure, params, batch.sequences, temperature=temperature, implementation=implementation)

    def prepare(params: PyTree, frozen: PyTree, batch: RolloutBatch) -> RolloutBatch:
        found = {}
        if has_reference:
            found[REF] = jax.lax.stop_gradient(logps_of(ref_graphdef, frozen, batch))
        if importance_cap is not None:
            own = jax.lax.stop_gradient(logps_of(graphdef, params, batch))
            found |= {OLD: own, WEIGHTS: truncated_weights(own, batch.columns[OLD], importance_cap)}
        return dataclasses.replace(batch, columns={**batch.columns, **found})

    def token_loss(params: PyTree, batch: RolloutBatch) -> tuple[Average, dict[str, Average]]:
        logps, mask, old = logps_of(graphdef, params, batch), batch.sequences.mask, batch.columns[OLD]
        judged = sequence_logps(logps, old, mask) if level == "sequence" else logps
        values = contract.checked(loss, policy_inputs(judged, batch), mask.shape)
        if kl_coef:
            values = values + kl_coef * KL_ESTIMATORS[kl_estimator](logps - batch.columns[REF])
        if WEIGHTS in batch.columns:
            values = values * batch.columns[WEIGHTS]
        return _aggregated(values, mask, aggregate, longest), rollout_metrics(jax.lax.stop_gradient(logps), batch)

    return Algorithm(loss=token_loss, prepare=prepare, epochs=epochs, minibatches=minibatches)


def policy_inputs(logps: jax.Array, batch: RolloutBatch) -> dict[str, jax.Array]:
    """The inputs of a loss by the names of POLICY_INPUTS [B T]; `ref_logps` only where there is a reference."""
    columns = {name: batch.columns[name] for name in (OLD, ADVANTAGES, REF) if name in batch.columns}
    return {"logps": logps, "mask": batch.sequences.mask, **columns}


def _check(
    kl_coef: float,
    kl_estimator: str,
    level: str,
    aggregate: str,
    longest: int | None,
    ref_graphdef: Any,
    importance_cap: float | None,
) -> None:
    for name, value, known in (
        ("kl_estimator", kl_estimator, tuple(KL_ESTIMATORS)),
        ("level", level, LEVELS),
        ("aggregate", aggregate, AGGREGATES),
    ):
        if value not in known:
            raise Mistake(f"{name}={value!r} is not one of {', '.join(known)}")
    if kl_coef < 0:
        raise Mistake(f"kl_coef={kl_coef} must be at least 0")
    if kl_coef and ref_graphdef is None:
        raise Mistake(f"kl_coef={kl_coef} needs a reference")
    if aggregate == "fixed" and not longest:
        raise Mistake("aggregate='fixed' divides by the longest response there can be; say how long it is")
    if importance_cap is not None and importance_cap <= 0:
        raise Mistake(f"importance_cap={importance_cap} must be above 0, or no token has a say")


def _aggregated(values: jax.Array, mask: jax.Array, aggregate: str, longest: int | None) -> Average:
    if aggregate == "token":
        return Average.of(values, mask)
    lengths = jnp.sum(mask, axis=1)
    sums, here = jnp.sum(jnp.where(mask, values, 0.0), axis=1), lengths > 0
    return Average.of(sums / (longest if aggregate == "fixed" else jnp.maximum(lengths, 1)), here)


def rollout_metrics(logps: jax.Array, batch: RolloutBatch) -> dict[str, Average]:
    """What `policy_gradient` says it logs, of log π [B T] as it is now; `kl` is that of the policy that drew."""
    mask, here = batch.sequences.mask, jnp.any(batch.sequences.mask, axis=1)
    change = jnp.where(mask, logps - batch.columns[OLD], 0.0)
    ratio = jnp.exp(change)
    per_response = lambda values: Average.of(jnp.sum(jnp.where(mask, values, 0.0), axis=1), here)  # noqa: E731
    found = {
        "ratio": Average.of(ratio, mask),
        "ratio_deviation": Average.of(jnp.abs(ratio - 1), mask),
        "clip_fraction": Average.of(jnp.abs(ratio - 1) > 0.2, mask),
        "approx_kl": Average.of(k3(-change), mask),
        "entropy": Average.of(-logps, mask),
        "length": per_response(jnp.ones_like(logps)),
        "score": Average.of(batch.columns[SCORES], here),
        "ended": Average.of(batch.columns[ENDED], here),
    }
    if WEIGHTS in batch.columns:
        found["importance_weight"] = Average.of(batch.columns[WEIGHTS], mask)
    if REF in batch.columns:
        log_ratio = jnp.where(mask, batch.columns[OLD] - batch.columns[REF], 0.0)
        found |= {"kl": per_response(k1(log_ratio)), "kl_k3": per_response(k3(log_ratio))}
    return found
