import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses.ranking import (
    bradley_terry,
    graded_bradley_terry,
    kwise,
    process,
    process_mse,
    rao_kupper,
    soft_bradley_terry,
)

ZERO = jnp.zeros(1)
HIGH, LOW = jnp.array([2.0]), jnp.array([0.5])
NO, YES = jnp.array([False]), jnp.array([True])


def test_equal_scores_cost_log_2():
    np.testing.assert_allclose(bradley_terry(ZERO, ZERO), [np.log(2)], rtol=1e-6)


def test_bradley_terry_by_hand():
    np.testing.assert_allclose(bradley_terry(HIGH, LOW), [np.log1p(np.exp(-1.5))], rtol=1e-6)
    np.testing.assert_allclose(bradley_terry(HIGH, LOW, margin=1.5), [np.log(2)], rtol=1e-6)


def test_centering_costs_the_squared_sum_and_is_off_by_default():
    difference = bradley_terry(HIGH, LOW, centering_coef=0.01) - bradley_terry(HIGH, LOW)
    np.testing.assert_allclose(difference, [0.01 * 2.5**2], rtol=1e-4)
    np.testing.assert_allclose(bradley_terry(HIGH + 7, LOW + 7), bradley_terry(HIGH, LOW), rtol=1e-5)


def test_margins_and_soft_labels_that_say_nothing_are_bradley_terry():
    plain = bradley_terry(HIGH, LOW)
    np.testing.assert_allclose(graded_bradley_terry(HIGH, LOW, ZERO), plain, rtol=1e-6)
    np.testing.assert_allclose(soft_bradley_terry(HIGH, LOW, jnp.ones(1)), plain, rtol=1e-6)
    np.testing.assert_allclose(rao_kupper(HIGH, LOW, NO, theta=1.0), plain, rtol=1e-6)
    smoothed = bradley_terry(HIGH, LOW, label_smoothing=0.3)
    np.testing.assert_allclose(soft_bradley_terry(HIGH, LOW, jnp.array([0.7])), smoothed, rtol=1e-6)


@pytest.mark.parametrize("theta", [1.5, 3.0])
def test_win_loss_and_tie_are_all_that_can_happen(theta):
    chances = [rao_kupper(HIGH, LOW, NO, theta=theta), rao_kupper(LOW, HIGH, NO, theta=theta)]
    chances.append(rao_kupper(HIGH, LOW, YES, theta=theta))
    np.testing.assert_allclose(sum(np.exp(-x) for x in chances), [1.0], rtol=1e-6)


def test_equal_scores_tie_half_the_time_with_theta_three():
    np.testing.assert_allclose(rao_kupper(ZERO, ZERO, YES), [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(rao_kupper(ZERO, ZERO, NO), [np.log(4)], rtol=1e-6)


def test_a_tie_draws_unequal_scores_together():
    slope = jax.grad(lambda x: rao_kupper(x, LOW, YES).sum())(HIGH)
    assert slope[0] > 0


def test_two_candidates_are_one_pair_of_bradley_terry():
    scores, ranks = jnp.array([[0.5, 2.0]]), jnp.array([[1, 0]])
    np.testing.assert_allclose(kwise(scores, ranks, jnp.ones((1, 2), bool)), bradley_terry(HIGH, LOW), rtol=1e-6)


def test_missing_candidates_and_equal_ranks_are_no_pairs():
    scores = jnp.array([[2.0, 0.5, 9.0], [2.0, 0.5, 0.5], [1.0, 2.0, 3.0]])
    ranks = jnp.array([[0, 1, 2], [0, 1, 1], [0, 0, 0]])
    candidates = jnp.array([[True, True, False], [True, True, True], [True, True, True]])
    one = float(bradley_terry(HIGH, LOW)[0])
    np.testing.assert_allclose(kwise(scores, ranks, candidates), [one, one, 0.0], rtol=1e-6)


def test_steps_cost_log_2_or_a_quarter_without_an_opinion():
    labels = jnp.array([[1, 0, 1]])
    np.testing.assert_allclose(process(jnp.zeros((1, 3)), labels), np.full((1, 3), np.log(2)), rtol=1e-6)
    np.testing.assert_allclose(process_mse(jnp.zeros((1, 3)), labels), np.full((1, 3), 0.25), rtol=1e-6)


@pytest.mark.parametrize("away", [1e4, -1e4])
def test_extreme_scores_stay_finite(away):
    losses = [
        lambda x: bradley_terry(x, ZERO, label_smoothing=0.1),
        lambda x: rao_kupper(x, ZERO, YES),
        lambda x: kwise(jnp.stack([x, -x], 1), jnp.array([[0, 1]]), jnp.ones((1, 2), bool)),
        lambda x: process(x, jnp.ones(1)),
        lambda x: process_mse(x, jnp.ones(1)),
    ]
    for loss in losses:
        total, slope = jax.value_and_grad(lambda x, loss=loss: loss(x).sum())(jnp.array([away]))
        assert np.isfinite(total) and np.isfinite(slope).all()
