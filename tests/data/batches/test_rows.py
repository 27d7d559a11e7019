"""Rows of each step: the same on every machine and after a resume, and disjoint between hosts."""

import jax
import numpy as np
import pytest

from jaxalign.config.offline import DPOConfig
from jaxalign.config.on_policy import GRPOConfig
from jaxalign.data.batches.plan import Mixture, Plan, bucket_widths, iterate
from jaxalign.data.batches.rows import TrainBatches, eval_batches
from jaxalign.data.read.tokens import Examples

RAGGED = np.random.default_rng(1).integers(2, 17, 60).tolist()


def examples(lengths):
    """Example i holds i + 1 at every position, so tokens tell where they come from."""
    return Examples.of([(np.full(n, i + 1, np.int32), np.arange(n) > n // 2) for i, n in enumerate(lengths)])


def batches(lengths=RAGGED, *, steps=20, packing=True, batch_size=4, **options):
    plan = Plan(batch_size, max_length=16, packing=packing, **options)
    mixture = Mixture.of(examples(lengths), [len(lengths)], [None])
    return TrainBatches(mixture, plan, steps=steps)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_rows_are_side_by_side_with_positions_and_segments_of_their_own():
    batch = batches([3, 5, 2, 16], batch_size=2, shuffle=False)[0]
    np.testing.assert_array_equal(batch.tokens[0], [1] * 3 + [2] * 5 + [3] * 2 + [0] * 6)
    np.testing.assert_array_equal(batch.segment_ids[0], [1] * 3 + [2] * 5 + [3] * 2 + [0] * 6)
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 0, 1, 2, 3, 4, 0, 1] + [0] * 6)
    np.testing.assert_array_equal(batch.mask[0], [0, 0, 1, 0, 0, 0, 1, 1, 0, 0] + [0] * 6)
    np.testing.assert_array_equal(batch.tokens[1], [4] * 16)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_example_once_and_epochs_follow_without_a_gap(packing):
    source = batches(packing=packing, steps=100)
    rows = [row for step in range(100) for row in source[step].tokens]
    first, seen = round(source.steps_per_epoch * 4), np.zeros(len(RAGGED) + 1, int)
    for row in rows[:first]:
        seen += np.bincount(row, minlength=len(seen))
    assert seen[1:].tolist() == RAGGED
    orders = [tuple(int(row[0]) for row in rows[at : at + first]) for at in (0, first)]
    assert orders[0] != orders[1]


def test_the_number_of_steps_is_set_on_a_copy_that_holds_the_same_batches():
    source = batches(steps=0)
    copy = source.with_steps(3)
    assert (len(source), len(copy)) == (0, 3) and copy.steps_per_epoch == source.steps_per_epoch
    assert all(equal(copy[step], source[step]) for step in range(3))


def test_a_plan_reads_its_command_and_packs_unless_that_says_no(tmp_path):
    paths = {"model": "m", "data": "d", "output": tmp_path, "batch_size": 3, "max_length": 9, "seed": 5}
    config = DPOConfig(**paths, packing=False, shuffle=False, share_prompt=True)
    assert Plan.of(config, unit=2) == Plan(3, 9, 2, packing=False, shuffle=False, seed=5, share_prompt=True)
    assert Plan.of(GRPOConfig(**paths, reward="length")) == Plan(3, 9, seed=5)


def test_a_resumed_iterator_goes_on_with_the_same_batches():
    source = batches()
    whole = list(iterate(source))
    assert len(whole) == 20 and all(equal(whole[i], source[i]) for i in range(20))
    resumed = iterate(batches())
    resumed.set_state({"next_index": 7})
    assert all(equal(a, b) for a, b in zip(resumed, whole[7:], strict=True))


def test_the_seed_decides_the_order_and_without_shuffling_rows_come_as_they_are():
    a, b, c = batches(seed=1), batches(seed=1), batches(seed=2)
    assert all(equal(a[i], b[i]) for i in range(5)) and not all(equal(a[i], c[i]) for i in range(5))
    plain = batches(packing=False, shuffle=False)
    assert [int(row[0]) for step in range(3) for row in plain[step].tokens] == list(range(1, 13))


def test_rows_of_one_sequence_are_padded_to_the_smallest_width_that_holds_the_batch():
    assert bucket_widths(16) == [4, 8, 12, 16] and bucket_widths(3) == [1, 2, 3]
    source = batches(packing=False)
    for step in range(15):
        batch = source[step]
        longest = int((batch.segment_ids > 0).sum(1).max())
        assert batch.tokens.shape[1] == min(w for w in bucket_widths(16) if w >= longest)


def test_weights_decide_what_an_epoch_takes_of_each_set():
    lengths = [2] * 10 + [3] * 30
    mixture = Mixture.of(examples(lengths), [10, 30], [0.75, 0.25])
    assert mixture.per_epoch == (30, 10)
    epochs = [mixture.epoch(i, seed=0, shuffle=True) for i in range(3)]
    for epoch in epochs:
        small, large = epoch[epoch < 10], epoch[epoch >= 10]
        assert np.bincount(small).tolist() == [3] * 10 and len(large) == 10
    # the large set goes on where its last epoch stopped: three epochs see all of it once
    seen = np.concatenate([epoch[epoch >= 10] for epoch in epochs])
    assert sorted(seen) == list(range(10, 40))


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_every_example_once_in_full_batches(packing):
    plan = Plan(batch_size=4, max_length=16, packing=packing)
    held_out = eval_batches(examples(RAGGED), plan)
    counted = sum(np.bincount(batch.tokens.ravel(), minlength=len(RAGGED) + 1) for batch in held_out)
    assert counted[1:].tolist() == RAGGED
    assert {len(batch.tokens) for batch in held_out} == {4}
