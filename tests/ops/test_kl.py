import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.kernels import front
from jaxalign.models.places import make_mesh
from jaxalign.ops.kl import k1, k2, k3, token_kl, token_kl_of_logits
from jaxalign.ops.mesh import Shards
from jaxalign.types import Unembedding

B, T, D, R, V = 2, 8, 16, 12, 48
IMPLEMENTATIONS = ["reference", "chunked", "pallas"]


def problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)

    def draw(k, *shape):
        return jax.random.normal(keys[k], shape)

    sides = draw(0, B, T, D) / 4, Unembedding(draw(1, V, D)), draw(2, B, T, R) / 4, Unembedding(draw(3, V, R))
    return sides, jax.random.bernoulli(keys[4], 0.7, (B, T))


def log_softmax(hidden, unembedding):
    return jax.nn.log_softmax(hidden @ unembedding.weight.T, axis=-1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_the_sum_over_the_vocabulary_of_p_log_p_over_q(implementation):
    (hidden, unembedding, ref_hidden, ref_unembedding), mask = problem()
    log_p, log_q = log_softmax(hidden, unembedding), log_softmax(ref_hidden, ref_unembedding)
    actual = token_kl(hidden, unembedding, ref_hidden, ref_unembedding, mask=mask, implementation=implementation)
    exact = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    np.testing.assert_allclose(actual, jnp.where(mask, exact, 0), atol=1e-5)
    assert float(actual.min()) >= 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_zero_and_so_is_its_gradient_where_policy_and_reference_agree(implementation):
    (hidden, unembedding, _, _), _ = problem(1)

    def total(h, u):
        return token_kl(h, u, hidden, unembedding, implementation=implementation).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, unembedding)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_two_tokens_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log 3/2 + 1/4 log 1/2
    one, weight = jnp.ones((1, 1)), jnp.array([[np.log(3.0)], [0.0]], jnp.float32)
    actual = token_kl(one, Unembedding(weight), one, Unembedding(jnp.zeros((2, 1))))
    np.testing.assert_allclose(actual, [0.75 * np.log(1.5) + 0.25 * np.log(0.5)], atol=1e-6)


@pytest.mark.parametrize("estimator, exact", [(k1, True), (k3, True), (k2, False)])
def test_k1_and_k3_have_the_kl_as_their_mean_under_the_policy_and_k2_has_not(estimator, exact):
    sides, _ = problem(2)
    log_p, log_q = log_softmax(*sides[:2]), log_softmax(*sides[2:])
    mean = jnp.sum(jnp.exp(log_p) * estimator(log_p - log_q), axis=-1)
    error = float(jnp.abs(mean - token_kl(*sides)).max())
    assert error < 1e-5 if exact else error > 1e-2


def test_k2_and_k3_are_never_negative_and_exact_near_zero():
    log_ratio = jnp.array([-3.0, -1e-4, 0.0, 1e-4, 3.0])
    for estimator in (k2, k3):
        actual = np.asarray(estimator(log_ratio), np.float64)
        assert (actual >= 0).all() and actual[2] == 0
        # both are x²/2 to second order; exp(-x) - 1 + x in float32 would be off by 6e-8, ten times the value
        np.testing.assert_allclose(actual[[1, 3]], 5e-9, rtol=2e-3, err_msg=estimator.__name__)


