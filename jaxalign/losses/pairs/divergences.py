"""DPO under divergences other than the reverse KL: the implicit reward is β f'(π/π_ref), not β log π/π_ref.

Each divergence is given by its transformation of log-ratios x = log π/π_ref, f'(exp x) - f'(1), which is 0 where
policy and reference agree. Exponentials of log-ratios continue as straight lines beyond 30 nats, where they are 1e13:
finite in float32, and still with a gradient.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp

from jaxalign.config.limits import positive_share
from jaxalign.losses.contract import PerPair, Positive, Smoothing
from jaxalign.losses.ranking import bradley_terry
from jaxalign.mistake import Mistake

LINEAR_FROM = 30.0  # nats


def forward_kl(log_ratios: PerPair) -> PerPair:
    """f(u) = -log u, f'(u) - f'(1) = 1 - 1/u: at most 1 however likely a response becomes."""
    return 1 - _exp(-log_ratios)


def js(log_ratios: PerPair) -> PerPair:
    """f(u) = u log u - (u + 1) log((u + 1)/2), f'(u) = log(2u/(1 + u)): log u where u is small, at most log 2."""
    return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratios)


def alpha_divergence(log_ratios: PerPair, *, alpha: float = 0.5) -> PerPair:
    """f'(u) - f'(1) = (1 - u^-α)/α: the reverse KL as α goes to 0, the forward KL at 1.

    Args:
      log_ratios: log u.
      alpha: in (0, 1].
    """
    if alpha <= 0:
        raise Mistake(f"alpha={alpha} must be positive; its limit at 0 is the reverse KL")
    small = jnp.abs(alpha * log_ratios) < 1
    # expm1 keeps small exponents exact; where that is not the branch taken, it must not overflow
    near = -jnp.expm1(jnp.where(small, -alpha * log_ratios, 0.0))
    return jnp.where(small, near, 1 - _exp(-alpha * log_ratios)) / alpha


def dpo_forward_kl(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """DPO under the forward KL: -log σ(β [π_ref/π(rejected) - π_ref/π(chosen)]).

    Args:
      policy_chosen_logps: inputs, and beta and label_smoothing, as in `dpo`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Wang et al. 2023, f-DPO, https://arxiv.org/abs/2309.16240, its loss with f' of the forward KL.
    """
    chosen = forward_kl(policy_chosen_logps - ref_chosen_logps)
    rejected = forward_kl(policy_rejected_logps - ref_rejected_logps)
    return bradley_terry(beta * chosen, beta * rejected, label_smoothing=label_smoothing)


def dpo_js(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """DPO under the Jensen-Shannon divergence: -log σ(β [log σ(x_w) - log σ(x_l)]), x the log-ratios.

    Args:
      policy_chosen_logps: inputs, and beta and label_smoothing, as in `dpo`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Wang et al. 2023, f-DPO, https://arxiv.org/abs/2309.16240, its loss with f' of that divergence.
    """
    chosen = js(policy_chosen_logps - ref_chosen_logps)
    rejected = js(policy_rejected_logps - ref_rejected_logps)
    return bradley_terry(beta * chosen, beta * rejected, label_smoothing=label_smoothing)


def dpo_alpha(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    ref_chosen_logps: PerPair,
    ref_rejected_logps: PerPair,
    *,
    beta: Positive = 0.1,
    alpha: Annotated[float, positive_share()] = 0.5,
    label_smoothing: Smoothing = 0.0,
) -> PerPair:
    """DPO under an α-divergence: -log σ(β/α [exp(-α x_l) - exp(-α x_w)]), x the log-ratios.

    Args:
      policy_chosen_logps: inputs, and beta and label_smoothing, as in `dpo`.
      alpha: towards 0 it is `dpo`, at 1 `dpo_forward_kl`.

    Returns:
      One loss per pair; log 2 wherever policy and reference agree.

    Reference: Wang et al. 2023, f-DPO, https://arxiv.org/abs/2309.16240, its loss with f' of the α-divergence.
    """
    chosen = alpha_divergence(policy_chosen_logps - ref_chosen_logps, alpha=alpha)
    rejected = alpha_divergence(policy_rejected_logps - ref_rejected_logps, alpha=alpha)
    return bradley_terry(beta * chosen, beta * rejected, label_smoothing=label_smoothing)


def _exp(x: PerPair) -> PerPair:
    """exp x, and its tangent beyond LINEAR_FROM."""
    return jnp.exp(jnp.minimum(x, LINEAR_FROM)) * (1 + jnp.maximum(x - LINEAR_FROM, 0))
