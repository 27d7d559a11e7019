import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.kernels import gae as kernel
from jaxalign.kernels.runtime import interpreted
from jaxalign.ops.advantages import (
    batch_advantages,
    decoupled_advantages,
    gae,
    group_advantages,
    leave_one_out,
    returns,
    shaped_rewards,
)

IMPLEMENTATIONS = ["scan", "associative", "matmul", "pallas"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def by_hand(rewards, values, mask, gamma, gae_lambda):
    """float64, one True position at a time."""
    advantages = np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        advantage = value = 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            advantage = rewards[b, t] + gamma * value - values[b, t] + gamma * gae_lambda * advantage
            value, advantages[b, t] = values[b, t], advantage
    return advantages


def gradients_by_hand(g, mask, gamma, gae_lambda):
    d_rewards, d_values = np.zeros(g.shape), np.zeros(g.shape)
    for b in range(g.shape[0]):
        before = 0.0
        for t in np.flatnonzero(mask[b]):
            d_rewards[b, t] = g[b, t] + gamma * gae_lambda * before
            d_values[b, t] = gamma * before - d_rewards[b, t]
            before = d_rewards[b, t]
    return d_rewards, d_values


@every_implementation
def test_gae_with_lambda_one_is_return_minus_value(implementation):
    rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.2, 0.5, 0.1]])
    options = {"gamma": 0.5, "gae_lambda": 1.0, "implementation": implementation}
    advantages = gae(rewards, values, jnp.ones((1, 3), bool), **options)
    np.testing.assert_allclose(advantages, [[0.25 - 0.2, 0.5 - 0.5, 1.0 - 0.1]], atol=1e-6)


@every_implementation
def test_gae_with_lambda_zero_is_the_td_error(implementation):
    rewards, values = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[0.2, 0.5, 0.1]])
    options = {"gamma": 0.9, "gae_lambda": 0.0, "implementation": implementation}
    advantages = gae(rewards, values, jnp.ones((1, 3), bool), **options)
    np.testing.assert_allclose(advantages, [[1 + 0.45 - 0.2, 2 + 0.09 - 0.5, 3 - 0.1]], atol=1e-6)


@every_implementation
def test_four_tokens_with_a_hole_by_hand(implementation):
    # γ = 1/2, λ = 1/2. The hole's reward and value are not there: token 1 sees token 3's value and advantage.
    #   t = 3: δ = 4 - 1 = 3                A = 3
    #   t = 1: δ = 1 + 1/2 · 1 - 2 = -1/2   A = -1/2 + 1/4 · 3 = 1/4
    #   t = 0: δ = 0 + 1/2 · 2 - 1 = 0      A = 0 + 1/4 · 1/4 = 1/16
    mask = jnp.array([[True, True, False, True]])
    rewards, values = jnp.array([[0.0, 1.0, jnp.nan, 4.0]]), jnp.array([[1.0, 2.0, jnp.nan, 1.0]])
    advantages = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5, implementation=implementation)
    np.testing.assert_allclose(advantages, [[1 / 16, 1 / 4, 0, 3]], atol=1e-6)
    np.testing.assert_allclose(returns(advantages, values, mask), [[17 / 16, 9 / 4, 0, 4]], atol=1e-6)


@every_implementation
def test_an_all_masked_row_gives_zeros_and_no_gradient(implementation):
    mask = jnp.array([[True, True], [False, False]])
    rewards = values = jnp.where(mask, 1.0, jnp.nan)
    options = {"gamma": 1.0, "gae_lambda": 0.95, "implementation": implementation}

    def total(r, v):
        return gae(r, v, mask, **options).sum()

    np.testing.assert_array_equal(gae(rewards, values, mask, **options)[1], 0)
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(rewards, values):
        np.testing.assert_array_equal(gradient[1], 0)


@every_implementation
def test_padding_on_either_side_changes_nothing(implementation):
    keys = jax.random.split(jax.random.key(0), 2)
    rewards, values = (jax.random.normal(k, (2, 5)) for k in keys)
    mask, options = jnp.ones((2, 5), bool), {"gamma": 0.9, "gae_lambda": 0.8, "implementation": implementation}

    def pad(x):
        return jnp.pad(x, ((0, 0), (3, 130)))

    run = jax.jit(lambda r, v, m: gae(r, v, m, **options))
    padded = run(pad(rewards), pad(values), pad(mask))
    np.testing.assert_allclose(padded, pad(run(rewards, values, mask)), atol=1e-6)


