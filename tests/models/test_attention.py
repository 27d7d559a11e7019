"""The implementations of attention mean the same; the Pallas kernel runs here in its interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.attention import attention, choose

LENGTH = 128


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_splash_attention_equals_xla_on_packed_rows_with_grouped_heads(window, softcap, monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)
    keys = jax.random.split(jax.random.key(0), 4)
    query = 3 * jax.random.normal(keys[0], (2, LENGTH, 4, 64))
    key, value = (jax.random.normal(k, (2, LENGTH, 2, 64)) for k in keys[1:3])
    segments = np.array([[1] * 50 + [2] * 60 + [0] * 18, [0] * 30 + [1] * 98])
    positions = np.stack([np.r_[np.arange(50), np.arange(60), np.zeros(18)], np.r_[np.zeros(30), np.arange(98)]])
    positions = jnp.asarray(positions, jnp.int32)
    weights = jax.random.normal(keys[3], query.shape) * (segments > 0)[:, :, None, None]

    def total(qkv, implementation):
        out = attention(
            *qkv,
            positions=positions,
            segment_ids=jnp.asarray(segments),
            key_positions=positions,
            key_segment_ids=jnp.asarray(segments),
            window=window,
            softcap=softcap,
            scale=0.125,
            implementation=implementation,
        )
        return jnp.sum(out * weights), out

    qkv = query, key, value
    (_, expected), expected_grads = jax.value_and_grad(total, has_aux=True)(qkv, "xla")
    (_, found), grads = jax.value_and_grad(total, has_aux=True)(qkv, "splash")
    read = segments > 0
    np.testing.assert_allclose(found[read], expected[read], atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("platform", "query", "key", "softcap", "expected"),
    [
        ("tpu", shape(1, 256, 4, 128), shape(1, 256, 2, 128), 50.0, "splash"),
        ("tpu", shape(1, 200, 4, 128), shape(1, 200, 2, 128), None, "xla"),
        ("tpu", shape(1, 128, 4, 128), shape(1, 512, 2, 128), None, "xla"),
        ("gpu", shape(1, 256, 4, 128), shape(1, 256, 2, 128), None, "cudnn"),
        ("gpu", shape(1, 256, 4, 128), shape(1, 256, 2, 128), 50.0, "xla"),
        ("gpu", shape(1, 256, 4, 128, dtype=jnp.float32), shape(1, 256, 2, 128, dtype=jnp.float32), None, "xla"),
        ("cpu", shape(1, 256, 4, 128), shape(1, 256, 2, 128), None, "xla"),
    ],
)
def test_each_platform_takes_the_implementation_that_fits(platform, query, key, softcap, expected):
    assert choose(query, key, softcap, platform=platform) == expected
