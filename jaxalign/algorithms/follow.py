"""A reference that follows the policy (TR-DPO and its like), so that β penalises distance from a recent policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.algorithms.base import FollowFn
from jaxalign.mistake import Mistake
from jaxalign.types import PyTree


def follow(*, alpha: float, every: int) -> FollowFn:
    """After each `every` steps, π_ref ← α π + (1 - α) π_ref, weight by weight; in between it stays.

    Args:
      alpha: the policy's share: the soft update for α < 1; the hard one for α = 1, a copy.
      every: τ, steps from one update to the next.

    The mean is computed in float32 and stored in the reference's dtype.

    Reference: Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656.

    Raises:
      Mistake: alpha or every is out of range.
    """
    if not 0 < alpha <= 1:
        raise Mistake(f"alpha={alpha} must be in (0, 1]: 1 copies the policy, and 0 would never move the reference")
    if every < 1:
        raise Mistake(f"every={every} must be at least 1 step")

    def mixed_leaf(ref: jax.Array, new: jax.Array) -> jax.Array:
        mean = alpha * new.astype(jnp.float32) + (1 - alpha) * ref.astype(jnp.float32)
        return mean.astype(ref.dtype)

    def mixed(reference: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(mixed_leaf, reference, params)

    def move(reference: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        return jax.lax.cond(step % every == 0, mixed, lambda reference, params: reference, reference, params)

    return move
