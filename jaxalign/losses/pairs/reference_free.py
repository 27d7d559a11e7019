"""Losses on pairs that need no reference model: half the memory and half the forward passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxalign.losses.contract import Coefficient, PerPair, Positive, Smoothing
from jaxalign.losses.ranking import bradley_terry


def sft(policy_chosen_logps: PerPair, mean_chosen_length: Float[Array, ""]) -> PerPair:
    """Cross-entropy of the chosen response, whose mean over pairs is the mean over all tokens of the global batch.

    -log π(chosen) / (mean of |chosen|)

    A long response counts in proportion to its tokens, as in supervised fine-tuning and as TRL's "sft"; for each
    response counting once, as in the papers that add it to DPO, see `sft_norm`.

    Args:
      policy_chosen_logps: log π(chosen | prompt) in nats, summed over response tokens.
      mean_chosen_length: response tokens of chosen, averaged over the global batch.

    Returns:
      One loss per pair; log V for each response of the mean length under a uniform policy.
    """
    return -policy_chosen_logps / jax.lax.stop_gradient(jnp.maximum(mean_chosen_length, 1))


def sft_norm(policy_chosen_logps: PerPair, chosen_lengths: Num[Array, "B"]) -> PerPair:
    """Cross-entropy of the chosen response per token of its own: -log π(chosen) / |chosen|.

    Args:
      policy_chosen_logps: log π(chosen | prompt) in nats, summed over response tokens.
      chosen_lengths: response tokens of chosen.

    Returns:
      One loss per pair; log V under a uniform policy, whatever the length.

    Reference: Pang et al. 2024, iterative reasoning preference optimisation, https://arxiv.org/abs/2404.19733.
    """
    return -policy_chosen_logps / jnp.maximum(chosen_lengths, 1)


def simpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Num[Array, "B"],
    rejected_lengths: Num[Array, "B"],
    *,
    beta: Positive = 2.0,
    gamma: Coefficient = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """Logistic loss on log-probabilities per token, with a margin to win by.

    -log σ(β log π(chosen) / |chosen| - β log π(rejected) / |rejected| - γ)

    Args:
      policy_chosen_logps: log π(chosen | prompt) in nats, summed over response tokens.
      policy_rejected_logps: the same for the rejected response.
      chosen_lengths: response tokens of chosen.
      rejected_lengths: response tokens of rejected.
      beta: scale of the reward; the paper uses 2 to 10.
      gamma: the margin in units of the reward, not divided by β as some configurations have it.
      label_smoothing: the assumed probability that a pair is labelled the wrong way round; not in the paper.

    Returns:
      One loss per pair; log(1 + exp γ) for two responses of one probability per token.

    Reference: Meng et al. 2024, https://arxiv.org/abs/2405.14734.
    """
    margin = beta * policy_chosen_logps / jnp.maximum(chosen_lengths, 1) - gamma
    margin -= beta * policy_rejected_logps / jnp.maximum(rejected_lengths, 1)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def orpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Num[Array, "B"],
    rejected_lengths: Num[Array, "B"],
    *,
    odds_coef: Positive = 0.1,
) -> PerPair:
    """Supervised fine-tuning with a preference for the odds of the chosen response.

    -log P_w - λ log σ(log [P_w / (1 - P_w)] - log [P_l / (1 - P_l)]),  log P = log π / length

    Args:
      policy_chosen_logps: log π(chosen | prompt) in nats, summed over response tokens.
      policy_rejected_logps: the same for the rejected response.
      chosen_lengths: response tokens of chosen.
      rejected_lengths: response tokens of rejected.
      odds_coef: λ, TRL's beta. P is the geometric mean of the tokens' probabilities, taken to be at most 1 - 1e-6.

    Returns:
      One loss per pair; log 2 + λ log 2 for P_w = P_l = 1/2. TRL's first term also counts the prompt's tokens.

    Reference: Hong et al. 2024, https://arxiv.org/abs/2403.07691, eq. 6, with the odds ratio loss of
    eq. 7 and the odds of eq. 4.
    """
    chosen = policy_chosen_logps / jnp.maximum(chosen_lengths, 1)
    rejected = policy_rejected_logps / jnp.maximum(rejected_lengths, 1)
    return -chosen + odds_coef * bradley_terry(_log_odds(chosen), _log_odds(rejected))


def _log_odds(logps: PerPair) -> PerPair:
    """log p - log(1 - p), from log p."""
    logps = jnp.minimum(logps, -1e-6)
    near_one = logps > -0.69
    # 1 - p is -expm1(log p), exact where p is near 1; log1p(-p) is, where p is near 0
    log_complement = jnp.where(
        near_one,
        jnp.log(-jnp.expm1(jnp.where(near_one, logps, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, logps))),
    )
    return logps - log_complement


def cpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    sft_coef: Coefficient = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """DPO with a uniform reference, plus cross-entropy of the chosen response, so that its likelihood does not fall.

    -log σ(β log π(chosen) - β log π(rejected)) - c log π(chosen)

    Args:
      policy_chosen_logps: log π(chosen | prompt) in nats, summed over response tokens.
      policy_rejected_logps: the same for the rejected response.
      beta: scale of the reward.
      sft_coef: c, 1 in the paper. The likelihood is of the whole response, as the paper has it; TRL takes its mean over
        tokens, which is "cpo(sft_coef=0.0) + 1.0*sft".
      label_smoothing: the assumed probability that a pair is labelled the wrong way round.

    Returns:
      One loss per pair; log 2 + c times the nats of either for two responses of one probability.

    Reference: Xu et al. 2024, https://arxiv.org/abs/2401.08417.
    """
    preference = bradley_terry(
        beta * policy_chosen_logps, beta * policy_rejected_logps, label_smoothing=label_smoothing
    )
    return preference - sft_coef * policy_chosen_logps


def slic(policy_chosen_logps: PerPair, policy_rejected_logps: PerPair, *, delta: Coefficient = 1.0) -> PerPair:
    """Hinge on the two log-probabilities: max(0, δ - log π(chosen) + log π(rejected)).

    The paper adds cross-entropy of a supervised target: "slic(delta=1.0) + 0.1*sft_norm" uses chosen as the target.

    Args:
      policy_chosen_logps: log π(chosen | prompt) in nats, summed over response tokens.
      policy_rejected_logps: the same for the rejected response.
      delta: the lead in nats beyond which a pair has no gradient.

    Returns:
      One loss per pair; δ for two responses of one probability.

    Reference: Zhao et al. 2023, SLiC-HF, https://arxiv.org/abs/2305.10425, its first term.
    """
    return jax.nn.relu(delta - policy_chosen_logps + policy_rejected_logps)
