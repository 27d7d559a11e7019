"""DPO that does not teach verbosity: normalised by length, penalised for it, or with less weight on extra tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Num

from jaxalign.losses.contract import Coefficient, PerPair, Positive, Share, Smoothing
from jaxalign.losses.ranking import bradley_terry


def sigmoid_norm(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    chosen_lengths: Num[Array, "B"],
    rejected_lengths: Num[Array, "B"],
    *,
    beta: Positive = 5.0,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """Length-normalised DPO: each response's log-ratio is divided by its own length.

    -log σ(β [log π/π_ref(chosen) / |chosen| - log π/π_ref(rejected) / |rejected|])

    Args:
      policy_chosen_logps: log-probabilities as in `dpo`, summed.
      chosen_lengths: response tokens of chosen.
      rejected_lengths: response tokens of rejected.
      beta: per token, so far larger than DPO's; 5 is Tülu 3's.
      label_smoothing: as in `dpo`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Lambert et al. 2024, Tülu 3, https://arxiv.org/abs/2411.15124 (length-normalised DPO).
    """
    chosen = (policy_chosen_logps - ref_chosen_logps) / jnp.maximum(chosen_lengths, 1)
    rejected = (policy_rejected_logps - ref_rejected_logps) / jnp.maximum(rejected_lengths, 1)
    return bradley_terry(beta * chosen, beta * rejected, label_smoothing=label_smoothing)


def rdpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    chosen_lengths: Num[Array, "B"],
    rejected_lengths: Num[Array, "B"],
    *,
    beta: Positive = 0.1,
    alpha: Coefficient = 0.01,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """DPO for the reward r - α |response|: preferences that length explains are not learnt.

    -log σ(β h + α |chosen| - α |rejected|)

    The sign is that of the paper: a longer chosen response is partly won already, so its pair has a smaller gradient.

    Args:
      policy_chosen_logps: log-probabilities as in `dpo`, summed.
      chosen_lengths: response tokens of chosen.
      rejected_lengths: response tokens of rejected.
      beta: scale of the implicit reward.
      alpha: price of a token, in units of the reward; with 0 it is `dpo`.
      label_smoothing: as in `dpo`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree on two responses of one length.

    Reference: Park et al. 2024, https://arxiv.org/abs/2403.19159.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps) + alpha * chosen_lengths
    rejected = beta * (policy_rejected_logps - ref_rejected_logps) + alpha * rejected_lengths
    return bradley_terry(chosen, rejected, label_smoothing=label_smoothing)


def ld_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    policy_chosen_public_logps: PerPair,
    policy_rejected_public_logps: PerPair,
    ref_chosen_public_logps: PerPair,
    ref_rejected_public_logps: PerPair,
    *,
    beta: Positive = 0.1,
    alpha: Share = 0.5,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """Length-desensitised DPO: tokens beyond the shorter response's length count α.

    DPO on log π̂ = log π(first n tokens) + α log π(the rest),  n = min(|chosen|, |rejected|)

    Args:
      policy_chosen_logps: log-probabilities as in `dpo`, summed over the whole response.
      policy_chosen_public_logps: summed over its first n tokens only, and so on for the other three.
      beta: scale of the implicit reward.
      alpha: weight of the rest, from 0 to 1; with 1 it is `dpo`. The paper's best depend on the model.
      label_smoothing: as in `dpo`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Liu et al. 2024, https://arxiv.org/abs/2409.06411. The reference is treated as the policy is;
    to leave it whole, as some versions of TRL do, pass its whole log-probabilities as its public ones.
    """
    policy_chosen = desensitised(policy_chosen_logps, policy_chosen_public_logps, alpha=alpha)
    policy_rejected = desensitised(policy_rejected_logps, policy_rejected_public_logps, alpha=alpha)
    ref_chosen = desensitised(ref_chosen_logps, ref_chosen_public_logps, alpha=alpha)
    ref_rejected = desensitised(ref_rejected_logps, ref_rejected_public_logps, alpha=alpha)
    return bradley_terry(
        beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected), label_smoothing=label_smoothing
    )


def desensitised(logps: PerPair, public_logps: PerPair, *, alpha: float) -> PerPair:
    """log π(public part) + α log π(the rest), from log π of the whole and of the public part."""
    return public_logps + alpha * (logps - public_logps)
