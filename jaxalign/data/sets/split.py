"""Which rows are learned from and which are held out, whatever the rows become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxalign.data.read import sources
from jaxalign.mistake import Mistake

MAX_DEFAULT_EVAL = 512  # examples held out by share


class Set(Protocol):
    """What rows become: examples, or groups of them."""

    def __len__(self) -> int: ...
    def take(self, indices: Any) -> Any: ...


S = TypeVar("S", bound=Set)
# (source, its rows, where they are from) -> a set; called only with rows
ReadFn = Callable[[sources.Source, sources.Loaded, str], S]


def apart(examples: Set) -> np.ndarray:
    """Int64[N], each example a number of its own."""
    return np.arange(len(examples))


def load_sets(
    spec: str,
    eval_spec: str | None,
    read: ReadFn,
    *,
    eval_share: float,
    seed: int,
    numbers: Callable[[S], np.ndarray] = apart,
) -> tuple[list[S], list[float | None], list[S]]:
    """(training sets, their weights, held-out sets).

    Held out are, in this order of preference: the rows of `eval_spec`; the test or validation split of the data
    themselves; a seeded share of the examples, of which those with one number stay together.
    """
    found, given = sources.parse(spec), sources.parse(eval_spec) if eval_spec is not None else []
    for source in [*found, *given]:  # before the first is read, which may take long
        sources.check_exists(source)
    held = [_held_out(source, read) for source in given]
    train = [_given(source, read) for source in found]
    if eval_spec is None:
        held = [part for s in found if s.split is None and (part := _own_held_out(s, read)) is not None]
    if not any(len(part) for part in held) and eval_share > 0:
        train, held = _hold_out(train, eval_share, seed, numbers)
    return train, [source.weight for source in found], held


def _given(source: sources.Source, read: ReadFn) -> S:
    loaded = sources.load(source)
    if not len(loaded.rows):
        raise Mistake(f"data {source.name} has no rows")
    return read(source, loaded, _where(source, loaded))


def _held_out(source: sources.Source, read: ReadFn) -> S:
    """Of a file of its own: the part that says it is held out, else all of it."""
    loaded = sources.load(source, held_out=True)
    return read(source, loaded, _where(source, loaded)) if len(loaded.rows) else _given(source, read)


def _own_held_out(source: sources.Source, read: ReadFn) -> S | None:
    loaded = sources.load(source, held_out=True)
    return read(source, loaded, _where(source, loaded)) if len(loaded.rows) else None


def _where(source: sources.Source, loaded: sources.Loaded) -> str:
    return f"{source.name}:{loaded.split}" if loaded.split else source.name


def _hold_out(train: list[S], share: float, seed: int, numbers: Callable[[S], np.ndarray]) -> tuple[list[S], list[S]]:
    """A seeded share of every set, at most MAX_DEFAULT_EVAL in all, and never all of a set."""
    kept, held = [], []
    for which, examples in enumerate(train):
        count = min(round(share * len(examples)), MAX_DEFAULT_EVAL // len(train), len(examples) - 1)
        drawn = _draw(numbers(examples), count, np.random.default_rng((seed, which)))
        held.append(examples.take(np.flatnonzero(drawn)))
        kept.append(examples.take(np.flatnonzero(~drawn)))
    return kept, held


def _draw(numbers: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Bool[N], at most `count` examples, each with all that have its number.

    If no number has so few, those of one of the rarest; where all have one number, each is drawn for itself.
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
