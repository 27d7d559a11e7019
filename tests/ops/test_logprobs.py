import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.kernels import front
from jaxalign.ops import logprobs_chunked
from jaxalign.ops.logprobs import next_token_logps, token_logps
from jaxalign.ops.logprobs_chunked import default_chunk
from jaxalign.types import Unembedding

N, D, V = 13, 8, 37
EXTRAS = {"entropy": True, "log_normalizer": True, "mean_logit": True, "correct": True}


def problem(seed=0, *, softcap=None, bias=False, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = (2 * jax.random.normal(keys[0], (N, D))).astype(dtype)
    weight = jax.random.normal(keys[1], (V, D))
    unembedding = Unembedding(weight, jax.random.normal(keys[2], (V,)) if bias else None, softcap)
    return hidden, unembedding, jax.random.randint(keys[3], (N,), 0, V), jax.random.bernoulli(keys[4], 0.7, (N,))


def by_hand(hidden, unembedding, targets, temperature):
    """float64, one token at a time."""
    out = {"logps": [], "entropy": [], "log_normalizer": [], "mean_logit": [], "correct": []}
    for h, target in zip(np.asarray(hidden, np.float64), np.asarray(targets), strict=True):
        z = np.asarray(unembedding.weight, np.float64) @ h
        if unembedding.bias is not None:
            z = z + np.asarray(unembedding.bias, np.float64)
        if unembedding.softcap is not None:
            z = unembedding.softcap * np.tanh(z / unembedding.softcap)
        z = z / temperature
        log_z = np.log(np.sum(np.exp(z - z.max()))) + z.max()
        p = np.exp(z - log_z)
        out["logps"].append(z[target] - log_z)
        out["entropy"].append(-np.sum(p * np.log(p)))
        out["log_normalizer"].append(log_z)
        out["mean_logit"].append(z.mean())
        out["correct"].append(z.argmax() == target)
    return {name: np.array(values) for name, values in out.items()}


@pytest.mark.parametrize(
    "implementation, chunk", [("reference", None), ("chunked", 16), ("chunked", 37), ("chunked", 5)]
)
@pytest.mark.parametrize("softcap, bias, temperature", [(None, False, 1.0), (3.0, True, 0.7)])
def test_values_equal_a_float64_loop(implementation, chunk, softcap, bias, temperature):
    hidden, unembedding, targets, mask = problem(softcap=softcap, bias=bias)
    options = {"temperature": temperature, "implementation": implementation, "vocabulary_chunk": chunk}
    actual = token_logps(hidden, unembedding, targets, mask=mask, **EXTRAS, **options)
    for name, expected in by_hand(hidden, unembedding, targets, temperature).items():
        np.testing.assert_allclose(getattr(actual, name), np.where(mask, expected, 0), atol=2e-5, err_msg=name)


def scalar(options, weights, hidden, unembedding, targets, mask):
    actual = token_logps(hidden, unembedding, targets, mask=mask, **options)
    return sum(jnp.vdot(w, x) for w, x in zip(weights, actual[:4], strict=True) if x is not None)


@pytest.mark.parametrize("extra", ["none", "entropy", "log_normalizer", "mean_logit", "all"])
@pytest.mark.parametrize("softcap, bias, temperature", [(None, False, 1.0), (3.0, True, 0.7)])
def test_the_chunked_gradient_equals_autodiff_of_the_reference(extra, softcap, bias, temperature):
    hidden, unembedding, targets, mask = problem(1, softcap=softcap, bias=bias)
    extras = {name: extra in (name, "all") for name in ("entropy", "log_normalizer", "mean_logit")}
    weights = jax.random.normal(jax.random.key(9), (4, N))
    outcomes = []
    for implementation in ("reference", "chunked"):
        options = {**extras, "temperature": temperature, "implementation": implementation, "vocabulary_chunk": 16}

        def function(h, u, options=options):
            return scalar(options, weights, h, u, targets, mask)

        outcomes.append(jax.grad(function, argnums=(0, 1))(hidden, unembedding))
    for expected, actual in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8, N])
def test_tokens_that_nobody_asks_about_are_left_out_and_change_nothing(monkeypatch, count):
    hidden, unembedding, targets, _ = problem(5, softcap=3.0, bias=True)
    mask = jnp.zeros(N, bool).at[jax.random.permutation(jax.random.key(count), N)[:count]].set(True)
    weights, outcomes = jax.random.normal(jax.random.key(9), (4, N)), []
    for worth in (0, 2**62):
        monkeypatch.setattr(front, "WORTH_A_CHOICE", worth)
        options = {"entropy": True, "log_normalizer": True, "mean_logit": True, "vocabulary_chunk": 16}
        values = token_logps(hidden, unembedding, targets, mask=mask, correct=True, **options)

        def function(h, u, options=options):
            return scalar(options, weights, h, u, targets, mask)

        outcomes.append((values, jax.grad(function, argnums=(0, 1))(hidden, unembedding)))
    for expected, actual in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_half_of_the_tokens_have_half_of_the_logits(monkeypatch):
    monkeypatch.setattr(front, "WORTH_A_CHOICE", 0)
    seen = []
    monkeypatch.setattr(
        logprobs_chunked, "logits_tile", lambda *a, real=logprobs_chunked.logits_tile: seen.append(a) or real(*a)
    )
    hidden, unembedding, targets, _ = problem()
    mask = jnp.arange(N) % 2 == 0
    with jax.disable_jit():
        token_logps(hidden, unembedding, targets, mask=mask, vocabulary_chunk=V)
    assert [len(tile[2]) for tile in seen] == [7]  # of 13


