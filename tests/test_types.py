import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.types import Average, leaf_names


def test_the_average_of_two_ragged_parts_is_the_average_of_the_whole():
    values = jnp.array([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    parts = Average.of(values[:1], mask[:1]) + Average.of(values[1:], mask[1:])
    assert float(parts.compute()) == (1 + 2 + 3 + 10) / 4
    assert float(Average.of(values, mask).compute()) == 4.0


def test_an_average_of_nothing_is_zero_and_finite():
    assert float(Average.of(jnp.array([jnp.nan]), jnp.array([False])).compute()) == 0.0


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="must be equal"):
        Average.of(jnp.ones((2, 3)), jnp.ones((3,), bool))


def test_leaf_names_are_paths():
    assert leaf_names({"blocks": {"kernel": np.ones(2)}, "norm": np.ones(1)}) == {
        "blocks": {"kernel": "blocks/kernel"},
        "norm": "norm",
    }
