import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.types import Average, ResponseBatch, TokenBatch, leaf_names


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


def test_slots_find_the_responses_of_the_drawing():
    text = [["pppccppprppr.", "ppccc........"]]
    segments = [[[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]]
    letters, segment_ids = np.array([[list(plane) for plane in row] for row in text]), np.array(segments, np.int32)
    mask = np.isin(letters, ["c", "r"])
    sequences = TokenBatch(np.zeros_like(segment_ids), mask, np.zeros_like(segment_ids), segment_ids)
    batch = ResponseBatch(sequences, np.array([[[1, 2], [5, 3]]], np.int32), {}, stride=4)
    np.testing.assert_array_equal(batch.per_response(mask), [[[2, 1], [3, 1]]])  # lengths of c, r; c, r
    groups = batch.to_tokens(jnp.array([[[10, 11], [20, 21]]]))  # group and response of each token
    np.testing.assert_array_equal(groups[0, 0], [10] * 5 + [11] * 4 + [21] * 3 + [0])
    np.testing.assert_array_equal(groups[0, 1], [20] * 5 + [0] * 8)


def test_leaf_names_are_paths():
    assert leaf_names({"blocks": {"kernel": np.ones(2)}, "norm": np.ones(1)}) == {
        "blocks": {"kernel": "blocks/kernel"},
        "norm": "norm",
    }
