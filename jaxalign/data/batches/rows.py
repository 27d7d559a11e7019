"""Batches of rows of text, as a function of the step: the seed alone decides which rows step n holds.

Each host makes whole batches, the same on all of them; `training.sharding.put_batch` takes the rows that its devices
need, which only the mesh knows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from jaxalign.data.batches.packing import pack
from jaxalign.data.batches.plan import Batches, Mixture, Plan, order
from jaxalign.data.read.tokens import Examples
from jaxalign.types import TokenBatch

PACKED_AT_ONCE = 8192  # examples; more pack a little tighter, fewer keep an epoch's order more random
GROUPED_BATCHES = 32  # without packing, the number of batches whose examples are sorted by length together


class TrainBatches(Batches):
    """Step n -> batch n."""

    def __init__(self, mixture: Mixture, plan: Plan, *, steps: int = 0) -> None:
        super().__init__(plan, functools.partial(_rows_of, mixture, plan), steps=steps)
        self.mixture = mixture

    def __getitem__(self, step: int) -> TokenBatch:
        examples, rows = self.mixture.examples, self._items(step)
        width = self.plan.width(max(examples.lengths[row].sum() for row in rows))
        return assemble(examples, rows, width)


def _rows_of(mixture: Mixture, plan: Plan, epoch: int) -> list[list[int]]:
    """The rows of an epoch, each the indices of its examples."""
    indices, lengths = mixture.epoch(epoch, seed=plan.seed, shuffle=plan.shuffle), mixture.examples.lengths
    if plan.packing:
        return _pack_in_order(indices, lengths, plan, (plan.seed, epoch))
    if not plan.shuffle:
        return [[int(i)] for i in indices]
    return _group_by_length(indices, lengths, plan, (plan.seed, epoch))


def _pack_in_order(indices: np.ndarray, lengths: np.ndarray, plan: Plan, seed: tuple[int, ...]) -> list[list[int]]:
    rows = []
    for at in range(0, len(indices), PACKED_AT_ONCE):
        chunk = indices[at : at + PACKED_AT_ONCE]
        packed = [chunk[row].tolist() for row in pack(lengths[chunk], plan.max_length)]
        rows += [packed[i] for i in order(len(packed), (*seed, at), plan.shuffle)]
    return rows


def _group_by_length(indices: np.ndarray, lengths: np.ndarray, plan: Plan, seed: tuple[int, ...]) -> list[list[int]]:
    """Rows of one example each, in batches of similar lengths, which need little padding; batches in random order."""
    rows, size = [], plan.batch_size * GROUPED_BATCHES
    for at in range(0, len(indices), size):
        chunk = indices[at : at + size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches = [chunk[i : i + plan.batch_size] for i in range(0, len(chunk), plan.batch_size)]
        # an incomplete batch comes last, so that the others stay whole
        whole = [b for b in batches if len(b) == plan.batch_size]
        shuffled = [whole[i] for i in order(len(whole), (*seed, at), True)] + batches[len(whole) :]
        rows += [[int(i)] for batch in shuffled for i in batch]
    return rows


def assemble(examples: Examples, rows: Sequence[Sequence[int]], width: int) -> TokenBatch:
    """A batch of these rows, each a list of examples, padded on the right: numpy arrays [rows, width]."""
    shape = len(rows), width
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, start=1):
            ids, learned = examples[example]
            place = slice(at, at + len(ids))
            tokens[r, place], mask[r, place] = ids, learned
            positions[r, place], segment_ids[r, place] = np.arange(len(ids)), number
            at += len(ids)
    return TokenBatch(tokens=tokens, mask=mask, positions=positions, segment_ids=segment_ids)


def eval_batches(examples: Examples, plan: Plan) -> list[TokenBatch]:
    """Every example once; the last batch is filled up with empty rows, so nothing is lost or counted twice."""
    lengths = examples.lengths
    packed = pack(lengths, plan.max_length) if plan.packing else [[i] for i in np.argsort(-lengths, kind="stable")]
    batches = []
    for at in range(0, len(packed), plan.batch_size):
        rows = packed[at : at + plan.batch_size]
        longest = max(int(lengths[row].sum()) for row in rows)
        batches.append(assemble(examples, [*rows, *[[]] * (plan.batch_size - len(rows))], plan.width(longest)))
    return batches
