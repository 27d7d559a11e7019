"""Batches of a policy's own responses: who is chosen, and what is learned."""

import numpy as np

from jaxalign.data.batches.groups import BatchShapes
from jaxalign.data.batches.plan import Plan
from jaxalign.rollout.batches import best_and_worst, to_pairs, to_rollout_batch
from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.scored import ScoredResponses


def responses_of(tokens, scores):
    """Responses of these tokens, with log-probs of -1, -2, ..."""
    responses = [
        Response(np.array(ids), -1.0 - np.arange(len(ids)), np.zeros(len(ids)), ids[-1] == 2) for ids in tokens
    ]
    return ScoredResponses(np.arange(len(tokens)), responses, [""] * len(tokens), np.array(scores, np.float32), {})


def test_a_pair_is_the_best_and_the_worst_and_equals_have_none():
    scores = np.array([[0.5, 2.0, -1.0], [1.0, 1.0, 1.0], [3.0, 3.0, 0.0]])
    chosen = best_and_worst(scores)
    assert chosen.tolist() == [[1, 2], [6, 8]]
    responses = responses_of([(10 + k, 2) for k in range(9)], scores.reshape(-1))
    pairs = to_pairs(responses, [(5,)] * 3 + [(6,)] * 3 + [(7, 8)] * 3, chosen)
    rows = [(pairs.examples[i][0].tolist(), pairs.examples[i][1].tolist()) for i in pairs.groups.reshape(-1)]
    assert [ids for ids, _ in rows] == [[5, 11, 2], [5, 12, 2], [7, 8, 16, 2], [7, 8, 18, 2]]
    assert rows[0][1] == [False, True, True] and rows[3][1] == [False, False, True, True]
    assert len(to_pairs(responses, [(5,)] * 9, chosen[:0])) == 0


def test_a_step_of_ties_alone_is_a_batch_without_pairs():
    none = to_pairs(responses_of([(2,)] * 4, [1.0] * 4), [(5,)] * 4, best_and_worst(np.ones((2, 2))))
    batch = BatchShapes(Plan(2, 16, packing=False), responses=2, max_groups=1, row_counts=(2,)).batch(none)
    assert not np.asarray(batch.valid).any() and not batch.sequences.mask.any()


def test_a_row_is_a_prompt_its_response_and_what_is_known_of_it_and_the_last_is_empty():
    scored = responses_of([(10, 11, 2), (12,)], [0.5, -1.0])
    batch = to_rollout_batch(scored, [(5,), (6, 7)], advantages=np.array([2.0, 3.0]), width=5, rows=3)
    assert batch.sequences.tokens.tolist() == [[5, 10, 11, 2, 0], [6, 7, 12, 0, 0], [0] * 5]
    assert batch.sequences.segment_ids.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0] * 5]
    np.testing.assert_array_equal(batch.columns["old_logps"], [[0, -1, -2, -3, 0], [0, 0, -1, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.columns["advantages"], [[0, 2, 2, 2, 0], [0, 0, 3, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.columns["scores"], [0.5, -1, 0])
    assert batch.columns["ended"].tolist() == [True, False, False]
    assert {name: x.dtype for name, x in batch.columns.items() if name != "ended"} == dict.fromkeys(
        ("old_logps", "scores", "advantages"), np.float32
    )
    assert "advantages" not in to_rollout_batch(scored, [(5,), (6, 7)], width=5, rows=3).columns
