"""Sums, means and variances over the True positions of a mask; statistics in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num


def masked_sum(values: Num[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Σ values where mask; values elsewhere may be NaN."""
    return jnp.sum(jnp.where(mask, values, 0).astype(jnp.float32))


def masked_mean(values: Num[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Σ values / number of True; 0 where nothing is True."""
    return masked_sum(values, mask) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(values: Num[Array, "*shape"], mask: Bool[Array, "*shape"], *, unbiased: bool = True) -> Float[Array, ""]:
    """Σ (values - mean)² / (n - 1), or / n when not `unbiased`; 0 for fewer than two values, and for equal ones."""
    below = values.astype(jnp.float32) - _largest(values, mask)
    centred = jnp.where(mask, below - masked_mean(below, mask), 0.0)
    count = jnp.sum(mask) - (1 if unbiased else 0)
    return jnp.sum(centred**2) / jnp.maximum(count, 1)


def whiten(
    values: Num[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True, eps: float = 1e-8
) -> Float[Array, "*shape"]:
    """(values - mean) / sqrt(var + eps) over the mask, 0 elsewhere; the mean is added back if not `shift_mean`."""
    top = _largest(values, mask)
    below = values.astype(jnp.float32) - top
    mean = masked_mean(below, mask)
    white = (below - mean) / jnp.sqrt(masked_var(values, mask) + eps)
    return jnp.where(mask, white if shift_mean else white + (top + mean), 0.0)


def _largest(values: Num[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """The largest masked value. Subtracting it first makes the variance of equal values exactly 0."""
    return jnp.where(jnp.any(mask), jnp.max(jnp.where(mask, values.astype(jnp.float32), -jnp.inf)), 0.0)


def last_token_index(mask: Bool[Array, "B T"]) -> Int[Array, "B"]:
    """Index of the last True of each row; -1 in a row without one. Ids are not compared, since pad may equal EOS."""
    indices = jnp.arange(mask.shape[1])[None, :]
    return jnp.max(jnp.where(mask, indices, -1), axis=1)
