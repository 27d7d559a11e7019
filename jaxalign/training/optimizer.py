"""The optimizer from its hyperparameters: schedule, clipping, and weight decay on matrices only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

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
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if warmup_steps >= max(steps, 1):
        raise ValueError(f"warmup_steps={warmup_steps} leaves nothing of steps={steps}; it must be smaller")
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
) -> optax.GradientTransformation:
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
    adam = optax.adamw(
        schedule,
        b1=b1,
        b2=b2,
        eps=eps,
        mu_dtype=jnp.dtype(accumulator_dtype),
        weight_decay=weight_decay,
        mask=is_matrix,
    )
    return optax.chain(clip, adam)