def test_gradients_of_the_estimators_have_the_means_that_they_claim():
    sides, _ = problem(3)
    z, log_q = sides[0] @ sides[1].weight.T, log_softmax(*sides[2:])

    def mean_of_gradient(estimator):
        p = jax.lax.stop_gradient(jax.nn.softmax(z))
        return jax.grad(lambda z: jnp.sum(p * estimator(jax.nn.log_softmax(z) - log_q)))(z)

    forward = jax.grad(lambda z: jnp.sum(jnp.exp(log_q) * (log_q - jax.nn.log_softmax(z))))(z)
    reverse = jax.grad(lambda z: token_kl_of_logits(z, log_q).sum())(z)
    for estimator, expected in [(k1, jnp.zeros_like(z)), (k2, reverse), (k3, forward)]:
        np.testing.assert_allclose(mean_of_gradient(estimator), expected, atol=1e-5, err_msg=estimator.__name__)


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_gradients_equal_those_of_the_reference_implementation(implementation):
    sides, mask = problem(4)
    weights = jax.random.normal(jax.random.key(9), (B, T))

    def gradients(name):
        options = {"mask": mask, "temperature": 0.8, "implementation": name}
        return jax.grad(lambda *s: jnp.vdot(weights, token_kl(*s, **options)), argnums=(0, 1, 2, 3))(*sides)

    for actual, expected in zip(*(jax.tree.leaves(gradients(n)) for n in (implementation, "reference")), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_masked_may_be_nan_and_has_no_gradient(implementation):
    (hidden, unembedding, ref_hidden, ref_unembedding), mask = problem(5)

    def dirty(x):
        return jnp.where(mask[..., None], x, jnp.nan)

    def total(h):
        return token_kl(
            h, unembedding, dirty(ref_hidden), ref_unembedding, mask=mask, implementation=implementation
        ).sum()

    clean, gradient = jax.value_and_grad(total)(dirty(hidden))
    assert np.isfinite(float(clean)) and np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[~np.asarray(mask)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_logits_agrees_with_of_hidden_states(implementation):
    sides, mask = problem(6)
    logits, ref_logits = sides[0] @ sides[1].weight.T, sides[2] @ sides[3].weight.T
    actual = token_kl_of_logits(logits, ref_logits, mask=mask, implementation=implementation)
    np.testing.assert_allclose(actual, token_kl(*sides, mask=mask), atol=2e-5)


@pytest.mark.parametrize(
    "implementation, sizes",
    [("chunked", (2, 2, 2)), ("chunked", (1, 4, 2)), ("pallas", (2, 4, 1)), ("pallas", (1, 2, 4))],
)
def test_rows_and_vocabulary_cut_over_eight_devices_change_nothing(implementation, sizes, monkeypatch):
    monkeypatch.setattr(front, "WORTH_A_CHOICE", 0)
    mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    keys = jax.random.split(jax.random.key(7), 6)
    hidden, ref_hidden = jax.random.normal(keys[0], (8, 5, D)), jax.random.normal(keys[1], (8, 5, R))
    weight, ref_weight = jax.random.normal(keys[2], (V, D)), jax.random.normal(keys[3], (V, R))
    mask, bias = jax.random.bernoulli(keys[4], 0.6, (8, 5)), jax.random.normal(keys[5], (V,))
    weights = jnp.arange(40.0).reshape(8, 5)

    def loss(hidden, ref_hidden, weight, ref_weight, shards=None, implementation="reference"):
        options = {"mask": mask, "shards": shards, "implementation": implementation, "vocabulary_chunk": 16}
        value = token_kl(hidden, Unembedding(weight, bias), ref_hidden, Unembedding(ref_weight, None, 4.0), **options)
        return jnp.vdot(weights, value) / 100

    arrays = hidden, ref_hidden, weight, ref_weight
    plain = jax.value_and_grad(loss, argnums=(0, 2))(*arrays)
    specs = [P(("data", "fsdp"))] * 2 + [P("tensor", "fsdp")] * 2
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
    sharded = jax.jit(jax.value_and_grad(lambda *a: loss(*a, Shards(mesh), implementation), argnums=(0, 2)))(*placed)
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(two, one, atol=2e-5)


def test_wrong_choices_are_named():
    (hidden, unembedding, ref_hidden, _), _ = problem()
    with pytest.raises(ValueError, match="implementation='palas' is not one of"):
        token_kl(hidden, unembedding, hidden, unembedding, implementation="palas")
    with pytest.raises(ValueError, match=r"temperature=0.0 must be positive"):
        token_kl(hidden, unembedding, hidden, unembedding, temperature=0.0)
    with pytest.raises(ValueError, match="48 tokens and the reference's 50"):
        token_kl(hidden, unembedding, ref_hidden, Unembedding(jnp.zeros((50, R))))
    shards = Shards(make_mesh(fsdp=8))
    with pytest.raises(ValueError, match=r"6 rows cannot be cut over the 8 devices of the mesh axes"):
        token_kl(hidden[:, :3], unembedding, hidden[:, :3], unembedding, implementation="pallas", shards=shards)
