"""Losses of the margin h = log π/π_ref(chosen) - log π/π_ref(rejected): the policy's preference beyond the reference's.

DPO is one of them, and others are functions of the same h.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from jaxalign.config.limits import at_least, within
from jaxalign.losses.contract import PerPair, Positive, Smoothing
from jaxalign.mistake import Mistake


def dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """Logistic loss on the margin of implicit rewards (direct preference optimisation).

    -(1 - ε) log σ(β h) - ε log σ(-β h),  h = log π/π_ref(chosen) - log π/π_ref(rejected)

    Args:
      policy_chosen_logps: log π(chosen | prompt) in nats, summed over response tokens.
      policy_rejected_logps: the same for the rejected response.
      ref_chosen_logps: the same under the frozen reference.
      ref_rejected_logps: the same under the frozen reference.
      beta: scale of the implicit reward β log π/π_ref.
      label_smoothing: ε, the assumed probability that a pair is labelled the wrong way round. TRL 1.16 ignores it here.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7; with
    label smoothing, Mitchell 2023, https://ericmitchell.ai/cdpo.pdf (conservative DPO).
    """
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def robust(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, at_least(0, below=0.5)] = 0.1,
) -> PerPair:
    """DPO whose expectation over flipped labels is DPO on the true ones.

    [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2ε)

    Unlike in cDPO the second term is subtracted, and the sum rescaled: an unbiased estimate, which may be negative.

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: scale of the implicit reward.
      label_smoothing: ε < 1/2, the rate at which labels are flipped; with 0 it is `dpo`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, section 3.1.
    """
    if not 0 <= label_smoothing < 0.5:
        raise Mistake(f"label_smoothing={label_smoothing} must be in [0, 0.5): at one half labels carry no information")
    margin = beta * (policy_chosen_logps - ref_chosen_logps - policy_rejected_logps + ref_rejected_logps)
    right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    chosen_lengths: Num[Array, "B"],
    rejected_lengths: Num[Array, "B"],
    *,
    beta: Positive = 0.1,
    average: bool = True,
) -> PerPair:
    """Squared distance of the margin from a fixed goal, so that a sure preference is not driven to infinity.

    (h - 1/(2β))²

    Args:
      policy_chosen_logps: the four log-probabilities as in `dpo`, summed.
      chosen_lengths: response tokens of chosen.
      rejected_lengths: response tokens of rejected.
      beta: the paper's τ. Lower means a wider margin.
      average: h is a difference of log-ratios per token, the authors' advice to other implementers and TRL's choice.
        False: of summed ones, as the paper is usually read; the goal is then nats per response.

    Returns:
      One loss per pair; 1/(4β²) wherever policy and reference agree.

    Reference: Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17.
    """
    chosen = policy_chosen_logps - ref_chosen_logps
    rejected = policy_rejected_logps - ref_rejected_logps
    if average:
        chosen, rejected = chosen / jnp.maximum(chosen_lengths, 1), rejected / jnp.maximum(rejected_lengths, 1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
) -> PerPair:
    """Hinge on the margin, without gradient once a pair is won by 1/β nats: max(0, 1 - β h).

    SLiC's ranking loss measured against a reference; the one without is `slic`.

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: reciprocal of the margin in nats.

    Returns:
      One loss per pair; 1 wherever policy and reference agree.

    Reference: Liu et al. 2023, RSO, https://arxiv.org/abs/2309.06657 ("hinge-norm"), after Zhao et al. 2023, SLiC-HF,
    https://arxiv.org/abs/2305.10425.
    """
    margin = beta * (policy_chosen_logps - ref_chosen_logps - policy_rejected_logps + ref_rejected_logps)
    return jax.nn.relu(1 - margin)


def exo_pair(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, within(0, 1)] = 1e-3,
) -> PerPair:
    """KL divergence from the policy's preference to the smoothed label: DPO's divergence the other way round.

    p [log p - log(1 - ε)] + (1 - p) [log(1 - p) - log ε],  p = σ(β h)

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: scale of the implicit reward.
      label_smoothing: ε > 0, the label's probability of the rejected response.

    Returns:
      One loss per pair, 0 at the best p = 1 - ε; -log(2 √(ε (1 - ε))) wherever policy and reference agree.

    Reference: Ji et al. 2024, https://arxiv.org/abs/2402.00856, the EXO loss on preferences.
    """
    if not 0 < label_smoothing < 1:
        raise Mistake(
            f"label_smoothing={label_smoothing} must be in (0, 1): the divergence from a hard label is infinite"
        )
    margin = beta * (policy_chosen_logps - ref_chosen_logps - policy_rejected_logps + ref_rejected_logps)
    win, lose = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    chosen = jnp.exp(win) * (win - jnp.log1p(-label_smoothing))
    return chosen + jnp.exp(lose) * (lose - jnp.log(label_smoothing))


def discopop(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.05,
    temperature: Annotated[float, within(0, 1)] = 0.05,
) -> PerPair:
    """A loss found by a language model: logistic for lost pairs, exponential for won ones, blended by the margin.

    (1 - w) log(1 + exp(-m)) + w exp(-m),  m = β h,  w = σ(m / τ)

    Not convex: for nearly even pairs it rises with the margin, so they are drawn to a local minimum.

    Args:
      policy_chosen_logps: inputs as in `dpo`.
      beta: scale of the implicit reward.
      temperature: τ < 1, over which the blend changes.

    Returns:
      One loss per pair; (log 2 + 1)/2 wherever policy and reference agree.

    Reference: Lu et al. 2024, https://arxiv.org/abs/2406.08414, the log-ratio modulated loss (LRML).
    """
    if not 0 < temperature < 1:
        raise Mistake(f"temperature={temperature} must be in (0, 1): beyond, lost pairs cost exponentially much")
    margin = beta * (policy_chosen_logps - ref_chosen_logps - policy_rejected_logps + ref_rejected_logps)
    logistic = jax.nn.sigmoid(-margin / temperature) * -jax.nn.log_sigmoid(margin)
    # w exp(-m) in log space: its factors are 0 and infinity for a pair that is badly lost
    return logistic + jnp.exp(jax.nn.log_sigmoid(margin / temperature) - margin)
