"""The losses of reinforcement learning: hand-worked numbers, where the gradient is, and where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses.policy import (
    POLICY_LOSSES,
    cispo,
    ppo_clip,
    reinforce,
    sequence_logps,
    truncated_weights,
    value_clip,
)

LOG = jnp.log


def gradient(loss, logps, *rest, **options):
    return jax.grad(lambda x: jnp.sum(loss(x, *rest, **options)))(logps)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2: raised enough
        (0.5, 2.0, -1.0, -1.0),  # too unlikely for a good token: the gradient stays
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8: lowered enough
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_surrogate_and_its_gradient(ratio, advantage, loss, slope):
    logps, old, advantages = LOG(jnp.array([ratio])), jnp.zeros(1), jnp.array([advantage])
    np.testing.assert_allclose(ppo_clip(logps, old, advantages), [loss], rtol=1e-6)
    np.testing.assert_allclose(gradient(ppo_clip, logps, old, advantages), [slope], rtol=1e-6, atol=1e-7)


def test_clip_higher_leaves_room_above_alone_and_dual_clip_bounds_what_a_large_ratio_costs():
    logps, old = LOG(jnp.array([1.25, 1.25, 5.0])), jnp.zeros(3)
    advantages = jnp.array([1.0, -1.0, -1.0])
    losses = ppo_clip(logps, old, advantages, clip_epsilon_high=0.3, dual_clip=3.0)
    np.testing.assert_allclose(losses, [-1.25, 1.25, 3.0], rtol=1e-6)
    slopes = gradient(ppo_clip, logps, old, advantages, clip_epsilon_high=0.3, dual_clip=3.0)
    np.testing.assert_allclose(slopes, [-1.25, 1.25, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_ratio_one_every_loss_has_the_gradient_of_reinforce(name):
    logps, advantages = jnp.array([-0.3, -2.0, -7.0]), jnp.array([1.5, -0.5, 0.0])
    np.testing.assert_allclose(gradient(POLICY_LOSSES[name], logps, logps, advantages), -advantages, rtol=1e-6)


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    logps = LOG(jnp.array([0.5, 0.9]))
    old = logps - LOG(jnp.array([4.0, 0.1]))  # ratios 4 and 0.1
    advantages = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(gradient(cispo, logps, old, advantages), [-1.28, 0.2], rtol=1e-5)


def test_reinforce_weighs_tokens_of_an_older_policy_by_their_ratio():
    logps, old, advantages = LOG(jnp.array([0.4])), LOG(jnp.array([0.2])), jnp.array([3.0])
    np.testing.assert_allclose(reinforce(logps, old, advantages), [-6.0], rtol=1e-6)
    np.testing.assert_allclose(gradient(reinforce, logps, old, advantages), [-6.0], rtol=1e-6)


def test_a_sequence_has_one_ratio_the_geometric_mean_of_its_tokens():
    ratios, mask = jnp.array([[2.0, 8.0, 9.0], [1.0, 0.25, 7.0]]), jnp.array([[True, True, False]] * 2)
    old = jnp.full((2, 3), -1.0)
    shared = sequence_logps(old + LOG(ratios), old, mask)
    np.testing.assert_allclose(jnp.exp(shared - old)[:, :2], [[4.0, 4.0], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: sequence_logps(x, old, mask).sum())(old), jnp.ones((2, 3)))


def test_the_value_loss_takes_the_worse_of_the_value_and_the_clipped_one():
    values, old, returns = jnp.array([1.0, 1.0, 0.1]), jnp.array([0.0, 0.0, 0.0]), jnp.array([1.0, 3.0, 1.0])
    np.testing.assert_allclose(value_clip(values, old, returns), [0.32, 3.92, 0.405], rtol=1e-6)
    np.testing.assert_allclose(value_clip(values, old, returns, clip_epsilon=None), [0.0, 2.0, 0.405], atol=1e-7)
    slopes = jax.grad(lambda v: value_clip(v, old, returns).sum())(values)
    np.testing.assert_allclose(slopes, [0.0, 0.0, -0.9], atol=1e-6)


def test_extreme_log_probs_of_masked_tokens_are_the_callers_to_drop_and_others_are_finite():
    logps, old = jnp.array([-1e4, 0.0]), jnp.array([0.0, -80.0])
    for loss in POLICY_LOSSES.values():
        assert np.isfinite(loss(logps, old, jnp.array([1.0, -1.0]))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_epsilon": 1.0}, r"must be in \(0, 1\)"),
        ({"clip_epsilon_high": 0.0}, "clip_epsilon_high=0.0 above 0"),
        ({"dual_clip": 1.0}, "must be above 1"),
    ],
)
def test_a_clip_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ppo_clip(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), **options)


def test_weights_turn_means_over_a_nucleus_into_sums_over_its_part_of_the_policy():
    """π = (.5, .3, .2), q its nucleus of mass 0.8: q = (.625, .375). Σ q w f is Σ π f without the token never drawn."""
    policy, nucleus, values = jnp.array([0.5, 0.3]), jnp.array([0.625, 0.375]), jnp.array([2.0, 10.0])
    weights = truncated_weights(LOG(policy), LOG(nucleus), 2.0)
    np.testing.assert_allclose(weights, [0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(nucleus * weights * values), 0.5 * 2 + 0.3 * 10, rtol=1e-6)
    np.testing.assert_allclose(truncated_weights(LOG(jnp.array([0.9])), LOG(jnp.array([0.1])), 2.0), [2.0])