def compare(function, b, t, gamma, gae_lambda, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    rewards, values, g = (jax.random.normal(k, (b, t)).astype(dtype) for k in keys[:3])
    mask = jax.random.bernoulli(keys[3], 0.7, (b, t))

    @jax.jit
    def both_ways(rewards, values, mask, g):
        options = {"gamma": gamma, "gae_lambda": gae_lambda}
        actual, pull = jax.vjp(lambda r, v: function(r, v, mask, **options), rewards, values)
        return actual, pull(g.astype(jnp.float32))

    actual, gradients = both_ways(rewards, values, mask, g)
    assert actual.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) for x in (rewards, values, g)]
    expected = by_hand(*exact[:2], np.asarray(mask), gamma, gae_lambda)
    # float32 sums of up to 1 / (1 - γλ) terms of order 1
    np.testing.assert_allclose(actual, expected, atol=3e-5)
    rounding = 3e-5 if dtype == jnp.float32 else 2**-7  # a gradient has its argument's dtype
    exact_gradients = gradients_by_hand(exact[2], np.asarray(mask), gamma, gae_lambda)
    for one, two in zip(gradients, exact_gradients, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(np.asarray(one, np.float64), two, atol=rounding, rtol=rounding)


FUNCTIONS = {
    **{name: lambda *a, name=name, **k: gae(*a, implementation=name, **k) for name in IMPLEMENTATIONS[:3]},
    **{body: lambda *a, body=body, **k: kernel.gae(*a, target=interpreted(body), **k) for body in ("tpu", "gpu")},
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("b, t", [(1, 1), (130, 333)])
def test_values_and_gradients_equal_a_float64_loop(name, b, t):
    compare(FUNCTIONS[name], b, t, 0.99, 0.95)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 1.0), (0.0, 0.5), (1.0, 0.0)])
def test_the_ends_of_gamma_and_lambda(name, gamma, gae_lambda):
    compare(FUNCTIONS[name], 3, 70, gamma, gae_lambda)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_rewards_give_float32_advantages(name):
    compare(FUNCTIONS[name], 4, 40, 0.95, 0.9, jnp.bfloat16)


@settings(max_examples=3, deadline=None)
@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    b=st.integers(1, 9),
    t=st.integers(1, 200),
    gamma=st.floats(0.0, 1.0),
    gae_lambda=st.floats(0.0, 0.97),
)
def test_any_shape_and_discount(name, b, t, gamma, gae_lambda):
    compare(FUNCTIONS[name], b, t, gamma, gae_lambda, seed=t)


@every_implementation
def test_rows_cut_over_eight_devices_change_nothing(implementation):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(1), 3)
    rewards, values = (jax.random.normal(k, (16, 9)) for k in keys[:2])
    mask, options = jax.random.bernoulli(keys[2], 0.7, (16, 9)), {"gamma": 0.9, "gae_lambda": 0.8}

    def loss(rewards, values, mask, **where):
        return jnp.sum(gae(rewards, values, mask, **options, **where) ** 2)

    plain = jax.value_and_grad(loss, argnums=(0, 1))(rewards, values, mask)
    placed = [jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp")))) for x in (rewards, values, mask)]
    on_mesh = functools.partial(loss, mesh=mesh, implementation=implementation)
    sharded = jax.jit(jax.value_and_grad(on_mesh, argnums=(0, 1)))(*placed)
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)


def test_the_score_is_on_the_last_real_token_and_the_kl_on_every_one():
    mask = jnp.array([[True, True, False, False], [False, True, True, True], [False, False, False, False]])
    kl = jnp.full((3, 4), 0.5)
    rewards = shaped_rewards(jnp.array([0.7, -0.4, 9.0]), kl, mask, kl_coef=0.2)
    expected = [[-0.1, 0.7 - 0.1, 0, 0], [0, -0.1, -0.1, -0.4 - 0.1], [0, 0, 0, 0]]
    np.testing.assert_allclose(rewards, expected, atol=1e-7)


