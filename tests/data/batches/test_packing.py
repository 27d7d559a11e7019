"""Packing: a partition of the sequences into rows that are not longer than the window."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.batches.packing import pack


@settings(deadline=None)
@given(st.integers(1, 40).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(1, w), max_size=60))))
def test_every_sequence_is_in_one_row_and_no_row_is_too_long(case):
    width, lengths = case
    rows = pack(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= width for row in rows)
    # best fit opens a row only when no other has space: at most one row can be half empty
    assert sum(sum(lengths[i] for i in row) <= width // 2 for row in rows) <= 1


def test_the_longest_go_first_and_the_fullest_row_that_fits_takes_each():
    # 6 opens row A, 5 row B, 4 fills A (10), 3 goes to B (8), 2 fills B (10)
    assert pack([2, 3, 4, 5, 6], 10) == [[0, 1, 3], [2, 4]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit in a row of 10"):
        pack([3, 11], 10)


def test_rows_of_natural_lengths_are_nearly_full():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.5, 0.8, 20_000).astype(int) + 1, 512)
    assert lengths.sum() / (512 * len(pack(lengths, 512))) > 0.99
