"""Means that a loss remembers from batch to batch, as Averages in the train state's carry."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Average

Momenta = Mapping[str, float | None]  # by the loss's `running_` inputs (losses/inputs.py: momenta)
Carry = dict[str, Average]

RUNNING = "running_"
MEAN = "mean_"


def start(momenta: Momenta) -> Carry:
    """Nothing seen, a mean of 0: true of every log-ratio before the first step."""
    return {name: Average(np.float32(0), np.float32(0)) for name in momenta}


def advance(carry: Carry, found: Mapping[str, Average], momenta: Momenta) -> Carry:
    """The carry after a batch.

    Args:
      carry: by the names `running_x`.
      found: of the whole batch, by the names `mean_x`.
      momenta: None: the mean over all elements of all batches so far, as the count grows. m: m · (the mean so far) +
        (1 - m) · (the batch's mean).
    """
    return {name: _after(carry[name], found[MEAN + name.removeprefix(RUNNING)], m) for name, m in momenta.items()}


def _after(so_far: Average, batch: Average, momentum: float | None) -> Average:
    if momentum is None:
        return so_far + batch
    mean = momentum * so_far.compute() + (1 - momentum) * batch.compute()
    moved = Average(mean, jnp.ones((), jnp.float32))
    # a batch without a single desirable response says nothing of them
    return jax.tree.map(lambda old, new: jnp.where(batch.count > 0, new, old), so_far, moved)
