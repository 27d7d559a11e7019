"""Losses on pairs of each response's own reward, which determine where both go and not only how far apart.

The reward is r = β log π/π_ref, of the chosen response r_w and of the rejected r_l. DPO's loss also falls when both
rewards fall, if the rejected one falls faster.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from jaxalign.losses.contract import Coefficient, Momentum, PerPair, Positive, Smoothing
from jaxalign.losses.ranking import bradley_terry


def nca_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
) -> PerPair:
    """Noise-contrastive alignment of a pair: the chosen response is data, both are noise.

    -log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l)

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: scale of the reward; the paper's α.

    Returns:
      One loss per pair; 2 log 2 wherever policy and reference agree. Its best r_w is log 2, not infinity.

    Reference: Chen et al. 2024, https://arxiv.org/abs/2402.05369, the NCA loss for two responses and a hard label.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    running_log_ratio: Float[Array, ""],
    *,
    beta: Positive = 0.1,
    momentum: Momentum = None,
) -> PerPair:
    """A binary classifier of chosen against rejected, whose logit is the reward less its mean.

    -log σ(r_w - δ) - log σ(δ - r_l),  δ = β · running mean of log π/π_ref

    Args:
      policy_chosen_logps: log-probabilities as in `dpo`.
      running_log_ratio: over chosen and rejected responses of all batches so far, in nats; without gradient.
      beta: scale of the reward.
      momentum: of running_log_ratio: None weighs all batches alike, as TRL does; 0 is the batch alone.

    Returns:
      One loss per pair; 2 log 2 wherever policy and reference agree and δ = 0.

    Reference: Jung et al. 2024, https://arxiv.org/abs/2404.04656 (reward shift); its density ratio for
    prompts of different origin is not here.
    """
    shift = beta * jax.lax.stop_gradient(running_log_ratio)
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)


def sppo_hard(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 1e-3,
) -> PerPair:
    """Self-play: the log-ratio of the winner is drawn to 1/(2β), of the loser to -1/(2β).

    (log π/π_ref(chosen) - 1/(2β))² + (log π/π_ref(rejected) + 1/(2β))²

    Args:
      policy_chosen_logps: inputs as in `dpo`; the reference is the policy of the last iteration.
      beta: 1/η of the paper, whose η is 1,000 by default here. The winner's probability is taken to be 1 ("hard").

    Returns:
      One loss per pair; 1/(2β²) wherever policy and reference agree.

    Reference: Wu et al. 2024, https://arxiv.org/abs/2405.00675, the squared loss with P(y ≻ π) of 1 and 0.
    """
    goal = 1 / (2 * beta)
    return (policy_chosen_logps - ref_chosen_logps - goal) ** 2 + (
        policy_rejected_logps - ref_rejected_logps + goal
    ) ** 2


def apo_zero(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
) -> PerPair:
    """Up with the chosen response, down with the rejected one: -σ(r_w) + σ(r_l).

    For chosen responses that are better than what the policy writes.

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: scale of the reward.

    Returns:
      One loss per pair in (-1, 1); 0 wherever policy and reference agree. TRL adds 1; gradients are the same.

    Reference: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, APO-zero.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return jax.nn.sigmoid(rejected) - jax.nn.sigmoid(chosen)


def apo_down(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
) -> PerPair:
    """Down with both, the rejected response further: σ(r_w) - σ(r_w - r_l).

    For chosen responses that are worse than what the policy writes. Where the two agree, chosen is not moved at all.

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: scale of the reward.

    Returns:
      One loss per pair in (-1, 1); 0 wherever policy and reference agree. TRL adds 1; gradients are the same.

    Reference: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, APO-down.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return jax.nn.sigmoid(chosen) - jax.nn.sigmoid(chosen - rejected)


def dpop(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.3,
    penalty_coef: Coefficient = 50.0,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """DPO-positive: DPO with a penalty while the chosen response is less likely than under the reference.

    -log σ(β [h - λ max(0, -log π/π_ref(chosen))])

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: scale of the implicit reward.
      penalty_coef: λ; it stands inside β, as in the paper. With 0 it is `dpo`.
      label_smoothing: as in `dpo`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree, and that of `dpo` wherever chosen has risen.

    Reference: Pal et al. 2024, https://arxiv.org/abs/2402.13228.
    """
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    penalised = chosen - penalty_coef * jax.nn.relu(-chosen)
    return bradley_terry(beta * penalised, beta * rejected, label_smoothing=label_smoothing)
