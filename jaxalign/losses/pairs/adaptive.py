"""DPO whose strength follows the data: a β for each batch, or a weight for each pair."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxalign.config.limits import above
from jaxalign.losses.contract import Coefficient, Momentum, PerPair, Positive, Smoothing
from jaxalign.losses.ranking import bradley_terry


def beta_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    mean_margin: Float[Array, ""],
    running_margin: Float[Array, ""] | float = 0.0,
    *,
    beta: Positive = 0.1,
    alpha: Coefficient = 0.6,
    min_beta: Positive = 1e-3,
    label_smoothing: Smoothing = 0.0,
    momentum: Momentum = 0.9,
) -> PerPair:
    """DPO with a β for each batch: larger, so more careful, where the pairs are already far apart.

    DPO with β_batch = [1 + α (M - M₀)] β,  M = β mean h of the batch,  M₀ = its moving average

    Args:
      policy_chosen_logps: log-probabilities as in `dpo`.
      mean_margin: mean of h over the global batch, in nats (M = β mean_margin); no gradient flows through it.
      running_margin: M₀/β, the moving average of mean_margin; no gradient either.
      beta: β₀, of a batch with M = M₀.
      alpha: how strongly β follows; with 0 it is `dpo`.
      min_beta: lower bound of β_batch, which the formula alone could make negative.
      label_smoothing: as in `dpo`.
      momentum: m of M₀ ← m M₀ + (1 - m) M. M₀ starts at 0, where the policy does, and a batch moves it before it is
        compared with it, as in the authors' code.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Wu et al. 2024, https://arxiv.org/abs/2407.08639. Its second half, a filter that draws 80%
    of a batch around M₀, chooses rows and is not part of a loss. The authors' code takes M in nats, without β: its α
    is β times this one.
    """
    excess = beta * jax.lax.stop_gradient(mean_margin - running_margin)
    batch_beta = jnp.maximum((1 + alpha * excess) * beta, min_beta)
    chosen = batch_beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = batch_beta * (policy_rejected_logps - ref_rejected_logps)
    return bradley_terry(chosen, rejected, label_smoothing=label_smoothing)


def wpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    chosen_lengths: Num[Array, "B"],
    rejected_lengths: Num[Array, "B"],
    policy_chosen_collision_logps: PerPair,
    policy_rejected_collision_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
    max_weight: Annotated[float | None, above(0)] = None,
) -> PerPair:
    """DPO in which a pair is weighted by how likely the policy itself is to write it ("sampled alignment").

    w(chosen) w(rejected) · DPO,  w as in `wpo_weights`, without gradient

    Args:
      policy_chosen_logps: log-probabilities as in `dpo`, summed.
      chosen_lengths: response tokens of chosen.
      rejected_lengths: response tokens of rejected.
      policy_chosen_collision_logps: Σ_t log Σ_v π(v)² over chosen's tokens.
      policy_rejected_collision_logps: the same of rejected.
      beta: scale of the implicit reward.
      label_smoothing: as in `dpo`.
      max_weight: cap of w(chosen) w(rejected); TRL's is 1, the paper's formula has none.

    Returns:
      One loss per pair; log 2 where policy and reference agree and the policy is uniform over some tokens.

    Reference: Zhou et al. 2024, https://arxiv.org/abs/2406.11827.
    """
    weights = wpo_weights(policy_chosen_logps, chosen_lengths, policy_chosen_collision_logps)
    weights *= wpo_weights(policy_rejected_logps, rejected_lengths, policy_rejected_collision_logps)
    weights = weights if max_weight is None else jnp.minimum(weights, max_weight)
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return weights * bradley_terry(chosen, rejected, label_smoothing=label_smoothing)


def wpo_unaligned(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    chosen_lengths: Num[Array, "B"],
    rejected_lengths: Num[Array, "B"],
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """WPO's first form, weighted by the probability per token alone: it needs log-probabilities and lengths only.

    π(chosen)^(1/|chosen|) π(rejected)^(1/|rejected|) · DPO, the weight without gradient

    Even the policy's own samples weigh less than 1, and less the higher its entropy; `wpo` corrects that.

    Args:
      policy_chosen_logps: log-probabilities as in `dpo`, summed.
      chosen_lengths: response tokens of chosen.
      rejected_lengths: response tokens of rejected.
      beta: scale of the implicit reward.
      label_smoothing: as in `dpo`.

    Reference: Zhou et al. 2024, https://arxiv.org/abs/2406.11827.
    """
    nothing = jnp.zeros_like(policy_chosen_logps)
    return wpo(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths,
        rejected_lengths,
        nothing,
        nothing,
        beta=beta,
        label_smoothing=label_smoothing,
    )


def wpo_weights(
    policy_logps: PerPair, lengths: Num[Array, "B"], policy_collision_logps: PerPair | None = None
) -> PerPair:
    """Probability of a response per token, relative to that of the policy's own samples; no gradient.

    exp(1/|y| Σ_t [log π(y_t) - log Σ_v π(v)²])

    Args:
      policy_logps: Σ_t log π(y_t).
      lengths: |y|.
      policy_collision_logps: Σ_t log Σ_v π(v)²; None leaves the term out.

    Returns:
      One weight per response, to multiply a loss with; 1 where the policy is uniform over some tokens, y_t among them.

    Reference: Zhou et al. 2024, https://arxiv.org/abs/2406.11827 (sampled alignment).
    """
    relative = policy_logps if policy_collision_logps is None else policy_logps - policy_collision_logps
    return jax.lax.stop_gradient(jnp.exp(relative / jnp.maximum(lengths, 1)))
