"""Schedules, weight decay, clipping, and updates that are skipped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.config.shared import OptimizerConfig
from jaxalign.training.optimizer import adamw, is_matrix, learning_rate_schedule, partition, skipping


def constant(rate, **settings):
    """AdamW at one rate."""
    return adamw(OptimizerConfig(**settings), lambda update: rate)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1, 2, 3, 3, 3, 3]),
        ("linear", [1, 2, 3, 2.25, 1.5, 0.75]),
        ("cosine", [1, 2, 3, 2.5607, 1.5, 0.4393]),
    ],
)
def test_the_rate_rises_over_warmup_and_then_follows_its_schedule(schedule, expected):
    rate = learning_rate_schedule(OptimizerConfig(3.0, schedule, warmup_steps=2), steps=6)
    np.testing.assert_allclose([rate(n) for n in range(6)], expected, atol=1e-4)


def test_without_warmup_the_first_step_has_the_peak_rate_and_the_end_is_zero():
    rate = learning_rate_schedule(OptimizerConfig(3.0, "linear"), steps=4)
    np.testing.assert_allclose([rate(0), rate(4)], [3.0, 0.0])


def test_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"`optimizer.warmup_steps` 10: it must be below 10"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=10), steps=10)


def test_decay_is_for_matrices_only_and_the_layer_axis_does_not_count():
    params = {
        "embedding": jnp.ones((4, 2)),
        "norm": {"scale": jnp.ones(2)},
        "blocks": {"up": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    }
    expected = {
        "embedding": True,
        "norm": {"scale": False},
        "blocks": {"up": {"kernel": True, "bias": False}},
    }
    assert is_matrix(params) == expected


def test_one_update_by_hand():
    # |g| = 5 is clipped to 1: g = (0.6, 0.8). Adam's first update is -lr * sign(g); decay takes lr * 0.1 * w.
    config = OptimizerConfig(0.5, "constant", weight_decay=0.1, max_grad_norm=1.0)
    optimizer = adamw(config, learning_rate_schedule(config, steps=1))
    params = {"kernel": jnp.array([[2.0, 2.0]])}
    updates, _ = optimizer.update({"kernel": jnp.array([[3.0, 4.0]])}, optimizer.init(params), params)
    # 1 - 0.999 in float32 is off by 1.3e-5 of itself, and the bias correction inherits half of that.
    np.testing.assert_allclose(updates["kernel"], [[-0.5 - 0.1, -0.5 - 0.1]], rtol=1e-5)


@pytest.mark.parametrize("optimizer", [constant(0.1, weight_decay=0.1), skipping(optax.adam(0.1))])
def test_an_update_that_is_not_to_be_applied_changes_no_bit_and_counts_nothing(optimizer):
    params = {"kernel": jnp.array([[2.0, -1.0]])}
    update = jax.jit(optimizer.update)
    updates, state = update({"kernel": jnp.array([[3.0, 4.0]])}, optimizer.init(params), params, apply=jnp.bool_(True))
    assert updates["kernel"].all()
    bad = {"kernel": jnp.array([[jnp.nan, jnp.inf]])}
    updates, after = update(bad, state, params, apply=jnp.bool_(False))
    chex.assert_trees_all_equal(after, state)
    assert not updates["kernel"].any()


def test_updates_are_those_of_optax():
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.01))
    ours = constant(0.1, weight_decay=0.01)
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 4))}
    our_state, their_state = ours.init(params), theirs.init(params)
    for number in range(5):
        grads = {"kernel": jax.random.normal(jax.random.key(number + 1), (3, 4))}
        updates, our_state = ours.update(grads, our_state, params)
        expected, their_state = theirs.update(grads, their_state, params)
        np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-4)


def test_a_skipped_critic_and_policy_keep_their_own_moments():
    both = partition({"policy": constant(0.1), "critic": constant(0.2)})
    params = {"policy": {"kernel": jnp.ones((1, 2))}, "critic": {"kernel": jnp.ones((1, 2))}}
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = both.update(grads, both.init(params), params, apply=True)
    np.testing.assert_allclose(updates["critic"]["kernel"], 2 * updates["policy"]["kernel"])
    updates, after = both.update(jax.tree.map(lambda g: g * jnp.nan, grads), state, params, apply=False)
    chex.assert_trees_all_equal(after, state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("updates", [1, 3])
def test_no_second_copy_of_the_moments_is_ever_held(updates):
    """Temporary memory of a compiled step: the gradient and little else, though the update may have to be skipped."""
    optimizer, width = constant(0.1), 256
    params = {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)}
    state = params, jax.eval_shape(optimizer.init, params)

    def update(state, x):
        params, moments = state
        grads = jax.tree.map(lambda w: jnp.sin(w * x), params)
        step, moments = optimizer.update(grads, moments, params, apply=jnp.isfinite(optax.tree.norm(grads)))
        return (optax.apply_updates(params, step), moments), None

    xs = jax.ShapeDtypeStruct((updates,), jnp.float32)
    compiled = jax.jit(lambda state, xs: jax.lax.scan(update, state, xs), donate_argnums=0).lower(state, xs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * width**2
