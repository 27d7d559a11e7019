"""Sampling: tokens that may be drawn, how often each is, and their log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.sampling import categorical, crossing, keep_min_p, keep_top_k, keep_top_p, penalise, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


def test_top_k_keeps_the_k_largest():
    assert keep_top_k(LOGITS, 2).tolist() == [[True, True, False, False]]
    assert keep_top_k(LOGITS, 0).all() and keep_top_k(LOGITS, 9).all()


@pytest.mark.parametrize(("p", "count"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.81, 3), (0.999, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_holds_p(p, count):
    assert keep_top_p(LOGITS, p).sum() == count
    shuffled = LOGITS[:, jnp.array([2, 0, 3, 1])]
    assert np.array_equal(keep_top_p(shuffled, p), keep_top_p(LOGITS, p)[:, jnp.array([2, 0, 3, 1])])


@pytest.mark.parametrize("p", [0.01, 0.37, 0.9, 0.999])
def test_the_nucleus_found_without_sorting_is_the_one_found_by_sorting(p):
    logits = np.asarray(3 * jax.random.normal(jax.random.key(4), (16, 1000)))
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    ordered = -np.sort(-probs, axis=1)
    count = (np.cumsum(ordered, axis=1) < p).sum(axis=1) + 1
    assert np.array_equal(keep_top_p(jnp.asarray(logits), p).sum(axis=1), count)


def test_min_p_is_a_share_of_the_largest_probability():
    assert keep_min_p(LOGITS, 0.25).tolist() == [[True, True, True, False]]
    assert keep_min_p(LOGITS, 0.0).all()


def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    actual = penalise(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), 2.0)
    assert actual.tolist() == [[1.0, -4.0, 2.0]]


def test_a_token_that_is_not_allowed_is_never_drawn():
    keys = jax.random.split(jax.random.key(5), 500)
    allowed = jnp.array([[False, True, True, True]])
    tokens, logps, _ = sample(keys, jnp.repeat(LOGITS, 500, axis=0), allowed=jnp.repeat(allowed, 500, axis=0))
    assert set(tokens.tolist()) == {1, 2, 3}
    np.testing.assert_allclose(np.exp(logps), np.array([0, 0.6, 0.3, 0.1])[np.asarray(tokens)], rtol=1e-5)


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    tokens, logps, _ = sample(jax.random.split(jax.random.key(0), 2), logits, temperature=0.0)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits)[jnp.arange(2), tokens], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_probability_and_logps_are_its_logarithm(options, expected):
    count = 20_000
    keys = jax.random.split(jax.random.key(1), count)
    tokens, logps, model_logps = sample(keys, jnp.repeat(LOGITS, count, axis=0), **options)
    actual = np.bincount(tokens, minlength=4) / count
    # four standard deviations of a share of 20,000 draws
    np.testing.assert_allclose(actual, expected, atol=4 * 0.5 / np.sqrt(count))
    np.testing.assert_allclose(np.exp(logps), np.array(expected)[np.asarray(tokens)], rtol=1e-5)
    np.testing.assert_allclose(model_logps, LOGITS[0, tokens], atol=1e-5)


def test_a_row_draws_the_same_whatever_its_neighbours_are():
    keys = jax.random.split(jax.random.key(2), 8)
    logits = jax.random.normal(jax.random.key(3), (8, 50))
    whole = sample(keys, logits).tokens
    parts = [sample(keys[i : i + 1], logits[i : i + 1]).tokens[0] for i in range(8)]
    assert whole.tolist() == parts


@pytest.mark.parametrize("vocabulary", [100, 128, 300])
def test_over_blocks_of_the_vocabulary_each_token_comes_as_often_as_its_probability(vocabulary):
    count = 40_000
    logits = 2 * jax.random.normal(jax.random.key(2), (vocabulary,))
    banned = jnp.arange(vocabulary) % 7 == 0  # the first token, and places at the edges of blocks
    logits = jnp.where(banned, -jnp.inf, logits)
    keys = jax.random.split(jax.random.key(3), count)
    tokens = jax.jit(categorical)(keys, jnp.broadcast_to(logits, (count, vocabulary)))
    seen, expected = np.bincount(tokens, minlength=vocabulary), count * np.asarray(jax.nn.softmax(logits), np.float64)
    assert not seen[np.asarray(banned)].any()
    often = expected >= 5
    actual, wanted = [*seen[often], seen[~often].sum()], [*expected[often], expected[~often].sum()]
    chi_square = sum((a - b) ** 2 / b for a, b in zip(actual, wanted, strict=True) if b)
    freedom = often.sum()
    assert chi_square < freedom + 3.1 * np.sqrt(2 * freedom) + 10


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, np.nextafter(np.float32(1), np.float32(0))])
def test_a_place_without_mass_is_never_the_one_that_crosses(share):
    mass = jnp.array([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]])
    assert crossing(mass, jnp.array([share])).tolist() == [{0.0: 1, 0.25: 3, 0.5: 4}.get(float(share), 4)]


def test_a_crossing_lost_to_rounding_falls_to_the_last_place_with_mass():
    assert crossing(jnp.array([[1.0, 2.0, 0.0]]), jnp.array([1.0])).tolist() == [1]
