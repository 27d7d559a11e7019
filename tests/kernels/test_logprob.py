"""The log-probability kernel, interpreted: both bodies against float64, and what no distribution can violate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxalign.kernels import logprob, logprob_gpu, logprob_tpu
from jaxalign.kernels.runtime import MIB, SHARED_MEMORY, Target, interpreted

BODIES = ("tpu", "gpu")
NAMES = ("logps", "entropy", "log_normalizer", "mean_logit")
FEW = settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])  # each compiles anew
# Two row tiles and three column tiles with ragged ends, one ragged tile, nearly nothing, and whole tiles.
SHAPES = ((150, 40, 300), (5, 8, 37), (1, 1, 2), (128, 128, 256))


def problem(tokens, width, vocabulary, *, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    hidden = (2 * jax.random.normal(keys[0], (tokens, width))).astype(dtype)
    weight = jax.random.normal(keys[1], (vocabulary, width)).astype(dtype) / width**0.5
    bias = jax.random.normal(keys[2], (vocabulary,))
    targets = jax.random.randint(keys[3], (tokens,), 0, vocabulary)
    mask = jax.random.bernoulli(keys[4], 0.6, (tokens,)).at[0].set(True)
    return hidden, weight, bias, targets, mask, np.asarray(jax.random.normal(keys[5], (4, tokens)))


def in_float64(hidden, weight, bias, targets, softcap, temperature, g):
    """Values, and the gradients of Σ g · values, from all logits at once in float64."""
    hidden, weight, bias = (np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden, weight, bias))
    raw = hidden @ weight.T + bias
    squashed = raw if softcap is None else softcap * np.tanh(raw / softcap)
    slope = (np.ones_like(raw) if softcap is None else 1 - (squashed / softcap) ** 2) / temperature
    z = squashed / temperature
    log_z = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
    log_p = z - log_z[:, None]
    p, chosen = np.exp(log_p), np.eye(z.shape[1])[np.asarray(targets)]
    entropy = -(p * log_p).sum(1)
    values = {"logps": (log_p * chosen).sum(1), "entropy": entropy, "log_normalizer": log_z, "mean_logit": z.mean(1)}
    values["correct"] = z.argmax(1) == np.asarray(targets)
    dz = g[0][:, None] * (chosen - p) - g[1][:, None] * p * (log_p + entropy[:, None]) + g[2][:, None] * p
    draw = (dz + g[3][:, None] / z.shape[1]) * slope
    return values, {"hidden": draw @ weight, "weight": draw.T @ hidden, "bias": draw.sum(0)}


def by_kernel(body, hidden, weight, bias, targets, mask, softcap, temperature, g):
    options = logprob.Options(softcap, temperature, entropy=True, mean_logit=True, correct=True)

    def total(hidden, weight, bias):
        values = logprob.token_logps(options, interpreted(body), hidden, weight, bias, targets, mask)
        return sum(jnp.vdot(g[k], values[name]) for k, name in enumerate(NAMES)), values

    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(hidden, weight, bias)
    return values, dict(zip(("hidden", "weight", "bias"), gradients, strict=True))


def check(body, shape, softcap, temperature, dtype, *, mask=None, seed=0):
    hidden, weight, bias, targets, drawn, g = problem(*shape, dtype=dtype, seed=seed)
    mask = drawn if mask is None else mask
    actual, gradients = by_kernel(body, hidden, weight, bias, targets, mask, softcap, temperature, g)
    g = np.where(np.asarray(mask)[None], g, 0)
    expected, slopes = in_float64(hidden, weight, bias, targets, softcap, temperature, g)
    for name, value in expected.items():
        # exact inputs, float32 sums: the same bound for both dtypes
        np.testing.assert_allclose(actual[name], np.where(mask, value, 0), atol=3e-5, err_msg=name)
    for name, value in slopes.items():
        scale = max(np.abs(value).max(), 1e-3)
        # bfloat16 rounds the gradient of each logit, and the outcome, by at most 2**-9
        bound = 2e-5 if dtype == jnp.float32 or name == "bias" else 2**-7
        found_ = np.asarray(gradients[name].astype(jnp.float32))
        assert gradients[name].dtype == (jnp.float32 if name == "bias" else dtype)
        np.testing.assert_allclose(found_, value, atol=bound * scale, err_msg=name)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_float64(body, shape):
    check(body, shape, 3.0, 0.7, jnp.float32)


# Three row tiles of which 3, 2 or 1 hold a token that counts; three column tiles, or the one whose gradient in HBM is
# read and written in neighbouring steps.
@pytest.mark.parametrize("vocabulary, count", [(300, 300), (300, 150), (300, 20), (100, 300)])
def test_sums_over_many_row_tiles_in_hbm_equal_float64(vocabulary, count, monkeypatch):
    monkeypatch.setattr(logprob_tpu, "choose_tiles", lambda *args, **options: logprob_tpu.Tiles(128, 128))
    check("tpu", (300, 24, vocabulary), None, 1.0, jnp.float32, mask=jnp.arange(300) % 300 >= 300 - count)


def test_a_vocabulary_in_several_chunks_and_runs_equals_float64(monkeypatch):
    monkeypatch.setattr(logprob_gpu, "CHUNK_LOGITS", 256 * 128)
    monkeypatch.setattr(logprob_gpu, "choose_tiles", lambda *args: logprob_gpu.Tiles(128, 128, 32, run=2))
    assert logprob_gpu.chunk_columns(256, 700, logprob_gpu.choose_tiles()) == 128
    check("gpu", (150, 40, 700), 3.0, 0.7, jnp.float32)


@pytest.mark.parametrize("body", BODIES)
def test_bfloat16_loses_only_its_own_rounding(body):
    check(body, (150, 40, 300), None, 1.0, jnp.bfloat16)


@pytest.mark.parametrize("body", BODIES)
def test_a_batch_without_a_token_that_counts_is_zero_and_has_no_gradient(body):
    check(body, (150, 40, 300), None, 1.0, jnp.float32, mask=jnp.zeros(150, bool))


@settings(FEW)
@given(
    body=st.sampled_from(BODIES),
    shape=st.tuples(st.integers(1, 270), st.integers(1, 140), st.integers(2, 400)),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_float64(body, shape, softcap, temperature, dtype, seed):
    check(body, shape, softcap, temperature, dtype, seed=seed)


def every_logp(body, hidden, weight):
    """[vocabulary]: the log-probability of every token after the one hidden state."""
    vocabulary = weight.shape[0]
    rows = jnp.broadcast_to(hidden[None, :], (vocabulary, hidden.size))
    options, everything = logprob.Options(entropy=True), jnp.ones(vocabulary, bool)
    return logprob.token_logps(options, interpreted(body), rows, weight, None, jnp.arange(vocabulary), everything)


@settings(FEW)
@given(
    body=st.sampled_from(BODIES),
    vocabulary=st.sampled_from([3, 200, 300]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 3e3]),
    seed=st.integers(0, 99),
)
def test_every_log_probability_is_at_most_zero_and_their_exponentials_sum_to_one(body, vocabulary, scale, seed):
    hidden, weight, *_ = problem(1, 16, vocabulary, seed=seed)
    actual = every_logp(body, scale * hidden[0], weight)
    assert float(actual["logps"].max()) <= 0.0
    np.testing.assert_allclose(
        np.exp(np.asarray(actual["logps"], np.float64)).sum(), 1.0, atol=1e-4 * max(1, scale / 30)
    )
    assert -1e-3 <= float(actual["entropy"].min()) <= float(actual["entropy"].max()) <= np.log(vocabulary) + 1e-5


@pytest.mark.parametrize("body", BODIES)
def test_a_certain_token_has_log_probability_zero_exactly(body):
    weight = jnp.zeros((200, 4)).at[150, 0].set(1.0)
    logps = every_logp(body, jnp.array([1e4, 0, 0, 0]), weight)["logps"]
    assert float(logps[150]) == 0.0 and float(logps[0]) == -1e4


@pytest.mark.parametrize("body", BODIES)
def test_nan_and_a_target_that_is_no_token_come_out_as_nan(body):
    hidden, weight, bias, targets, _, _ = problem(6, 8, 200)
    dirty, outside = hidden.at[2, 3].set(jnp.nan), targets.at[4].set(200).at[5].set(-100)
    run = functools.partial(logprob.token_logps, logprob.Options(), interpreted(body), mask=jnp.ones(6, bool))
    actual = run(hidden=dirty, weight=weight, bias=bias, targets=outside)["logps"]
    np.testing.assert_array_equal(np.isnan(actual), [False, False, True, False, True, True])
    actual = run(hidden=hidden, weight=weight.at[150, 0].set(jnp.nan), bias=bias, targets=targets)["logps"]
    assert bool(jnp.all(jnp.isnan(actual)))


def test_a_tie_with_an_earlier_token_of_another_tile_is_not_top_one():
    weight = jnp.zeros((300, 4)).at[2, 0].set(1.0).at[290, 0].set(1.0)
    for body in BODIES:
        options = logprob.Options(correct=True)
        arguments = jnp.ones((2, 4)), weight, None, jnp.array([290, 2]), jnp.ones(2, bool)
        actual = logprob.token_logps(options, interpreted(body), *arguments)
        np.testing.assert_array_equal(actual["correct"], [False, True])


@pytest.mark.parametrize("vmem", [64 * MIB, 128 * MIB])
@pytest.mark.parametrize("width, vocabulary", [(1024, 151_936), (2304, 256_000), (4096, 128_256), (8192, 128_256)])
def test_tiles_fit_vmem_and_are_tall_enough_to_be_bound_by_the_matrix_unit(vmem, width, vocabulary):
    chip = Target("tpu", vmem)
    for backward in (False, True):
        tiles = logprob_tpu.choose_tiles(8192, vocabulary, width, 2, chip, backward=backward)
        assert logprob_tpu.vmem_bytes(tiles, width, 2, backward=backward) <= vmem * 3 / 4
        # operations a byte of HBM, against 166 on v5p (64 MiB) and 240 on v5e; v6e's 560 from 128 MiB up to width 4096
        intensity = 0.6 * tiles.rows if backward else tiles.rows
        assert intensity > (166 if vmem == 64 * MIB else 560 if width <= 4096 else 240) or (width, vmem) == (
            8192,
            64 * MIB,
        )
    assert logprob_gpu.shared_bytes(logprob_gpu.choose_tiles(2, Target("gpu", SHARED_MEMORY)), 2) == 96 * 1024


def test_what_no_tile_fits_has_no_kernel():
    assert logprob.supports(8192, 128_256, 16_384, 2, Target("tpu", 128 * MIB))
    assert not logprob.supports(8192, 128_256, 16_384, 2, Target("tpu", 16 * MIB))
    assert not logprob.supports(8192, 128_256, 4096, 2, Target("cpu", 0))
