"""Shared prompts: what is shared, that each response stands behind it by position, and that fewer tokens are needed."""

import jax
import numpy as np

from jaxalign.data.batches.groups import BatchShapes, Responses
from jaxalign.data.batches.packing import share_prompts
from jaxalign.data.batches.plan import Plan
from jaxalign.data.read.tokens import Examples


def group(*responses, prompt=(5, 6, 7)):
    """Responses of one group behind a prompt."""
    parts = [(np.array([*prompt, *r]), np.arange(len(prompt) + len(r)) >= len(prompt)) for r in responses]
    return Responses(Examples.of(parts), np.arange(len(parts))[None], {})


def test_a_prompt_is_shared_but_for_its_last_token_and_counted_once():
    data = group([8, 9], [1, 2, 3])
    packed, shared = share_prompts(data.examples, data.groups, width=20)
    # 5 6 | 7 8 9 | 7 1 2 3
    assert shared.tolist() == [2] and packed.tolist() == [[9, 0]]


def test_responses_that_begin_alike_share_no_token_that_is_learned():
    data = group([8, 9], [8, 9, 3])
    assert share_prompts(data.examples, data.groups, width=20)[1].tolist() == [2]


def test_a_group_that_fits_only_in_two_planes_and_a_response_without_a_sister_share_nothing():
    data = group([8, 9], [1, 2, 3])
    packed, shared = share_prompts(data.examples, data.groups, width=8)
    assert shared.tolist() == [0] and packed.tolist() == [[5, 6]]
    alone = Responses(data.examples, np.array([[0, -1]]), {})
    assert share_prompts(alone.examples, alone.groups, width=20)[1].tolist() == [0]


def test_a_row_holds_the_prompt_then_each_response_behind_its_last_token():
    data = group([8, 9], [1, 2, 3])
    plan = Plan(1, 16, share_prompt=True)
    sequences = BatchShapes.of(data, plan).batch(data).sequences
    plane = jax.tree.map(lambda x: x[0, 0, :10].tolist(), sequences)
    assert plane.tokens == [5, 6, 7, 8, 9, 7, 1, 2, 3, 0]
    assert plane.mask == [False, False, False, True, True, False, True, True, True, False]
    assert plane.positions == [0, 1, 2, 3, 4, 2, 3, 4, 5, 0]
    assert plane.segment_ids == [1, 1, 2, 2, 2, 3, 3, 3, 3, 0]
    assert plane.prefix_ids == [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert not sequences.tokens[0, 1].any()


def test_groups_of_every_kind_keep_their_responses_and_take_fewer_rows():
    rng = np.random.default_rng(0)
    parts, groups = [], np.full((40, 3), -1)
    for g in range(40):
        prompt = rng.integers(3, 90, 6)
        for k in range(rng.integers(1, 4)):
            groups[g, k] = len(parts)
            ids = np.concatenate([prompt, rng.integers(3, 90, rng.integers(1, 9))])
            parts.append((ids, np.arange(len(ids)) >= 6))
    data = Responses(Examples.of(parts), groups, {"number": np.arange(40)})
    read = {}
    for share in (False, True):
        batch = BatchShapes.of(data, plan := Plan(40, 24, share_prompt=share)).batch(data)
        learned = batch.per_response(jax.numpy.where(batch.sequences.mask, batch.sequences.tokens, 0))
        order = np.argsort(batch.columns["number"][batch.valid])
        read[share] = np.asarray(learned)[np.asarray(batch.valid)][order], len(BatchShapes.of(data, plan).rows(data))
    np.testing.assert_array_equal(read[True][0], read[False][0])
    assert read[True][1] < read[False][1]
