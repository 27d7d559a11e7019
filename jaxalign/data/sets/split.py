"""Training and held-out data of a command, whatever its rows become: examples, or groups of responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from jaxalign.data.batches.plan import Mixture
from jaxalign.data.read import sources
from jaxalign.mistake import Mistake
from jaxalign.outside import brief

MAX_DEFAULT_EVAL = 512  # examples held out by share


class Items(Protocol):
    """The rows of one source, once they are read: `Examples`, or `Responses` in groups."""

    def __len__(self) -> int: ...
    def take(self, indices: Any) -> Any: ...


S = TypeVar("S", bound=Items)
# (source, its rows, where they are from) -> items; called only with rows
ReadFn = Callable[[sources.Source, sources.Loaded, str], S]


@dataclasses.dataclass(frozen=True)
class Set(Generic[S]):
    """Data that a command trains on and holds out: S is `Examples` of supervised data, `Responses` of feedback."""

    train: Mixture  # of S
    held_out: S
    prompts: list[list[int]] = dataclasses.field(default_factory=list)  # ids, held out, for samples during training

    @property
    def responses(self) -> S:
        """The training groups of feedback."""
        return self.train.examples


def singly(items: Items) -> np.ndarray:
    """Int64[N], another number for each item."""
    return np.arange(len(items))


def load(
    spec: str,
    eval_spec: str | None,
    read: ReadFn,
    join: Callable[[Sequence[S]], S],
    *,
    eval_share: float,
    seed: int,
    numbers: Callable[[S], np.ndarray] = singly,
) -> Set[S]:
    """The set of `data` and `eval_data`, without prompts.

    Held out are, in this order of preference: the rows of `eval_spec`; the test or validation split of the data
    themselves; a seeded share of the items, of which those with one number stay together.

    Args:
      spec: as in `sources.parse`, and so `eval_spec`.
      read: makes items of the rows of a source.
      join: all items of several sources, in order.
      numbers: Int64[N] of items, equal where they must not be parted.
    """
    train_sources = sources.parse(spec)
    eval_sources = [] if eval_spec is None else sources.parse_unweighted(eval_spec, "eval_data")
    for source in [*train_sources, *eval_sources]:  # before the first is read, which may take long
        sources.check_exists(source)
    held_out = [_eval_data(source, read) for source in eval_sources]
    train = [_training_part(source, read) for source in train_sources]
    if eval_spec is None:
        parts = [_held_out_part(source, read) for source in train_sources if source.split is None]
        held_out = [part for part in parts if part is not None]
    if not any(len(part) for part in held_out) and eval_share > 0:
        train, held_out = _hold_out(train, eval_share, seed, numbers)
    everything = join(train) if len(train) > 1 else train[0]
    mixture = Mixture.of(everything, [len(part) for part in train], [source.weight for source in train_sources])
    return Set(mixture, join(held_out) if any(len(part) for part in held_out) else train[0].take([]))


def _training_part(source: sources.Source, read: ReadFn) -> S:
    loaded = sources.load(source)
    if not len(loaded.rows):
        raise Mistake(f"data {source.name} has no rows")
    return read(source, loaded, _where(source, loaded))


def _held_out_part(source: sources.Source, read: ReadFn) -> S | None:
    """The test or validation split of a source, if it has one."""
    loaded = sources.load(source, held_out=True)
    return read(source, loaded, _where(source, loaded)) if len(loaded.rows) else None


def _eval_data(source: sources.Source, read: ReadFn) -> S:
    """From `eval_data`: the test or validation split of a source, or all of a source that has none."""
    part = _held_out_part(source, read)
    return _training_part(source, read) if part is None else part


def _where(source: sources.Source, loaded: sources.Loaded) -> str:
    return f"{source.name}:{brief(loaded.split, 40)}" if loaded.split else source.name


def _hold_out(train: list[S], share: float, seed: int, numbers: Callable[[S], np.ndarray]) -> tuple[list[S], list[S]]:
    """(the rest, a seeded share) of every source: at most MAX_DEFAULT_EVAL in all, and never all of a source."""
    rest, held_out = [], []
    for which, items in enumerate(train):
        count = min(round(share * len(items)), MAX_DEFAULT_EVAL // len(train), len(items) - 1)
        drawn = _draw(numbers(items), count, np.random.default_rng((seed, which)))
        held_out.append(items.take(np.flatnonzero(drawn)))
        rest.append(items.take(np.flatnonzero(~drawn)))
    return rest, held_out


def _draw(numbers: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Bool[N], True on at most `count` items, each drawn with all that have its number.

    If no number has so few items, those of one of the rarest numbers are drawn; where all items have one number, each
    is drawn for itself.
    """
    sizes = np.bincount(numbers)
    if len(sizes) == 1:
        numbers, sizes = np.arange(len(numbers)), np.ones(len(numbers), np.int64)
    drawn, room = [], max(count, sizes.min()) if count > 0 else 0
    for number in generator.permutation(len(sizes)):
        if room == 0:
            break
        if sizes[number] <= room:
            drawn.append(number)
            room -= sizes[number]
    return np.isin(numbers, drawn)
