"""The optimizer of a config: schedule, clipping, and weight decay on matrices only.

A skipped update keeps the moments by multiplying them with 1 and the gradient with 0. A choice between the new moments
and the old would need both: a copy of the whole optimizer state on a CPU, where XLA updates parameters and moments in
separate loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from jaxalign.config.shared import OptimizerConfig
from jaxalign.mistake import Mistake
from jaxalign.types import PyTree, leaf_names


def learning_rate_schedule(config: OptimizerConfig, *, steps: int, earlier: Sequence[int] = ()) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: a linear rise over `warmup_steps`, then constant or a fall.

    The rise takes (n + 1) / (warmup_steps + 1) of the peak, so that no update has rate 0; "linear" and "cosine" reach 0
    after the last of `steps` updates.

    Args:
      config: with a learning rate.
      steps: number of updates.
      earlier: numbers of updates after which the run began anew: each part has a rise and a fall of its own.
    """
    ends = [*earlier, steps]
    parts = [_part(config, end - start) for start, end in zip([0, *earlier], ends, strict=True)]
    return optax.join_schedules(parts, ends[:-1]) if earlier else parts[0]


def _part(config: OptimizerConfig, steps: int) -> optax.Schedule:
    peak, warmup_steps = config.learning_rate, config.warmup_steps
    if warmup_steps >= max(steps, 1):
        raise Mistake(
            f"`optimizer.warmup_steps` {warmup_steps}: it must be below {steps}, the number of updates in this run"
        )
    assert peak is not None, "TrainConfig.peak_learning_rate is filled in before"
    rest = max(steps - warmup_steps, 1)
    fall = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if warmup_steps == 0:
        return fall
    rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([rise, fall], [warmup_steps])


def is_matrix(params: PyTree) -> PyTree:
    """True on leaves that weight decay shrinks: matrices, not biases, nor norms' scales.

    Leaves under `blocks/` carry a layer axis in front, and those under `members/` an axis of members before it; neither
    counts.
    """

    def stacked_axes(name: str) -> int:
        return len({"blocks", "members"} & set(name.split("/")))

    return jax.tree.map(lambda name, x: x.ndim - stacked_axes(name) >= 2, leaf_names(params), params)


def adamw(config: OptimizerConfig, rate: optax.Schedule) -> Skipping:
    """AdamW behind clipping by the global norm.

    Gradients are scaled by min(1, max_grad_norm / norm); max_grad_norm 0 means no clipping. The decay of an update is
    rate · weight_decay · w, on matrices (`is_matrix`). `accumulator_dtype` is that of the first moment; the second,
    whose small steps bfloat16 would lose, stays float32. Adam's epsilon, 1e-8, is added outside the square root of the
    bias-corrected second moment.

    Args:
      config: clipping, moments and decay; `rate` takes the place of its learning rate and schedule.
      rate: learning rate of update n.

    Reference: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm > 0 else optax.identity()

    def rule(b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike) -> optax.GradientTransformation:
        dtype, decay = jnp.dtype(config.accumulator_dtype), config.weight_decay
        return optax.adamw(rate, b1=b1, b2=b2, eps=1e-8, mu_dtype=dtype, weight_decay=decay, mask=is_matrix)

    def init(params: PyTree) -> optax.OptState:
        return clip.init(params), rule(config.b1, config.b2).init(params)

    def update(
        grads: PyTree, state: optax.OptState, params: PyTree = None, *, apply: jax.typing.ArrayLike = True, **_: object
    ) -> tuple[PyTree, optax.OptState]:
        none, moments = state
        clipped, _ = clip.update(grads, none)
        clipped = jax.tree.map(lambda g: jnp.where(apply, g, 0), clipped)
        # 1 · m + 0 · 0 is m to the bit
        skippable = rule(jnp.where(apply, config.b1, 1.0), jnp.where(apply, config.b2, 1.0))
        updates, after = skippable.update(clipped, moments, params)
        after = jax.tree.map(lambda new, old: jnp.where(apply, new, old) if new.ndim == 0 else new, after, moments)
        return jax.tree.map(lambda u: jnp.where(apply, u, 0), updates), (none, after)

    return Skipping(init, update)


class Skipping(optax.GradientTransformationExtraArgs):
    """An optimizer whose `update` takes `apply`, Bool[]: if it is False, updates are 0 and the state stays as it is."""


def skipping(optimizer: optax.GradientTransformation) -> Skipping:
    """Any optimizer as one that can skip updates; one that is no `Skipping` holds both states until one is selected."""
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
        after = jax.tree.map(lambda new, old: jnp.where(apply, new, old), after, state)
        return jax.tree.map(lambda u: jnp.where(apply, u, 0), updates), after

    return Skipping(inner.init, update)


def partition(optimizers: Mapping[str, Skipping]) -> Skipping:
    """One optimizer for each of the subtrees of params that bear these names."""
    return Skipping(*optax.partition(dict(optimizers), {name: name for name in optimizers}))
