"""The training loop: next batch, step, one step later its metrics; evaluations, checkpoints and stopping in between."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.clock import elapsed
from jaxalign.mistake import Mistake
from jaxalign.outside import Fields
from jaxalign.training.sharding import put_batch
from jaxalign.training.signals import StopRequest
from jaxalign.training.state import TrainState
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 3
SOURCE_SECONDS = "source_seconds"
PROFILED_STEPS = range(3, 6)  # counted from where this process starts: after compilation and one warm step

Row = dict[str, Any]
# state -> (host-local numpy batch, more of the step's row); on-policy data are made of state.params
SourceFn = Callable[[TrainState], tuple[Any, Row]]


class NotFiniteError(Mistake):
    """Several steps in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass
class Progress:
    """Counters that outlive a step and an interruption, besides the state and the data cursor."""

    step: int = 0
    tokens: int = 0  # trained on so far, padding aside
    skipped: int = 0  # steps skipped so far
    skipped_in_a_row: int = 0
    ended: bool = False  # the run ended before its last step, so there are no more

    @classmethod
    def read(cls, stored: Fields) -> Progress:
        """The progress that a checkpoint stores; counters that an older version did not have are at their start."""
        return cls(**{f.name: stored.get(f.name, type(f.default), f.default) for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls: they are passed in, so it knows no disk format, no model and no terminal."""

    record: Callable[[Row], None]
    save: Callable[[TrainState, Progress, Row], None]  # the newest row says how good the state is
    evaluate: Callable[[TrainState, int], Row] | None = None  # (state, step) -> metrics, `eval_loss` among them
    learning_rate: Callable[[int], Any] | None = None  # of a step, counted without those that were skipped
    last_because: Callable[[Row], str | None] | None = None  # the reason why a row is the last; None: the run goes on


def offline(batches: Iterator[Any]) -> SourceFn:
    """Batches that do not depend on the state."""
    return lambda state: (next(batches), {})


def fit(
    train_step: Callable,
    state: TrainState,
    frozen: PyTree,
    source: SourceFn,
    hooks: Hooks,
    *,
    mesh: Mesh,
    steps: int,
    progress: Progress | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    save_minutes: float = 0,
    profile: Path | None = None,
) -> tuple[TrainState, int | None]:
    """Runs until `steps` and returns the state, and the signal that stopped it early, if one did.

    The metrics of step n - 1 are fetched after step n is dispatched, so the device never waits for the host. A source
    that has metrics of its own needs the state of step n - 1 itself, so they are fetched at once. Row n is recorded
    before a checkpoint of step n is saved. A run that resumes records the same rows that it would have.

    Hosts exchange a word twice a step, by the network and not by the devices: that each has its batch, without which
    none begins the step, and whether to save or stop after it.

    Args:
      train_step: (state, frozen, batch) -> (state, metrics), jitted; it may donate the state.
      source: gives the next batch; should it fail, on one host or on all, what was trained is saved first.
      hooks: where rows and checkpoints go, and what evaluates.
      eval_every: steps between evaluations; 0: before the first step and after the last only.
      save_every: steps between checkpoints; the last step is always saved.
      save_minutes: minutes after which a checkpoint is due though those steps are not done; 0: never.
      profile: folder for a profiler trace of a few steps.

    Raises:
      NotFiniteError: several steps in a row were skipped; the last checkpoint is as it was.
      HostError: another host has failed.
    """
    progress = progress or Progress()
    clock, saves = _Clock(), _Saves(save_every, save_minutes, steps)
    with hosts.telling_others(), StopRequest() as stop:
        if progress.step == 0 and hooks.evaluate:
            hooks.record({"step": 0, **hooks.evaluate(state, 0)})
            clock.reset()
        pending: tuple[int, Any, Row] | None = None
        unsaved: Row | None = None  # the newest row, where no checkpoint has its state
        profiler = _Profiler(profile, progress.step, steps)
        for step in range(progress.step + 1, steps + 1):
            began = time.perf_counter()
            try:
                batch, source_metrics = source(state)
                hosts.exchange(step)
            except Exception as error:
                if hosts.stop_together(error):
                    if pending:
                        hooks.record(unsaved := _finish(pending, progress, hooks, clock))
                    if unsaved:
                        hooks.save(state, progress, unsaved)
                raise
            if source_metrics:
                source_metrics = source_metrics | {SOURCE_SECONDS: elapsed(began)}
            profiler.before(step)
            state, metrics = train_step(state, frozen, put_batch(batch, mesh))
            if pending:
                hooks.record(_finish(pending, progress, hooks, clock))
            pending = step, metrics, source_metrics

            evaluating = hooks.evaluate and _due(step, eval_every, steps)
            profiler.after(step, metrics)
            row: Row | None = None
            if evaluating or source_metrics or hooks.last_because:
                row, pending = _finish(pending, progress, hooks, clock), None
            signal, saving = saves.agreed(step, stop.signal)
            if saving and row is None:
                row, pending = _finish(pending, progress, hooks, clock), None
            if row is not None:
                unsaved = row
                if evaluating:
                    row |= _joined(row, hooks.evaluate(state, step))
                hooks.record(row)
                if hooks.last_because and (why := hooks.last_because(row)):
                    log.warning("step %d is the last: %s", step, why)
                    progress.ended = True
                if saving or progress.ended:
                    hooks.save(state, progress, row)
                    saves.done()
                    unsaved = None
                if evaluating or saving:
                    clock.reset()
            if signal is not None or progress.ended:
                return state, signal
    return state, None


class _Saves:
    """Checkpoints that are due: by steps, by minutes since the last one, and before a stop."""

    def __init__(self, every: int, minutes: float, steps: int) -> None:
        self._every, self._minutes, self._steps = every, minutes, steps
        self.done()

    def done(self) -> None:
        self._last = time.monotonic()

    def agreed(self, step: int, signal: int | None) -> tuple[int | None, bool]:
        """(the signal that stops all hosts after `step`, whether all save): of any host's signal and host 0's clock."""
        late = self._minutes > 0 and time.monotonic() - self._last > 60 * self._minutes
        signals, are_late = zip(*hosts.exchange([signal or 0, late]), strict=True)
        stopping = max(signals) or None
        return stopping, stopping is not None or are_late[0] or _due(step, self._every, self._steps)


def _due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _joined(row: Row, others: Row) -> Row:
    """Both; no name may be in both, for one value would then be lost."""
    if repeated := sorted(row.keys() & others.keys()):
        raise AssertionError(f"two metrics of step {row['step']} have the same name: {', '.join(repeated)}")
    return row | others


def _finish(pending: tuple[int, Any, Row], progress: Progress, hooks: Hooks, clock: _Clock) -> Row:
    """The row of a dispatched step; waits for the device."""
    step, metrics, source_metrics = pending
    row = _joined({"step": step}, {name: float(value) for name, value in jax.device_get(metrics).items()})
    row = _joined(row, source_metrics)
    seconds = clock.lap()
    update = step - 1 - progress.skipped
    skipped, tokens = row.pop("skipped") > 0, int(row.pop("tokens"))
    progress.step = step
    progress.tokens += tokens
    progress.skipped += skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
    if hooks.learning_rate:
        row["learning_rate"] = float(hooks.learning_rate(update))
    row |= {"skipped_steps": progress.skipped, "num_tokens": progress.tokens}
    row |= {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
    if SOURCE_SECONDS in row:
        training = max(seconds - row.pop(SOURCE_SECONDS), 1e-9)
        row |= {"training_seconds": training, "trained_tokens_per_second": tokens / training}
    if skipped:
        log.warning("step %d: loss %s, grad_norm %s; the step was skipped", step, row["loss"], row["grad_norm"])
    if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        hooks.record(row)
        raise NotFiniteError(
            f"steps {step - MAX_SKIPPED_IN_A_ROW + 1} to {step} had a loss or gradient that is not finite; lower "
            "`optimizer.learning_rate`, or look at the rows of those steps"
        )
    return row


class _Clock:
    """Seconds between the ends of steps, without compilation and what happened between `reset` and the next start."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        seconds = elapsed(self._last)
        self.reset()
        return max(seconds, 1e-9)


class _Profiler:
    """A trace of `PROFILED_STEPS` of this process, if a folder was given."""

    def __init__(self, folder: Path | None, start: int, steps: int):
        self._folder = folder
        self._first, self._last = start + PROFILED_STEPS.start, start + PROFILED_STEPS.stop - 1
        self._running = False
        if folder and steps < self._last:
            log.warning("no profile: it is of steps %d to %d, and the last is %d", self._first, self._last, steps)

    def before(self, step: int) -> None:
        if self._folder and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        if self._running and step == self._last:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._running = False
            log.info("profiler trace of steps %d to %d: %s", self._first, self._last, self._folder)
