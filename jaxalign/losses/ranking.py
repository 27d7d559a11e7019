"""Losses of reward models: one value per pair, per prompt with its ranked candidates, or per step of a solution.

Scores are a reward model's output, in its own unit; only their differences mean anything, unless they are centred.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxalign.config.limits import at_least
from jaxalign.losses.contract import OUTCOME_INPUTS, STEP_INPUTS, Coefficient, Kind, PerPair, Smoothing
from jaxalign.mistake import Mistake


def bradley_terry(
    chosen_scores: PerPair,
    rejected_scores: PerPair,
    *,
    margin: Coefficient = 0.0,
    centering_coef: Coefficient = 0.0,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """Minus the log-likelihood of the preference, under odds of exp(difference of scores).

    -(1 - ε) log σ(r_w - r_l - m) - ε log σ(r_l - r_w - m) + c (r_w + r_l)²

    Args:
      chosen_scores: r_w, the score of the preferred response.
      rejected_scores: r_l, of the other.
      margin: m, the lead that the better response must have.
      centering_coef: c; 0.01 keeps the scores' mean near 0 without moving their differences.
      label_smoothing: ε, the assumed probability that a pair is labelled the wrong way round.

    Returns:
      One loss per pair; log 2 for two scores of 0 without margin.

    Reference: Bradley and Terry 1952; for language models, Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1
    with K = 2; centring, Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, whose coefficient is 0.01.
    """
    difference = chosen_scores - rejected_scores
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(difference - margin)
    loss -= label_smoothing * jax.nn.log_sigmoid(-difference - margin)
    return loss + centering_coef * (chosen_scores + rejected_scores) ** 2


def graded_bradley_terry(
    chosen_scores: PerPair, rejected_scores: PerPair, margins: PerPair, *, centering_coef: Coefficient = 0.0
) -> PerPair:
    """Bradley-Terry with a margin for each pair, larger where the judges saw a larger difference.

    -log σ(r_w - r_l - m) + c (r_w + r_l)²

    Args:
      chosen_scores: r_w.
      rejected_scores: r_l.
      margins: m; Llama 2 takes 0, 1/3, 2/3 and 1, or 0, 1, 2 and 3, from "negligibly" to "significantly better".
      centering_coef: c.

    Reference: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, eq. 2 and table 27.
    """
    return bradley_terry(chosen_scores - margins, rejected_scores) + centering_coef * (
        (chosen_scores + rejected_scores) ** 2
    )


def soft_bradley_terry(
    chosen_scores: PerPair, rejected_scores: PerPair, preferences: PerPair, *, centering_coef: Coefficient = 0.0
) -> PerPair:
    """Cross-entropy with a probability of preference for each pair, such as a judge's.

    -p log σ(r_w - r_l) - (1 - p) log σ(r_l - r_w) + c (r_w + r_l)²

    Args:
      chosen_scores: r_w.
      rejected_scores: r_l.
      preferences: p in [0, 1]; 1 - ε everywhere is `bradley_terry` with label_smoothing ε.
      centering_coef: c.

    Returns:
      One loss per pair, least where σ(r_w - r_l) = p: there it is the entropy of p, not 0.

    Reference: Bai et al. 2022, Constitutional AI, https://arxiv.org/abs/2212.08073, section 4.1 (soft labels).
    """
    difference = chosen_scores - rejected_scores
    loss = -preferences * jax.nn.log_sigmoid(difference) - (1 - preferences) * jax.nn.log_sigmoid(-difference)
    return loss + centering_coef * (chosen_scores + rejected_scores) ** 2


def rao_kupper(
    chosen_scores: PerPair,
    rejected_scores: PerPair,
    ties: Bool[Array, "B"],
    *,
    theta: Annotated[float, at_least(1)] = 3.0,
) -> PerPair:
    """Minus the log-likelihood of a win or a tie: Bradley-Terry with a threshold below which a difference goes unseen.

    -log P(win) = -log σ(d - log θ),  -log P(tie) = -log [(θ² - 1) σ(d - log θ) σ(-d - log θ)],  d = r_w - r_l

    Args:
      chosen_scores: r_w; of either response where the pair is a tie.
      rejected_scores: r_l.
      ties: True where the two were judged equal.
      theta: θ ≥ 1. Equal scores tie with probability (θ - 1)/(θ + 1): one half for θ = 3. With 1 there are no ties, and
        a win costs what it does in Bradley-Terry.

    Returns:
      One loss per pair; for equal scores and θ = 3, log 4 for a win and log 2 for a tie.

    Reference: Rao and Kupper 1967, https://doi.org/10.1080/01621459.1967.10482901; for preferences between responses,
    Chen et al. 2024, https://arxiv.org/abs/2409.17431, whose ν is θ and also 3.
    """
    if theta < 1:
        raise Mistake(f"theta={theta} must be at least 1; 1 leaves no room for ties")
    threshold = jnp.log(theta)
    difference = chosen_scores - rejected_scores
    win = -jax.nn.log_sigmoid(difference - threshold)
    lose = -jax.nn.log_sigmoid(-difference - threshold)
    return jnp.where(ties, win + lose - jnp.log(theta**2 - 1), win)


def kwise(scores: Float[Array, "B K"], ranks: Int[Array, "B K"], candidates: Bool[Array, "B K"]) -> PerPair:
    """Bradley-Terry on all pairs of the ranked candidates of a prompt, each prompt counting once however many it has.

    -1/|pairs| Σ over (i, j) with rank_i < rank_j of log σ(r_i - r_j)

    Pairs of one prompt are correlated: as separate rows they overfit, and prompts with more candidates weigh more.

    Args:
      scores: r of up to K candidates of each prompt.
      ranks: 0 the best; of two with equal ranks neither is preferred, and they are no pair.
      candidates: False where a prompt has fewer; scores and ranks may be anything there, but not NaN.

    Returns:
      One loss per prompt, log 2 for equal scores; 0 where no pair is left, so leave such prompts out of the mean.

    Reference: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; K choose 2 there is the number of pairs.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & candidates[:, :, None] & candidates[:, None, :]
    losses = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :])
    pairs = jnp.sum(better, axis=(1, 2))
    return jnp.sum(jnp.where(better, losses, 0.0), axis=(1, 2)) / jnp.maximum(pairs, 1)


