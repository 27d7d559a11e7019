"""Products with weights in a narrower dtype, whose gradients are summed in float32.

The output of a product has the dtype of compute, so its transpose has too, and with rows on several chips the
partitioner adds the chips' shares of a weight's gradient in bfloat16: the error grows with their number. Here the
gradient of a weight or bias leaves the matrix unit in float32, and is summed and scattered so.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxalign.kernels.products import precision_of, times


def product(
    x: Float[Array, "*rows I"], kernel: Float[Array, "I O"], place: NamedSharding | None = None
) -> Float[Array, "*rows O"]:
    """x W in the dtype of x; dx = g Wᵀ in that dtype, dW = xᵀ g in float32, then in the dtype of W.

    Args:
      x: tokens in the dtype of compute.
      kernel: W, in a dtype at least as wide.
      place: sharding of W while it is used. Without one the partitioner may gather W in two layouts, one of them for
        the backward pass.
    """
    if jnp.dtype(x.dtype).itemsize >= jnp.dtype(kernel.dtype).itemsize:
        narrow = kernel.astype(x.dtype)
        kernel = narrow if place is None else _placed(place, narrow)
        return jnp.matmul(x, kernel, precision=precision_of(x.dtype))
    return _product(place, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _placed(place: NamedSharding, kernel: jax.Array) -> jax.Array:
    """The kernel there; its gradient has no place, so that it can be scattered at once."""
    return jax.lax.with_sharding_constraint(kernel, place)


_placed.defvjp(lambda place, kernel: (_placed(place, kernel), None), lambda place, _, g: (g,))


def shifted(x: Float[Array, "*rows O"], bias: Float[Array, "O"]) -> Float[Array, "*rows O"]:
    """x + b in the dtype of x; db = Σ g in float32."""
    if jnp.dtype(x.dtype).itemsize >= jnp.dtype(bias.dtype).itemsize:
        return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)
    return _shifted(x, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(place: NamedSharding | None, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ _narrow(kernel, x, place)


def _product_forward(place: NamedSharding | None, x: jax.Array, kernel: jax.Array) -> tuple:
    return _product(place, x, kernel), (x, kernel)


def _product_backward(place: NamedSharding | None, residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    tokens, slopes = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    d_kernel = times("ni,no->io", tokens, slopes)
    return g @ _narrow(kernel, x, place).T, d_kernel.astype(kernel.dtype)


def _narrow(kernel: jax.Array, x: jax.Array, place: NamedSharding | None) -> jax.Array:
    narrow = kernel.astype(x.dtype)
    return narrow if place is None else _placed(place, narrow)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _shifted(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)


def _shifted_forward(x: jax.Array, bias: jax.Array) -> tuple:
    return _shifted(x, bias), jnp.zeros((), bias.dtype)


def _shifted_backward(like: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g, jnp.sum(g, axis=range(g.ndim - 1), dtype=jnp.float32).astype(like.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)
