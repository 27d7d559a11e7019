import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.masked import last_token_index, masked_mean, masked_sum, masked_var, whiten

VALUES = jnp.array([[1.0, 3.0, jnp.nan], [5.0, jnp.inf, 7.0]])
MASK = jnp.array([[True, True, False], [True, False, True]])


def test_statistics_by_hand_ignore_what_is_masked():
    assert masked_sum(VALUES, MASK) == 16.0
    assert masked_mean(VALUES, MASK) == 4.0
    # (9 + 1 + 1 + 9) / 3 and / 4
    np.testing.assert_allclose(masked_var(VALUES, MASK), 20 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked_var(VALUES, MASK, unbiased=False), 5.0)


def test_nothing_selected_is_zero_not_nan():
    none = jnp.zeros_like(MASK)
    assert masked_mean(VALUES, none) == 0.0 and masked_var(VALUES, none) == 0.0


@pytest.mark.parametrize("value", [0.1, 0.7, 1234.567])
def test_equal_values_are_whitened_to_nothing_or_to_their_mean(value):
    values, mask = jnp.full((3, 7), value), jnp.arange(7)[None] < jnp.array([[7], [3], [0]])
    assert not whiten(values, mask).any() and masked_var(values, mask) == 0
    np.testing.assert_array_equal(whiten(values, mask, shift_mean=False)[mask], np.float32(value))


def test_whitened_values_have_mean_zero_and_variance_one_and_may_keep_their_mean():
    white = whiten(VALUES, MASK)
    np.testing.assert_allclose(masked_mean(white, MASK), 0.0, atol=1e-6)
    np.testing.assert_allclose(masked_var(white, MASK), 1.0, rtol=1e-5)
    np.testing.assert_allclose(masked_mean(whiten(VALUES, MASK, shift_mean=False), MASK), 4.0, rtol=1e-6)
    assert bool(jnp.all(white[~MASK] == 0))


def test_the_last_token_comes_from_the_mask_and_an_empty_row_has_none():
    mask = jnp.array([[False, True, True, False], [False] * 4, [True] * 4])
    np.testing.assert_array_equal(last_token_index(mask), [2, -1, 3])
