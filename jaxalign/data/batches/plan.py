"""How examples become batches: the plan of a run, the order of an epoch, and what batches of every kind share."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np

from jaxalign.config.shared import TrainConfig

BUCKETS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rows, or groups of responses, become batches."""

    batch_size: int  # rows of a batch, or groups of responses, over all hosts
    max_length: int  # tokens of a row, or of each plane of a row of groups
    unit: int = 1  # rows of groups come in multiples of it: the parts that devices and microbatches cut a batch into
    packing: bool = True  # a row holds as many sequences or groups as fit; without, it holds one and is padded
    shuffle: bool = True  # every epoch has a random order of its own; without, that of the data
    seed: int = 0  # of the orders
    share_prompt: bool = False  # with packing: the prompt of a group stands once, if the group then fits in one plane

    @classmethod
    def of(cls, config: TrainConfig, *, unit: int = 1) -> Plan:
        """The plan of a command's config: on-policy commands have no `packing`, and only DPO has `share_prompt`."""
        return cls(
            config.batch_size,
            config.max_length,
            unit,
            packing=getattr(config, "packing", True),
            shuffle=config.shuffle,
            seed=config.seed,
            share_prompt=getattr(config, "share_prompt", False),
        )

    @property
    def widths(self) -> list[int]:
        """The widths that batches can have, in tokens, in ascending order."""
        return [self.max_length] if self.packing else bucket_widths(self.max_length)

    def width(self, longest: int) -> int:
        """The smallest width of a batch whose longest row, or plane, has `longest` tokens."""
        return next(width for width in self.widths if width >= longest)


def bucket_widths(max_length: int) -> list[int]:
    """The few widths of batches that are not packed: quarters of max_length."""
    return sorted({-(-max_length * quarter // BUCKETS) for quarter in range(1, BUCKETS + 1)})


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Examples of several sources one after another, and how many of each an epoch takes."""

    examples: Any  # `Examples`, or `Responses` in groups
    sizes: tuple[int, ...]  # examples of each source
    per_epoch: tuple[int, ...]  # examples of each source in an epoch

    @classmethod
    def of(cls, examples: Any, sizes: Sequence[int], weights: Sequence[float | None]) -> Mixture:
        """Without weights an epoch takes every example once; with them, as many in all, in those shares."""
        numbers = [w for w in weights if w is not None]
        if len(numbers) < len(weights):
            return cls(examples, tuple(sizes), tuple(sizes))
        total = sum(sizes)
        shares = [w / sum(numbers) for w in numbers]
        return cls(examples, tuple(sizes), tuple(max(1, round(total * share)) for share in shares))

    def epoch(self, number: int, *, seed: int, shuffle: bool) -> np.ndarray:
        """Int64[N], the examples of epoch `number`, in order. A source goes on where it stopped in the last epoch."""
        parts, start = [], 0
        for which, (size, count) in enumerate(zip(self.sizes, self.per_epoch, strict=True)):
            wanted = np.arange(number * count, (number + 1) * count)
            orders = {p: order(size, (seed, which, p), shuffle) for p in np.unique(wanted // size)}
            parts.append(np.array([orders[i // size][i % size] for i in wanted], np.int64) + start)
            start += size
        indices = np.concatenate(parts)
        return indices[order(len(indices), (seed, len(self.sizes), number), True)] if shuffle else indices


def order(size: int, seed: tuple[int, ...], shuffle: bool) -> np.ndarray:
    """Int64[size], a permutation of 0, 1, ..., size - 1: a random one if `shuffle`, else the identity."""
    return np.random.default_rng(seed).permutation(size) if shuffle else np.arange(size)


class Batches(Sequence[Any]):
    """Batches as a function of the step: `batches[n]` is batch n, for n = 0, 1, ..., steps - 1.

    Epochs follow each other without a gap; a batch may span two. The number of steps may depend on `steps_per_epoch`:
    it is 0 until `with_steps` sets it.
    """

    def __init__(
        self,
        plan: Plan,
        epoch: Callable[[int], Sequence[Any] | np.ndarray],
        *,
        steps: int = 0,
    ) -> None:
        """
        Args:
          plan: sizes, order and seed.
          epoch: number of an epoch -> its items (rows, groups or prompts), in order; a pure function.
          steps: number of batches.
        """
        self.plan, self.steps = plan, steps
        self._epoch = lru_cache(maxsize=2)(epoch)
        self._starts = [0]  # the first item of each epoch that was planned, counted over all epochs
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.steps

    @property
    def shape_count(self) -> int:
        """Number of shapes of batches that can occur."""
        return len(self.plan.widths)

    @property
    def steps_per_epoch(self) -> float:
        """Steps of the first epoch; rows of later ones may pack into a few more or less."""
        return len(self._epoch(0)) / self.plan.batch_size

    def with_steps(self, steps: int) -> Self:
        """The same batches, `steps` of them."""
        batches = copy.copy(self)  # shares the epochs that are planned already
        batches.steps = steps
        return batches

    def _items(self, step: int) -> list[Any]:
        """The items of batch `step`."""
        first = step * self.plan.batch_size
        with self._lock:
            return [self._item(first + i) for i in range(self.plan.batch_size)]

    def _item(self, number: int) -> Any:
        while number >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._epoch(epoch)[number - self._starts[epoch]]


def iterate(batches: Batches) -> Any:
    """A Grain iterator that reads 4 batches ahead; get_state() and set_state() hold the number of the next step."""
    import grain

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