def test_zero_logits_have_log_v_everywhere():
    actual = token_logps(jnp.zeros((2, D)), Unembedding(jnp.ones((V, D))), jnp.array([0, 3]), **EXTRAS)
    np.testing.assert_allclose(actual.logps, -np.log(V), atol=1e-6)
    np.testing.assert_allclose(actual.entropy, np.log(V), atol=1e-6)
    # all are equal, so the first is the most likely
    np.testing.assert_array_equal(actual.correct, [True, False])


def test_a_tie_with_an_earlier_token_of_another_tile_is_not_top_one():
    weight = jnp.zeros((V, D)).at[2, 0].set(1.0).at[30, 0].set(1.0)
    hidden = jnp.ones((2, D))
    actual = token_logps(hidden, Unembedding(weight), jnp.array([30, 2]), correct=True, vocabulary_chunk=16)
    np.testing.assert_array_equal(actual.correct, [False, True])


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_what_is_masked_may_be_nan_and_has_no_gradient(implementation):
    hidden, unembedding, targets, _ = problem(2)
    mask = jnp.arange(N) < 9
    dirty = jnp.where(mask[:, None], hidden, jnp.nan)
    options = {"entropy": True, "implementation": implementation}
    weights = jnp.ones((4, N))
    for h in (hidden, dirty):
        gradient = jax.grad(lambda h: scalar(options, weights, h, unembedding, targets, mask))(h)
        assert bool(jnp.all(jnp.isfinite(gradient))) and float(jnp.abs(gradient[9:]).max()) == 0.0
    np.testing.assert_array_equal(
        token_logps(dirty, unembedding, targets, mask=mask, **options).logps,
        token_logps(hidden, unembedding, targets, mask=mask, **options).logps,
    )


def test_large_logits_stay_finite():
    hidden, unembedding, targets, _ = problem(3)
    actual = token_logps(1e4 * hidden, unembedding, targets, entropy=True, vocabulary_chunk=16)
    assert bool(jnp.all(jnp.isfinite(actual.logps))) and bool(jnp.all(jnp.isfinite(actual.entropy)))
    assert float(actual.entropy.min()) >= -1e-3


def test_bfloat16_hidden_states_give_float32_log_probabilities_and_gradients_in_the_inputs_dtype():
    hidden, unembedding, targets, mask = problem(4, dtype=jnp.bfloat16)
    actual = token_logps(hidden, unembedding, targets, mask=mask, vocabulary_chunk=16)
    assert actual.logps.dtype == jnp.float32
    rounded = Unembedding(unembedding.weight.astype(jnp.bfloat16).astype(jnp.float32))
    exact = by_hand(hidden.astype(jnp.float32), rounded, targets, 1.0)["logps"]
    np.testing.assert_allclose(actual.logps, np.where(mask, exact, 0), atol=1e-4)
    d_hidden, d_unembedding = jax.grad(lambda h, u: token_logps(h, u, targets, mask=mask).logps.sum(), argnums=(0, 1))(
        hidden, unembedding
    )
    assert d_hidden.dtype == jnp.bfloat16 and d_unembedding.weight.dtype == jnp.float32


def test_next_token_logps_are_about_the_token_of_the_same_index():
    keys = jax.random.split(jax.random.key(5), 3)
    hidden, tokens = jax.random.normal(keys[0], (2, 6, D)), jax.random.randint(keys[1], (2, 6), 0, V)
    unembedding = Unembedding(jax.random.normal(keys[2], (V, D)))
    mask = jnp.ones((2, 6), bool).at[1, 4:].set(False)
    actual = next_token_logps(hidden, unembedding, tokens, mask).logps
    all_logps = jax.nn.log_softmax(hidden @ unembedding.weight.T)
    for b, t in [(0, 1), (0, 5), (1, 3)]:
        np.testing.assert_allclose(actual[b, t], all_logps[b, t - 1, tokens[b, t]], rtol=1e-5)
    np.testing.assert_array_equal(actual[:, 0], 0)
    np.testing.assert_array_equal(actual[1, 4:], 0)


@pytest.mark.parametrize("spec", [P("tensor", None), P(None, "fsdp"), P("tensor", "fsdp")])
def test_a_sharded_vocabulary_or_width_changes_nothing(spec):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(6), 3)
    hidden, weight = jax.random.normal(keys[0], (16, D)), jax.random.normal(keys[1], (40, D))
    targets = jax.random.randint(keys[2], (16,), 0, 40)

    def loss(h, w):
        return -token_logps(h, Unembedding(w), targets, entropy=True, vocabulary_chunk=16).logps.mean()

    plain = jax.value_and_grad(loss, argnums=(0, 1))(hidden, weight)
    placed = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, spec)
    sharded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=placed)(hidden, weight)
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_tile_holds_about_four_million_logits():
    assert default_chunk(2048, 8192) == 2048
    assert default_chunk(8192, 128_256) == 512
    assert default_chunk(10**6, 128_256) == 512
    assert default_chunk(64, 361) == 361


def test_wrong_choices_are_named():
    hidden, unembedding, targets, _ = problem()
    with pytest.raises(ValueError, match="implementation='palas' is not one of"):
        token_logps(hidden, unembedding, targets, implementation="palas")
    with pytest.raises(ValueError, match=r"temperature=0.0 must be positive"):
        token_logps(hidden, unembedding, targets, temperature=0.0)