def test_scores_are_not_truncated_by_the_dtype_of_the_kl():
    rewards = shaped_rewards(jnp.array([0.7]), jnp.zeros((1, 2), jnp.bfloat16), jnp.ones((1, 2), bool), kl_coef=0.1)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[0.0, 0.7]], atol=1e-7)


def test_wrong_choices_are_named():
    arrays = jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    with pytest.raises(ValueError, match=r"gae_lambda=1.5 is not in \[0, 1\]"):
        gae(*arrays, gamma=1.0, gae_lambda=1.5)
    with pytest.raises(ValueError, match="implementation='loop' is not one of"):
        gae(*arrays, gamma=1.0, gae_lambda=0.5, implementation="loop")


def test_a_groups_advantages_by_hand():
    scores = jnp.array([[1.0, 3.0, 5.0], [2.0, 2.0, 2.0]])
    np.testing.assert_allclose(group_advantages(scores, eps=0.0)[0], [-1.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(group_advantages(scores)[1], 0.0)
    np.testing.assert_allclose(group_advantages(scores, scale="none")[0], [-2.0, 0.0, 2.0])
    for scale, of in (("scores", scores), ("batch", [-2, 0, 2, 0, 0, 0])):
        expected = np.array([-2, 0, 2]) / np.std(np.asarray(of), ddof=1)
        np.testing.assert_allclose(group_advantages(scores, scale=scale, eps=0.0)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("advantages", "first"),
    [
        (functools.partial(group_advantages, scale="group"), [-0.7070, 0.7070]),
        (functools.partial(group_advantages, scale="batch"), [-0.9352, 0.9352]),  # REINFORCE++ with baseline
        (functools.partial(group_advantages, scale="scores"), [-0.0418, 0.0418]),  # TRL's scale_rewards="batch"
        (batch_advantages, [-1.2955, -1.2119]),  # REINFORCE++: (s - 15.5) / std, of all eight
    ],
)
def test_prompts_of_different_difficulty_move_advantages_only_where_they_should(advantages, first):
    scores = jnp.array([[0.0, 1.0], [10.0, 11.0], [20.0, 21.0], [30.0, 31.0]])
    np.testing.assert_allclose(advantages(scores)[0], first, atol=1e-4)


def test_the_advantages_of_a_batch_have_mean_0_and_variance_1_and_need_no_groups():
    scores = jnp.array([[1.0], [2.0], [6.0]])
    np.testing.assert_allclose(batch_advantages(scores, eps=0.0)[:, 0], np.array([-2, -1, 3]) / np.sqrt(7), rtol=1e-6)
    with pytest.raises(ValueError, match="draw 2 or more"):
        batch_advantages(scores[:1])


def test_rewards_normalised_one_by_one_tell_two_successes_from_one():
    """The sums' advantages are ±1/√2 in both groups; one by one they are ±1/√2 and ±2/√2, over their std √(5/3)."""
    scores = jnp.array([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(group_advantages(scores.sum(0))[:, 1], [0.7071, 0.7071], atol=2e-4)
    actual = decoupled_advantages(scores, jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(actual, np.array([[-1, 1], [-2, 2]]) * np.sqrt(0.3), atol=3e-4)
    scaled = decoupled_advantages(scores * jnp.array([1.0, 100.0])[:, None, None], jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(scaled, actual, atol=3e-4)


@pytest.mark.parametrize("score", [0.1, 0.7, 1234.567])
@pytest.mark.parametrize("count", [3, 7, 8])
def test_of_equal_scores_no_rounding_is_left_to_learn_from(score, count):
    """The float32 mean of eight times 0.7 is not 0.7, and Adam makes a full step of any gradient."""
    scores = jnp.full((2, count), score)
    for scale in ("group", "batch", "scores", "none"):
        assert not group_advantages(scores, scale=scale).any()
    assert not batch_advantages(scores).any()
    assert not leave_one_out(scores).any()
    assert not decoupled_advantages(scores[None], jnp.ones(1)).any()


def test_leave_one_out_is_the_score_less_the_mean_of_the_others():
    scores = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    expected = scores - (scores.sum(1, keepdims=True) - scores) / 4
    np.testing.assert_allclose(leave_one_out(jnp.asarray(scores)), expected, atol=1e-6)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="draw 2 or more"):
        group_advantages(jnp.zeros((3, 1)))
