"""Losses on single responses that are labelled desirable or not: no pairs needed, and the classes may be uneven.

x = log π/π_ref(response), s = +1 for a desirable response and -1 for an undesirable one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.losses.contract import UNPAIRED_INPUTS, Kind, Momentum, Positive
from jaxalign.mistake import Mistake

PerRow = Float[Array, "B"]


def kto(
    policy_logps: PerRow,
    ref_logps: PerRow,
    labels: Bool[Array, "B"],
    kl: Float[Array, ""],
    *,
    beta: Positive = 0.1,
    lambda_d: Positive = 1.0,
    lambda_u: Positive = 1.0,
) -> PerRow:
    """Kahneman-Tversky optimisation: the utility of a response beside that of responses on average.

    λ_y - v,  v = λ_y σ(s β (x - z₀)),  z₀ = max(0, KL)

    Often written without its λ_y, which leaves gradients as they are and makes losses negative; TRL keeps it, as the
    paper does.

    Args:
      policy_logps: log π(response | prompt) in nats, summed over response tokens.
      ref_logps: the same under the frozen reference.
      labels: True where the response is desirable.
      kl: estimate of KL(π‖π_ref) in nats: the mean, over the global batch, of x of each prompt with another row's
        response. It is clamped at 0 here, after the mean, and no gradient flows through it. TRL averages over each
        device's microbatch and then devices, so its z₀ changes with the microbatch.
      beta: how fast utility saturates, per nat.
      lambda_d: λ of desirable rows.
      lambda_u: λ of undesirable rows. See `balanced_lambdas`.

    Returns:
      One loss per row in (0, λ_y); λ_y/2 where x = z₀. Weights are not renormalised over the batch.

    Reference: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306.
    """
    baseline = jax.lax.stop_gradient(jnp.maximum(kl, 0))
    gain = beta * (policy_logps - ref_logps - baseline)
    return jnp.where(labels, lambda_d * jax.nn.sigmoid(-gain), lambda_u * jax.nn.sigmoid(gain))


def apo_zero_unpaired(
    policy_logps: PerRow,
    ref_logps: PerRow,
    labels: Bool[Array, "B"],
    *,
    beta: Positive = 0.1,
    lambda_d: Positive = 1.0,
    lambda_u: Positive = 1.0,
) -> PerRow:
    """KTO with z₀ = 0, which needs no mismatched pairs: λ_y [1 - σ(s β x)].

    A desirable and an undesirable row together are `apo_zero` of the pair plus 1.

    Args:
      policy_logps: log π(response | prompt) in nats, summed over response tokens.
      ref_logps: the same under the frozen reference.
      labels: True where the response is desirable.
      beta: scale of the reward.
      lambda_d: λ of desirable rows.
      lambda_u: λ of undesirable rows.

    Returns:
      One loss per row in (0, λ_y); λ_y/2 wherever policy and reference agree.

    Reference: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, APO-zero; unpaired as in TRL's KTO.
    """
    return kto(policy_logps, ref_logps, labels, jnp.zeros(()), beta=beta, lambda_d=lambda_d, lambda_u=lambda_u)


def bco(
    policy_logps: PerRow,
    ref_logps: PerRow,
    labels: Bool[Array, "B"],
    running_desirable_log_ratio: Float[Array, ""],
    running_undesirable_log_ratio: Float[Array, ""],
    *,
    beta: Positive = 0.1,
    lambda_d: Positive = 1.0,
    lambda_u: Positive = 1.0,
    momentum: Momentum = None,
) -> PerRow:
    """A binary classifier of desirable against undesirable, whose logit is the reward less the middle of both classes.

    -λ_y log σ(s (β x - δ)),  δ = β/2 (mean x of desirable rows + mean x of undesirable rows)

    Args:
      policy_logps: log π(response | prompt) in nats, summed over response tokens.
      ref_logps: the same under the frozen reference.
      labels: True where the response is desirable.
      running_desirable_log_ratio: mean x of the class in nats, over all batches so far; no gradient flows through it.
      running_undesirable_log_ratio: the same of the other class. TRL has one running mean over all rows, so there the
        larger class draws δ to itself; that mean, passed for both, reproduces TRL.
      beta: scale of the reward.
      lambda_d: weight of desirable rows.
      lambda_u: weight of undesirable rows.
      momentum: of both running means: None weighs all batches alike, as TRL does; 0 is the batch alone.

    Returns:
      One loss per row; λ_y log 2 where βx = δ.

    Reference: Jung et al. 2024, https://arxiv.org/abs/2404.04656 (reward shift); its density ratio for
    prompts of different origin is not here.
    """
    middle = 0.5 * jax.lax.stop_gradient(running_desirable_log_ratio + running_undesirable_log_ratio)
    logits = beta * (policy_logps - ref_logps - middle)
    return jnp.where(labels, -lambda_d * jax.nn.log_sigmoid(logits), -lambda_u * jax.nn.log_sigmoid(-logits))


def balanced_lambdas(desirable: int, undesirable: int, *, ratio: float = 1.0) -> tuple[float, float]:
    """(λ_D, λ_U) for the rows of each kind: the weight of the scarcer kind is raised, the other stays at 1.

    The rule is 1 ≤ λ_D n_D / (λ_U n_U) ≤ 4/3. Counts that fulfil it have weights (1, 1); for others the quotient
    becomes `ratio`. Its default 1, the lower end, balances the two; the paper's runs with most desirable rows dropped
    were at the upper end: 1 desirable to 10 undesirable at 4/3 gives λ_D = 13.33.

    Args:
      desirable: n_D, rows of the training data.
      undesirable: n_U.
      ratio: from 1 to 4/3; smaller where avoiding harm matters more than gaining quality.

    Raises:
      Mistake: a kind has no rows, or the ratio is outside the rule.

    Reference: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306.
    """
    if desirable <= 0 or undesirable <= 0:
        raise Mistake(f"{desirable} desirable and {undesirable} undesirable rows: the rule needs both kinds")
    if not 1 <= ratio <= 4 / 3:
        raise Mistake(f"ratio={ratio} is outside the rule's 1 to 4/3")
    quotient = desirable / undesirable
    if 1 <= quotient <= 4 / 3:
        return 1.0, 1.0
    return (ratio / quotient, 1.0) if quotient < 1 else (1.0, quotient / ratio)


UNPAIRED_LOSSES = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired, "bco": bco}
UNPAIRED = Kind(UNPAIRED_LOSSES, UNPAIRED_INPUTS, "B")
