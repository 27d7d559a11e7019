"""Matrix products that are as exact as their operands, on every platform: float32 ones are not rounded first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32, which a TPU would round to bfloat16 and a GPU to TF32; None, the default, for others."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def times(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum of two arrays of one dtype, in float32."""
    return jnp.einsum(axes, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)
