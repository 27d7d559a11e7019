"""Batches as a function of the step: which rows step n holds follows from the seed alone, on every host.

Each host plans the whole epoch and makes its own rows of every batch, so hosts see disjoint rows and equally many
batches by construction. Grain reads ahead; its state is the number of the next step, which a checkpoint keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxalign.data.batches.packing import pack
from jaxalign.data.read.tokens import Examples
from jaxalign.mistake import Mistake
from jaxalign.types import TokenBatch

PACKED_AT_ONCE = 8192  # examples; more pack a little tighter, fewer keep an epoch's order more random
GROUPED_BATCHES = 32  # without packing, so many batches' examples are sorted by length together
BUCKETS = 4


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Examples of several sets one after another, and how many of each an epoch takes."""

    examples: Examples
    sizes: tuple[int, ...]  # examples in each set
    per_epoch: tuple[int, ...]  # examples of each set in an epoch

    @classmethod
    def of(cls, examples: Examples, sizes: Sequence[int], weights: Sequence[float | None]) -> Mixture:
        """Without weights an epoch takes every example once; with them, as many in all, in those shares."""
        if any(w is None for w in weights):
            return cls(examples, tuple(sizes), tuple(sizes))
        total = sum(sizes)
        shares = [w / sum(weights) for w in weights]
        return cls(examples, tuple(sizes), tuple(max(1, round(total * share)) for share in shares))

    def epoch(self, number: int, *, seed: int, shuffle: bool) -> np.ndarray:
        """Indices of the examples of epoch `number`, in order. A set goes on where its last epoch stopped."""
        parts, start = [], 0
        for which, (size, count) in enumerate(zip(self.sizes, self.per_epoch, strict=True)):
            wanted = np.arange(number * count, (number + 1) * count)
            orders = {p: _order(size, (seed, which, p), shuffle) for p in np.unique(wanted // size)}
            parts.append(np.array([orders[i // size][i % size] for i in wanted], np.int64) + start)
            start += size
        indices = np.concatenate(parts)
        return indices[_order(len(indices), (seed, len(self.sizes), number), True)] if shuffle else indices


def _order(size: int, seed: tuple[int, ...], shuffle: bool) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size) if shuffle else np.arange(size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rows become batches."""

    batch_size: int  # rows over all hosts
    max_length: int
    packing: bool = True
    shuffle: bool = True
    seed: int = 0


class TrainBatches:
    """Step n -> this host's rows of batch n, for n = 0, 1, ..., steps - 1. Epochs follow each other without a gap."""

    def __init__(
        self, mixture: Mixture, plan: Plan, *, steps: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        if plan.batch_size % process_count:
            raise Mistake(f"batch_size={plan.batch_size} is not a multiple of the {process_count} hosts")
        self.mixture, self.plan, self.steps = mixture, plan, steps
        share = plan.batch_size // process_count
        self._local = slice(process_index * share, (process_index + 1) * share)
        self._starts = [0]  # the first row of each epoch that was planned, counted over all epochs
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> TokenBatch:
        first = step * self.plan.batch_size
        rows = [self._row(first + i) for i in range(self.plan.batch_size)]
        width = self._width(rows)
        return assemble(self.mixture.examples, rows[self._local], width)

    def _width(self, rows: list[list[int]]) -> int:
        """Packed rows are full; else the smallest of a few widths that holds the longest row of any host."""
        if self.plan.packing:
            return self.plan.max_length
        longest = max(self.mixture.examples.lengths[row].sum() for row in rows)
        return next(width for width in bucket_widths(self.plan.max_length) if width >= longest)

    def _row(self, number: int) -> list[int]:
        with self._lock:
            while number >= self._starts[-1]:
                self._starts.append(self._starts[-1] + len(self._rows_of(len(self._starts) - 1)))
            epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
            return self._rows_of(epoch)[number - self._starts[epoch]]

    @functools.lru_cache(maxsize=2)  # noqa: B019  one instance a run
    def _rows_of(self, epoch: int) -> list[list[int]]:
        plan, lengths = self.plan, self.mixture.examples.lengths
        order = self.mixture.epoch(epoch, seed=plan.seed, shuffle=plan.shuffle)
        if plan.packing:
            return _pack_in_order(order, lengths, plan, (plan.seed, epoch))
        if not plan.shuffle:
            return [[int(i)] for i in order]
        return _group_by_length(order, lengths, plan, (plan.seed, epoch))

    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; later ones may pack into a few more or less."""
        return len(self._rows_of(0))


def _pack_in_order(order: np.ndarray, lengths: np.ndarray, plan: Plan, seed: tuple[int, ...]) -> list[list[int]]:
    rows = []
    for at in range(0, len(order), PACKED_AT_ONCE):
        chunk = order[at : at + PACKED_AT_ONCE]
        packed = [chunk[row].tolist() for row in pack(lengths[chunk], plan.max_length)]
        rows += [packed[i] for i in _order(len(packed), (*seed, at), plan.shuffle)]
    return rows


def _group_by_length(order: np.ndarray, lengths: np.ndarray, plan: Plan, seed: tuple[int, ...]) -> list[list[int]]:
    """Batches of alike lengths, in random order: rows are then padded little."""
    rows, size = [], plan.batch_size * GROUPED_BATCHES
    for at in range(0, len(order), size):
        chunk = order[at : at + size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches = [chunk[i : i + plan.batch_size] for i in range(0, len(chunk), plan.batch_size)]
        # a batch that is not full comes last, so that the others stay whole
        whole = [b for b in batches if len(b) == plan.batch_size]
        shuffled = [whole[i] for i in _order(len(whole), (*seed, at), True)] + batches[len(whole) :]
        rows += [[int(i)] for batch in shuffled for i in batch]
    return rows


def bucket_widths(max_length: int) -> list[int]:
    """The few widths of batches that are not packed: quarters of max_length."""
    return sorted({-(-max_length * quarter // BUCKETS) for quarter in range(1, BUCKETS + 1)})


def assemble(examples: Examples, rows: Sequence[Sequence[int]], width: int) -> TokenBatch:
    """The rows side by side, padded on the right: numpy arrays [rows, width]."""
    shape = len(rows), width
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, bool)
    for r, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, start=1):
            ids, learned = examples[example]
            here = slice(at, at + len(ids))
            tokens[r, here], mask[r, here] = ids, learned
            positions[r, here], segment_ids[r, here] = np.arange(len(ids)), number
            at += len(ids)
    return TokenBatch(tokens=tokens, mask=mask, positions=positions, segment_ids=segment_ids)


def eval_batches(examples: Examples, plan: Plan, *, process_index: int = 0, process_count: int = 1) -> list[TokenBatch]:
    """Every example once; the last batch is filled up with empty rows, so nothing is lost or counted twice."""
    lengths = examples.lengths
    packed = pack(lengths, plan.max_length) if plan.packing else [[i] for i in np.argsort(-lengths, kind="stable")]
    batches, share = [], plan.batch_size // process_count
    for at in range(0, len(packed), plan.batch_size):
        rows = packed[at : at + plan.batch_size]
        longest = max(int(lengths[row].sum()) for row in rows)
        widths = [plan.max_length] if plan.packing else bucket_widths(plan.max_length)
        width = next(w for w in widths if w >= longest)
        rows = [*rows, *[[]] * (plan.batch_size - len(rows))]
        batches.append(assemble(examples, rows[process_index * share : (process_index + 1) * share], width))
    return batches


def iterate(batches: Any, *, threads: int = 2, ahead: int = 4) -> Iterator[TokenBatch]:
    """A Grain iterator over a `TrainBatches`: it reads ahead, and has get_state() and set_state()."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
