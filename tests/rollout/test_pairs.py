"""Pairs of a policy's own responses: who is chosen, and what is learned."""

import numpy as np

from jaxalign.data.batches.groups import BatchShapes
from jaxalign.data.batches.plan import Plan
from jaxalign.rollout.batches import best_and_worst, pairs_of
from jaxalign.rollout.engine.engine import Response


def test_a_pair_is_the_best_and_the_worst_and_equals_have_none():
    scores = np.array([[0.5, 2.0, -1.0], [1.0, 1.0, 1.0], [3.0, 3.0, 0.0]])
    chosen = best_and_worst(scores)
    assert chosen.tolist() == [[1, 2], [6, 8]]
    responses = [Response(np.array([10 + k, 2]), np.zeros(2), np.zeros(2), True) for k in range(9)]
    pairs = pairs_of([(5,)] * 3 + [(6,)] * 3 + [(7, 8)] * 3, responses, chosen)
    found = [(pairs.examples[i][0].tolist(), pairs.examples[i][1].tolist()) for i in pairs.groups.reshape(-1)]
    assert [ids for ids, _ in found] == [[5, 11, 2], [5, 12, 2], [7, 8, 16, 2], [7, 8, 18, 2]]
    assert found[0][1] == [False, True, True] and found[3][1] == [False, False, True, True]
    assert len(pairs_of([(5,)], responses[:1], chosen[:0])) == 0


def test_a_step_of_ties_alone_is_a_batch_without_pairs():
    none = pairs_of([(5,)] * 4, [], best_and_worst(np.ones((2, 2))))
    batch = BatchShapes(Plan(2, 16, packing=False), responses=2, max_groups=1, row_counts=(2,)).batch(none)
    assert not np.asarray(batch.valid).any() and not batch.sequences.mask.any()
