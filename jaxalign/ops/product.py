"""Products with weights in a narrower dtype, whose gradients are summed in float32.

The output of a product has the dtype of compute, so its transpose has too, and with rows on several chips the
partitioner adds the chips' shares of a weight's gradient in bfloat16: the error grows with their number. Here the
gradient of a weight or bias leaves the matrix unit in float32, and is summed and scattered so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.kernels.products import precision_of, times


def product(x: Float[Array, "*rows I"], kernel: Float[Array, "I O"]) -> Float[Array, "*rows O"]:
    """x W in the dtype of x; dx = g Wᵀ in that dtype, dW = xᵀ g in float32, then in the dtype of W."""
    if jnp.dtype(x.dtype).itemsize >= jnp.dtype(kernel.dtype).itemsize:
        return jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x.dtype))
    return _product(x, kernel)


def shifted(x: Float[Array, "*rows O"], bias: Float[Array, "O"]) -> Float[Array, "*rows O"]:
    """x + b in the dtype of x; db = Σ g in float32."""
    if jnp.dtype(x.dtype).itemsize >= jnp.dtype(bias.dtype).itemsize:
        return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)
    return _shifted(x, bias)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple:
    return _product(x, kernel), (x, kernel)


def _product_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    tokens, slopes = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    d_kernel = times("ni,no->io", tokens, slopes)
    return g @ kernel.astype(x.dtype).T, d_kernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _shifted(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)


def _shifted_forward(x: jax.Array, bias: jax.Array) -> tuple:
    return _shifted(x, bias), jnp.zeros((), bias.dtype)


def _shifted_backward(like: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g, jnp.sum(g, axis=range(g.ndim - 1), dtype=jnp.float32).astype(like.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)
