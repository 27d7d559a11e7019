"""Gradients of weights are summed in float32, over tokens and over chips, whatever dtype the products have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.places import make_mesh
from jaxalign.ops.product import product, shifted

TOKENS, INPUTS, OUTPUTS = 64, 16, 8
SLOPES = jnp.cos(jnp.arange(TOKENS * OUTPUTS, dtype=jnp.float32)).reshape(TOKENS, OUTPUTS)


def gradients(dtype, devices, x, kernel, bias):
    """d(Σ slope y) of y = x W + b, rows over so many devices, each of which adds its share."""
    mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])

    def total(kernel, bias, x):
        y = shifted(product(x.astype(dtype), kernel), bias)
        return jnp.sum(y.astype(jnp.float32) * SLOPES)

    placed = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(kernel, bias, placed)


@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_of_bfloat16_products_have_the_error_of_their_inputs_on_any_number_of_devices(devices):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, bias = (
        jax.random.normal(k, s) for k, s in zip(keys, [(TOKENS, INPUTS), (INPUTS, OUTPUTS), (OUTPUTS,)], strict=True)
    )
    d_kernel, d_bias, d_x = gradients(jnp.bfloat16, devices, x, kernel, bias)
    # float32 sums of the rounded factors, which is all that bfloat16 may change
    inputs, slopes = (np.asarray(part.astype(jnp.bfloat16), np.float64) for part in (x, SLOPES))
    np.testing.assert_allclose(d_kernel, inputs.T @ slopes, atol=1e-5)
    np.testing.assert_allclose(d_bias, slopes.sum(0), atol=1e-5)
    assert (d_kernel.dtype, d_bias.dtype, d_x.dtype) == (jnp.float32,) * 3


def test_float32_products_are_plain_products():
    x, kernel, bias = jnp.ones((2, 3, 4)), jnp.ones((4, 5)), jnp.ones(5)
    text = str(jax.make_jaxpr(lambda *a: shifted(product(a[0], a[1]), a[2]))(x, kernel, bias))
    assert "custom_vjp" not in text
    np.testing.assert_array_equal(shifted(product(x, kernel), bias), jnp.full((2, 3, 5), 5.0))
