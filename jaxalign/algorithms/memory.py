"""Memory from batch to batch, in the train state's carry.

Running means of the statistics that a loss names, as Averages; for PPO the KL coefficient that seeks a target, and the
mean and variance of all scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Average

Momenta = Mapping[str, float | None]  # by the loss's `running_` inputs (losses/contract.py: momenta)
Means = dict[str, Average]  # by the same names

RUNNING = "running_"
MEAN = "mean_"
GAIN, BOUND = 0.1, 0.2  # Ziegler et al.'s K_β, and how far an error counts


def start_means(momenta: Momenta) -> Means:
    """Means of nothing, 0: true of every log-ratio before the first step."""
    return {name: Average(np.float32(0), np.float32(0)) for name in momenta}


def advance_means(means: Means, batch_means: Mapping[str, Average], momenta: Momenta) -> Means:
    """The means after a batch.

    Args:
      means: by the names `running_x`.
      batch_means: of the whole batch, by the names `mean_x`.
      momenta: None: the mean over all elements of all batches so far, as the count grows. m: m · (the mean so far) +
        (1 - m) · (the batch's mean).
    """
    return {name: _after(means[name], batch_means[MEAN + name.removeprefix(RUNNING)], m) for name, m in momenta.items()}


def _after(so_far: Average, batch: Average, momentum: float | None) -> Average:
    if momentum is None:
        return so_far + batch
    mean = momentum * so_far.compute() + (1 - momentum) * batch.compute()
    moved = Average(mean, jnp.ones((), jnp.float32))
    # a batch without a single desirable response does not move their mean
    return jax.tree.map(lambda old, new: jnp.where(batch.count > 0, new, old), so_far, moved)


def next_kl_coef(kl_coef: jax.Array, kl: jax.Array, *, target: float) -> jax.Array:
    """β (1 + 0.1 clip(KL / target - 1, ±0.2)): log β moves in proportion to the error, by at most 2 % a batch.

    Args:
      kl_coef: β, the coefficient of this batch's rewards.
      kl: KL(π‖π_ref) of this batch, in nats a response.
      target: the KL that is sought.

    Reference: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2.
    """
    return kl_coef * (1 + GAIN * jnp.clip(kl / target - 1, -BOUND, BOUND))


class Spread(NamedTuple):
    """Mean and variance of all scores so far, as sums that merge: float32 scalars."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array  # Σ (score - mean)²

    @classmethod
    def start(cls) -> Spread:
        """The spread of no scores."""
        return cls(*np.zeros(3, np.float32))

    def seen(self, scores: jax.Array, present: jax.Array) -> Spread:
        """The spread with the scores [B] of a batch added, those where `present` is True.

        Reference: Chan, Golub and LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115, eq. 2.1.
        """
        new = jnp.sum(present, dtype=jnp.float32)
        first = scores[jnp.argmax(present)]  # measured from it, equal scores do not differ by a rounding
        distance = jnp.where(present, scores - first, 0.0)
        mean_distance = jnp.sum(distance) / jnp.maximum(new, 1)
        batch_mean = jnp.where(new > 0, first + mean_distance, 0.0)
        batch_squares = jnp.sum(jnp.where(present, (distance - mean_distance) ** 2, 0.0))
        count, gap = self.count + new, batch_mean - self.mean
        share = new / jnp.maximum(count, 1)
        return Spread(count, self.mean + gap * share, self.squares + batch_squares + gap**2 * self.count * share)

    def std(self) -> jax.Array:
        """√(Σ (score - mean)² / (n - 1)); 1 until two scores differ."""
        variance = self.squares / jnp.maximum(self.count - 1, 1)
        return jnp.where(variance > 0, jnp.sqrt(variance), 1.0)

    def normalised(self, scores: jax.Array) -> jax.Array:
        """(scores - mean) / std."""
        return (scores - self.mean) / self.std()
