"""Every body of the KL against float64, forward and backward: XLA, and the kernels in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.kernels import kl as kernel
from jaxalign.kernels.runtime import interpreted
from jaxalign.types import Unembedding

TARGETS = {"xla": kernel.XLA, "tpu": interpreted("tpu"), "gpu": interpreted("gpu")}


def problem(seed, n, d, r, v, *, softcap=None, bias=False, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 6)

    def draw(k, *shape):
        return jax.random.normal(keys[k], shape).astype(dtype)

    biases = [jax.random.normal(keys[k], (v,)) if bias else None for k in (4, 5)]
    policy = Unembedding(draw(1, v, d), biases[0], softcap)
    return draw(0, n, d), policy, draw(2, n, r), Unembedding(draw(3, v, r), biases[1], None)


def logits64(hidden, unembedding, temperature):
    """(z, dz/draw) in float64."""
    z = np.asarray(hidden, np.float64) @ np.asarray(unembedding.weight, np.float64).T
    if unembedding.bias is not None:
        z = z + np.asarray(unembedding.bias, np.float64)
    slope = np.ones_like(z)
    if unembedding.softcap is not None:
        bent = np.tanh(z / unembedding.softcap)
        z, slope = unembedding.softcap * bent, 1 - bent**2
    return z / temperature, slope / temperature


def log_softmax64(z):
    peak = z.max(axis=1, keepdims=True)
    return z - peak - np.log(np.exp(z - peak).sum(axis=1, keepdims=True))


def by_hand(hidden, unembedding, ref_hidden, ref_unembedding, g, temperature):
    """KL and the gradients of Σ g KL to hidden, weight and bias, in float64."""
    z, slope = logits64(hidden, unembedding, temperature)
    log_p = log_softmax64(z)
    log_ratio = log_p - log_softmax64(logits64(ref_hidden, ref_unembedding, temperature)[0])
    value = np.sum(np.exp(log_p) * log_ratio, axis=1)
    raw = g[:, None] * np.exp(log_p) * (log_ratio - value[:, None]) * slope
    hidden, weight = (np.asarray(x, np.float64) for x in (hidden, unembedding.weight))
    return value, raw @ weight, raw.T @ hidden, raw.sum(axis=0)


def compare(body, sides, *, count, temperature, chunk, atol):
    """The largest errors allowed are absolute, of values and gradients of order 1 to 30."""
    n = sides[0].shape[0]
    counts = np.arange(n) < count
    g = np.asarray(jax.random.normal(jax.random.key(7), (n,)), np.float64) * counts

    def weighted(hidden, unembedding):
        options = {"temperature": temperature, "chunk": chunk, "target": TARGETS[body]}
        value = kernel.kl(hidden, unembedding, *sides[2:], jnp.int32(count), **options)
        return jnp.vdot(jnp.asarray(g, jnp.float32), value), value

    (_, value), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(*sides[:2])
    expected = by_hand(*sides, g, temperature)
    np.testing.assert_allclose(value, expected[0] * counts, atol=atol)
    for name, actual, exact in zip(
        ("hidden", "weight", "bias"), jax.tree.leaves(gradients), expected[1:], strict=False
    ):
        np.testing.assert_allclose(np.asarray(actual, np.float64), exact, atol=atol, rtol=atol, err_msg=name)


SHAPES = {
    "aligned": (16, 128, 128, 512, 256),
    "unaligned": (37, 20, 12, 333, 128),
    "tiny": (1, 3, 5, 2, 512),
    "a slab that overlaps": (9, 8, 8, 300, 160),
}


@pytest.mark.parametrize("body", TARGETS)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_equal_float64(body, name):
    n, d, r, v, chunk = SHAPES[name]
    sides = problem(0, n, d, r, v)
    sides = (sides[0] / d**0.5, sides[1], sides[2] / r**0.5, sides[3])
    compare(body, sides, count=n, temperature=1.0, chunk=chunk, atol=2e-5)


@pytest.mark.parametrize("body", TARGETS)
def test_softcap_bias_temperature_and_rows_that_do_not_count(body):
    sides = problem(1, 40, 16, 24, 200, softcap=5.0, bias=True)
    compare(body, sides, count=17, temperature=0.7, chunk=128, atol=5e-5)


@pytest.mark.parametrize("body", TARGETS)
def test_bfloat16_inputs_give_float32_values_and_gradients_within_their_own_rounding(body):
    sides = problem(2, 24, 32, 32, 300, dtype=jnp.bfloat16)
    sides = (sides[0] / 4, sides[1], sides[2] / 4, sides[3])
    n = sides[0].shape[0]
    value = kernel.kl(*sides, jnp.int32(n), chunk=128, target=TARGETS[body])
    assert value.dtype == jnp.float32
    # products of bfloat16 are exact in float32, so the values are as good as float32's
    np.testing.assert_allclose(value, by_hand(*sides, np.ones(n), 1.0)[0], atol=2e-5)
    # dz is rounded to bfloat16 before its products, and the results once more: 2 x 2^-8 of the largest
    compare(body, sides, count=n, temperature=1.0, chunk=128, atol=2**-6)


@pytest.mark.parametrize("body", TARGETS)
def test_no_row_counts(body):
    sides = problem(3, 5, 8, 8, 40)

    def total(h, u):
        return kernel.kl(h, u, *sides[2:], jnp.int32(0), target=TARGETS[body]).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(*sides[:2])
    assert float(value) == 0.0
    assert all(not np.any(x) for x in jax.tree.leaves(gradients))


@settings(max_examples=3, deadline=None)
@given(
    body=st.sampled_from(sorted(TARGETS)),
    n=st.integers(1, 40),
    d=st.integers(1, 40),
    r=st.integers(1, 40),
    v=st.integers(2, 300),
    chunk=st.integers(1, 300),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    part=st.floats(0.0, 1.0),
)
def test_any_shape(body, n, d, r, v, chunk, softcap, bias, temperature, part):
    sides = problem(n, n, d, r, v, softcap=softcap, bias=bias)
    sides = (sides[0] / d**0.5, sides[1], sides[2] / r**0.5, sides[3])
    compare(body, sides, count=int(part * n), temperature=temperature, chunk=chunk, atol=1e-4)


@pytest.mark.parametrize("body", TARGETS)
@pytest.mark.parametrize("n, v", [(1, 2), (33, 700)])
def test_of_logits_equals_float64(body, n, v):
    keys = jax.random.split(jax.random.key(4), 3)
    z, y = 3 * jax.random.normal(keys[0], (n, v)), 3 * jax.random.normal(keys[1], (n, v))
    g = jax.random.normal(keys[2], (n,))

    def weighted(z):
        return jnp.vdot(g, kernel.kl_of_logits(z, y, chunk=512, target=TARGETS[body]))

    log_p, log_q = (log_softmax64(np.asarray(x, np.float64)) for x in (z, y))
    exact = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    np.testing.assert_allclose(kernel.kl_of_logits(z, y, chunk=512, target=TARGETS[body]), exact, atol=2e-5)
    gradient = np.asarray(g)[:, None] * np.exp(log_p) * (log_p - log_q - exact[:, None])
    np.testing.assert_allclose(jax.grad(weighted)(z), gradient, atol=2e-5)


@pytest.mark.parametrize("body", TARGETS)
def test_what_vocabulary_tiles_say_joins_in_any_order_and_large_logits_stay_finite(body):
    sides = problem(5, 8, 8, 8, 600)
    sides = (1e4 * sides[0], *sides[1:])
    value = kernel.kl(*sides, jnp.int32(8), chunk=256, target=TARGETS[body])
    largest = np.abs(logits64(*sides[:2], 1.0)[0]).max()
    spacing = np.spacing(np.float32(largest))  # about 2^-7: a logit itself is not known any better
    np.testing.assert_allclose(value, by_hand(*sides, np.ones(8), 1.0)[0], atol=2 * spacing)
    order = np.random.default_rng(0).permutation(600)

    def shuffle(u):
        return Unembedding(u.weight[order], None, None)

    shuffled = kernel.kl(sides[0], shuffle(sides[1]), sides[2], shuffle(sides[3]), jnp.int32(8), target=TARGETS[body])
    np.testing.assert_allclose(shuffled, value, atol=2 * spacing)
