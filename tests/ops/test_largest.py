"""The place of the largest value, found by blocks, is the one that argmax finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.logits import largest


@pytest.mark.parametrize("width", [1, 100, 128, 1280, 1300])
def test_the_largest_is_found_where_argmax_finds_it(width):
    x = np.array(jax.random.normal(jax.random.key(width), (64, width)))
    assert np.array_equal(largest(jnp.asarray(x)), x.argmax(axis=1))
    rounded = np.round(x)  # so that most rows have many equals
    assert np.array_equal(largest(jnp.asarray(rounded)), rounded.argmax(axis=1))


@pytest.mark.parametrize(
    ("places", "index"), [({}, 0), ({130: 1.0, 300: 1.0}, 130), ({5: np.inf, 200: np.nan, 300: np.nan}, 200)]
)
def test_of_nothing_the_first_of_equals_the_first_and_a_nan_before_infinity(places, index):
    row = np.full((1, 384), -np.inf, np.float32)
    for place, value in places.items():
        row[0, place] = value
    assert largest(jnp.asarray(row)).tolist() == [index] == row.argmax(axis=1).tolist()
