"""The optimizer from its hyperparameters: schedule, clipping, and weight decay on matrices only.

An update that is not to be applied leaves its moments as they are by what it multiplies them with. To choose between
the new moments and the old, both would have to be there: a copy of the whole optimizer state on a CPU, where XLA
computes parameters and moments in loops of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jaxalign.mistake import Mistake
from jaxalign.types import PyTree, leaf_names

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate_schedule(
    learning_rate: float, *, schedule: str = "cosine", steps: int, warmup_steps: int = 0, final_share: float = 0.0
) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: a linear rise over `warmup_steps`, then constant or a fall.

    The rise takes (n + 1) / (warmup_steps + 1) of the peak, so that no update has rate 0; "linear" and "cosine" reach
    final_share · learning_rate after the last of `steps` updates.
    """
    if schedule not in SCHEDULES:
        raise Mistake(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if warmup_steps >= max(steps, 1):
        raise Mistake(f"warmup_steps={warmup_steps} leaves nothing of steps={steps}; it must be smaller")
    after = max(steps - warmup_steps, 1)
    fall = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, final_share * learning_rate, after),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, after, alpha=final_share),
    }[schedule]()
    if warmup_steps == 0:
        return fall
    first = learning_rate / (warmup_steps + 1)
    rise = optax.linear_schedule(first, learning_rate, warmup_steps)
    return optax.join_schedules([rise, fall], [warmup_steps])


def is_matrix(params: PyTree) -> PyTree:
    """True on leaves that weight decay shrinks: matrices, not biases, nor norms' scales.

    Leaves under `blocks/` carry a layer axis in front, and those under `members/` an axis of members before it; neither
    counts.
    """
    stacked = lambda name: len({"blocks", "members"} & set(name.split("/")))  # noqa: E731
    return jax.tree.map(lambda name, x: x.ndim - stacked(name) >= 2, leaf_names(params), params)


def adamw(
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    accumulator_dtype: str = "float32",
) -> Skipping:
    """AdamW behind clipping by the global norm.

    Args:
      schedule: learning rate of update n.
      weight_decay: coefficient on matrices (`is_matrix`); the decay of an update is learning_rate · weight_decay · w.
      max_grad_norm: gradients are scaled by min(1, max_grad_norm / norm); 0 means no clipping.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the bias-corrected square root.
      accumulator_dtype: of the first moment ("bfloat16" halves it); the second, whose small steps bfloat16 would
        lose, stays float32.

    Reference: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2.
    """
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()

    def rule(b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike) -> optax.GradientTransformation:
        dtype = jnp.dtype(accumulator_dtype)
        return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, mu_dtype=dtype, weight_decay=weight_decay, mask=is_matrix)

    def init(params: PyTree) -> optax.OptState:
        return clip.init(params), rule(b1, b2).init(params)

    def update(
        grads: PyTree, state: optax.OptState, params: PyTree = None, *, apply: jax.typing.ArrayLike = True, **_: object
    ) -> tuple[PyTree, optax.OptState]:
        none, moments = state
        clipped, _ = clip.update(grads, none)
        seen = jax.tree.map(lambda g: jnp.where(apply, g, 0), clipped)
        # 1 · m + 0 · 0 is m to the bit
        kept = rule(jnp.where(apply, b1, 1.0), jnp.where(apply, b2, 1.0))
        updates, after = kept.update(seen, moments, params)
        counted = jax.tree.map(lambda new, old: jnp.where(apply, new, old) if new.ndim == 0 else new, after, moments)
        return jax.tree.map(lambda u: jnp.where(apply, u, 0), updates), (none, counted)

    return Skipping(init, update)


class Skipping(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update` takes `apply`, Bool[]: where False the updates are 0, the state stays as it is."""


def skipping(optimizer: optax.GradientTransformation) -> Skipping:
    """Any optimizer as one that can skip; one that cannot by itself keeps both states until it is known which stays."""
    if isinstance(optimizer, Skipping):
        return optimizer
    inner = optax.with_extra_args_support(optimizer)

    def update(
        grads: PyTree,
        state: optax.OptState,
        params: PyTree = None,
        *,
        apply: jax.typing.ArrayLike = True,
        **others: object,
    ) -> tuple[PyTree, optax.OptState]:
        updates, after = inner.update(grads, state, params, **others)
        kept = jax.tree.map(lambda new, old: jnp.where(apply, new, old), after, state)
        return jax.tree.map(lambda u: jnp.where(apply, u, 0), updates), kept

    return Skipping(inner.init, update)


def partition(optimizers: Mapping[str, Skipping]) -> Skipping:
    """One optimizer for each of the subtrees of params that bear these names."""
    return Skipping(*optax.partition(dict(optimizers), {name: name for name in optimizers}))
