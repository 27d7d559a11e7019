"""Losses of reinforcement learning: one value per token, from log-probs, advantages and values of the same index.

ρ_t = π(t)/π_old(t) = exp(logps - old_logps), where π_old drew the tokens. All are minimised; A > 0 raises π(t).
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.config.limits import above, within
from jaxalign.losses.contract import POLICY_INPUTS, Kind, Positive
from jaxalign.mistake import Mistake

PerToken = Float[Array, "*tokens"]


def ppo_clip(
    logps: PerToken,
    old_logps: PerToken,
    advantages: PerToken,
    *,
    clip_epsilon: Annotated[float, within(0, 1)] = 0.2,
    clip_epsilon_high: Annotated[float | None, above(0)] = None,
    dual_clip: Annotated[float | None, above(1)] = None,
) -> PerToken:
    """max(-ρ A, -clip(ρ, 1 - ε, 1 + ε_high) A): the clipped surrogate.

    Args:
      logps: log π(t), of the policy that is trained.
      old_logps: log π_old(t), when the tokens were drawn.
      advantages: A_t.
      clip_epsilon: ε; no gradient beyond a ratio of 1 - ε where A < 0.
      clip_epsilon_high: ε_high, by default ε; larger leaves room to raise unlikely tokens (DAPO's clip-higher).
      dual_clip: c > 1: where A < 0 the loss is at most -c A, however large the ratio; None: no bound.

    Returns:
      The loss of each token; -A where ρ = 1, with gradient -A ∇ log π.

    Reference: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7. Clip-higher: Yu et al. 2025,
    https://arxiv.org/abs/2503.14476. Dual clip: Ye et al. 2019, https://arxiv.org/abs/1912.09729.
    """
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    if not 0 < clip_epsilon < 1 or high <= 0:
        raise Mistake(f"clip_epsilon={clip_epsilon} must be in (0, 1) and clip_epsilon_high={high} above 0")
    if dual_clip is not None and dual_clip <= 1:
        raise Mistake(f"dual_clip={dual_clip} must be above 1, or it would cut into the trust region")
    ratio = jnp.exp(logps - old_logps)
    loss = jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1 - clip_epsilon, 1 + high) * advantages)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss


def reinforce(logps: PerToken, old_logps: PerToken, advantages: PerToken) -> PerToken:
    """-ρ A without a clip: at ρ = 1, which holds for the first update of a batch, REINFORCE's -A ∇ log π.

    Later updates are importance-weighted, and unbiased for it. With leave-one-out advantages it is RLOO.

    Reference: Williams 1992, https://doi.org/10.1007/BF00992696; Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740.
    """
    return -jnp.exp(logps - old_logps) * advantages


def cispo(
    logps: PerToken, old_logps: PerToken, advantages: PerToken, *, clip_epsilon_high: Positive = 0.28
) -> PerToken:
    """-sg(min(ρ, 1 + ε_high)) A log π: the weight is clipped, and no token loses its gradient.

    Args:
      logps: log π(t).
      old_logps: log π_old(t).
      advantages: A_t.
      clip_epsilon_high: of the weight, which has no lower bound.

    Reference: MiniMax 2025, https://arxiv.org/abs/2506.13585.
    """
    if clip_epsilon_high <= 0:
        raise Mistake(f"clip_epsilon_high={clip_epsilon_high} must be above 0")
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(logps - old_logps), 1 + clip_epsilon_high))
    return -weight * advantages * logps


def sequence_logps(
    logps: Float[Array, "B T"], old_logps: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Log-probs whose ratio to `old_logps` is the geometric mean of the sequence's ratios, at every token.

    old_logps + sg(m) + logps - sg(logps), with m the mean over the mask of logps - old_logps: any loss above becomes
    one of sequence-level ratios (GSPO), each token with its own gradient.

    Reference: Zheng et al. 2025, https://arxiv.org/abs/2507.18071, GSPO-token.
    """
    gap = jnp.where(mask, logps - old_logps, 0.0)
    mean = jnp.sum(gap, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return old_logps + jax.lax.stop_gradient(mean) + (logps - jax.lax.stop_gradient(logps))


def truncated_weights(logps: PerToken, drawn_logps: PerToken, cap: float) -> PerToken:
    """min(π(t)/q(t), cap): the importance weight of a token that q, not π, drew.

    A weight per token, not per response: the tokens before it are still distributed as q's, which leaves some bias, but
    its variance does not grow with length. Uncapped, Σ_t q w f = Σ_t π f over the tokens that q can draw.

    Args:
      logps: log π(t).
      drawn_logps: log q(t).
      cap: C; terms whose ratio is larger are biased towards 0.

    Reference: Ionides 2008, https://doi.org/10.1198/106186008X320456; of tokens, Yao et al. 2025,
    https://fengyao.notion.site/off-policy-rl.
    """
    return jnp.minimum(jnp.exp(logps - drawn_logps), cap)


def value_clip(
    values: PerToken, old_values: PerToken, returns: PerToken, *, clip_epsilon: float | None = 0.2
) -> PerToken:
    """½ max((V - R)², (V_clip - R)²), V_clip within ± ε of the value when the tokens were drawn.

    Args:
      values: V_t, of the critic that is trained.
      old_values: V_t when the tokens were drawn.
      returns: R_t = A_t + V_t, of the same time.
      clip_epsilon: ε, in the unit of rewards; None: ½ (V - R)².

    Reference: Schulman et al. 2017's code, detail 9 of Huang et al. 2022,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.
    """
    error = (values - returns) ** 2
    if clip_epsilon is None:
        return 0.5 * error
    if clip_epsilon <= 0:
        raise Mistake(f"clip_epsilon={clip_epsilon} must be above 0, or None for no clip")
    near = jnp.clip(values, old_values - clip_epsilon, old_values + clip_epsilon)
    return 0.5 * jnp.maximum(error, (near - returns) ** 2)


POLICY_LOSSES = {"ppo_clip": ppo_clip, "reinforce": reinforce, "cispo": cispo}
POLICY = Kind(POLICY_LOSSES, POLICY_INPUTS, "B T")
