"""Groups in rows: everything once, whole groups in a row, and the same sums however they are laid out."""

import jax
import numpy as np
import pytest

from jaxalign.data.batches.groups import BatchShapes, GroupBatches, Responses, eval_batches
from jaxalign.data.batches.packing import pack_groups
from jaxalign.data.batches.plan import Mixture, Plan
from jaxalign.data.read.tokens import Examples


def responses(count, *, k=2, longest=20, seed=0, missing=False):
    """Groups of sequences of ragged length: ids count up from 1, the last half of each is learned."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, (count, k))
    parts, groups, at = [], np.zeros((count, k), np.int64), 1
    for g in range(count):
        for i in range(k):
            if missing and i and rng.random() < 0.4:
                groups[g, i] = -1
                continue
            groups[g, i] = len(parts)
            size = lengths[g, i]
            parts.append((np.arange(at, at + size), np.arange(size) >= size // 2))
            at += size
    return Responses(Examples.of(parts), groups, {"margin": rng.random(count).astype(np.float32)})


def sums(data):
    """Σ of learned ids of each response, worked out from the flat arrays."""
    return np.array(
        [[0 if e < 0 else (lambda i, m: i[m].sum())(*data.examples[int(e)]) for e in row] for row in data.groups]
    )


def read(batch, values=None):
    """{margin: Σ learned ids [K]} of a batch."""
    values = np.where(batch.sequences.mask, batch.sequences.tokens, 0) if values is None else values
    per_response = np.asarray(batch.per_response(jax.numpy.asarray(values)))
    valid = np.asarray(batch.slots).any(2)
    return {float(m): tuple(s) for m, s in zip(batch.columns["margin"][valid], per_response[valid], strict=True)}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_batch_holds_its_groups_once_and_sums_over_responses_are_theirs(packing, k):
    data = responses(12, k=k, missing=k > 2)
    plan = Plan(batch_size=6, max_length=20, packing=packing, shuffle=False)
    mixture = Mixture.of(data, [len(data)], [None])
    batches = GroupBatches(mixture, plan, steps=2)
    read_sums = {key: value for step in range(2) for key, value in read(batches[step]).items()}
    assert read_sums == {float(m): tuple(s) for m, s in zip(data.columns["margin"], sums(data), strict=True)}


def test_packed_rows_are_fewer_and_no_plane_overflows():
    data = responses(64, longest=12)
    plan = Plan(batch_size=64, max_length=48)
    batch = BatchShapes.of(data, plan).batch(data)
    assert batch.sequences.tokens.shape == (batch.slots.shape[0], 2, 48)
    assert len(batch.slots) <= 24  # 64 pairs of 2 x 7 tokens on average fill 9.3 rows of 96
    assert (batch.sequences.segment_ids > 0).sum() == data.lengths.sum()
    assert len(read(batch)) == 64


def test_whole_groups_go_into_the_fullest_row_that_takes_them():
    lengths = np.array([[8, 2], [6, 6], [2, 2], [4, 0]])
    rows = pack_groups(lengths, planes=2, width=10, max_groups=4)
    # the longest first: 6 | 6 opens a row; 8 does not fit beside and opens another, with 2 behind it, which leaves more
    # room than the first row has, where 4 (6 + 4 = 10) and then 2 and 2 go
    assert [sorted({g for g, _, _ in row}) for row in rows] == [[1, 2, 3], [0]]
    for row in rows:
        used = np.zeros(2, int)
        for g, k, q in row:
            used[q] += lengths[g, k]
        assert (used <= 10).all()
    assert [len(row) for row in pack_groups(lengths[2:], planes=2, width=10, max_groups=1)] == [2, 1]
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit in a plane of 10"):
        pack_groups(np.array([[11, 1]]), planes=2, width=10, max_groups=1)


def by_definition(lengths, *, planes, width, max_groups):
    """`pack_groups`, with every row looked at for every group: [(free tokens of each plane, groups)] of the rows."""
    rows = []
    for group in np.argsort(-lengths.sum(axis=1), kind="stable"):
        for row in sorted((row for row in rows if len(row[1]) < max_groups), key=lambda row: sum(row[0])):
            if free := fitted(row[0], lengths[group]):
                row[0][:] = free
                row[1].append(group)
                break
        else:
            rows.append((fitted([width] * planes, lengths[group]), [group]))
    return rows


def fitted(free, lengths):
    """Room that is left when each response, the longest first, is in the fullest plane that has room; None: no room."""
    free = list(free)
    for k in np.argsort(-lengths, kind="stable"):
        able = [plane for plane, room in enumerate(free) if room >= lengths[k]]
        if lengths[k] and not able:
            return None
        if lengths[k]:
            free[min(able, key=lambda plane: free[plane])] -= lengths[k]
    return free


def test_groups_go_where_looking_at_every_row_would_put_them():
    rng = np.random.default_rng(0)
    for _ in range(40):
        lengths = rng.integers(0, 22, (int(rng.integers(1, 50)), int(rng.integers(1, 4))))
        lengths[:, 0] = np.maximum(lengths[:, 0], 1)  # a group has a response
        options = {"planes": lengths.shape[1], "width": 21, "max_groups": int(rng.integers(1, 6))}
        rows = pack_groups(lengths, **options)
        assert [sorted({g for g, _, _ in row}) for row in rows] == [
            sorted(groups) for _, groups in by_definition(lengths, **options)
        ]


def test_epochs_shuffle_anew_take_all_and_shapes_are_few():
    data = responses(40)
    plan = Plan(batch_size=10, max_length=20, seed=3)
    batches = GroupBatches(Mixture.of(data, [40], [None]), plan, steps=8)
    first, second = (np.concatenate([batches.groups_of(s) for s in steps]) for steps in (range(4), range(4, 8)))
    assert sorted(first) == sorted(second) == list(range(40)) and first.tolist() != second.tolist()
    shapes = {batches[s].sequences.tokens.shape for s in range(8)}
    assert len(shapes) <= batches.shape_count <= 8


def test_held_out_groups_come_once_each_and_the_last_batch_is_filled_with_nothing():
    data = responses(7)
    batches = eval_batches(data, Plan(batch_size=4, max_length=20))
    assert len(batches) == 2 and sum(len(read(b)) for b in batches) == 7


def test_values_spread_to_tokens_are_each_tokens_own():
    data = responses(9, k=3, missing=True)
    batch = jax.tree.map(jax.numpy.asarray, BatchShapes.of(data, Plan(9, 20)).batch(data))
    lengths = batch.per_response(batch.sequences.segment_ids > 0)
    spread = batch.to_tokens(lengths)
    inside = np.asarray(batch.sequences.segment_ids) > 0
    np.testing.assert_array_equal(np.asarray(spread)[~inside], 0)
    # every token of a sequence of n tokens holds n: Σ 1/n over tokens counts the sequences
    assert np.isclose((1 / np.asarray(spread)[inside]).sum(), (data.groups >= 0).sum())


def test_the_fingerprint_sees_tokens_groups_and_columns():
    data = responses(5)
    same, other = responses(5), responses(5, seed=1)
    moved = Responses(data.examples, data.groups[:, ::-1].copy(), data.columns)
    valued = Responses(data.examples, data.groups, {"margin": data.columns["margin"] + 1})
    assert data.fingerprint() == same.fingerprint()
    assert len({part.fingerprint() for part in (data, other, moved, valued)}) == 4