def process(step_scores: Float[Array, "*steps"], step_labels: Num[Array, "*steps"]) -> Float[Array, "*steps"]:
    """Cross-entropy of each step of a solution with whether it is right.

    -y log σ(s) - (1 - y) log σ(-s)

    Args:
      step_scores: s, the logit that the step is right.
      step_labels: y: 1 right, 0 wrong, or the share of continuations from here that end right.

    Returns:
      One loss per step; log 2 for a score of 0.

    Reference: Lightman et al. 2023, https://arxiv.org/abs/2305.20050, section 2.6 (its neutral steps count as right, or
    are left out); soft labels, Wang et al. 2023, Math-Shepherd, https://arxiv.org/abs/2312.08935, eq. 2.
    """
    return -step_labels * jax.nn.log_sigmoid(step_scores) - (1 - step_labels) * jax.nn.log_sigmoid(-step_scores)


def process_mse(step_scores: Float[Array, "*steps"], step_labels: Num[Array, "*steps"]) -> Float[Array, "*steps"]:
    """Squared error of each step's probability of being right: (σ(s) - y)², 1/4 for a score of 0 and a hard label.

    Gentler than `process` where labels are noisy: a step that is confidently wrong costs 1 at most.

    Args:
      step_scores: s, the logit that the step is right.
      step_labels: y in [0, 1].
    """
    return (jax.nn.sigmoid(step_scores) - step_labels) ** 2


OUTCOME_LOSSES = {
    "bradley_terry": bradley_terry,
    "graded_bradley_terry": graded_bradley_terry,
    "soft_bradley_terry": soft_bradley_terry,
    "rao_kupper": rao_kupper,
    "kwise": kwise,
}
STEP_LOSSES = {"process": process, "process_mse": process_mse}
RANKING_LOSSES = OUTCOME_LOSSES | STEP_LOSSES
OUTCOME = Kind(OUTCOME_LOSSES, OUTCOME_INPUTS, "B")
STEPS = Kind(STEP_LOSSES, STEP_INPUTS, "B G S")
