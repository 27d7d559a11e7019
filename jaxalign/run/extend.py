"""Schedules of runs that go on to another last step than they were planned for.

A run's schedule is a list of last steps: [4] falls to 0 after step 4; [4, 8] falls to 0 there, begins anew with its
warm-up, and falls again. Checkpoints hold it, so a continued run need not be told twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxalign.config.shared import TrainConfig
from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, read_object
from jaxalign.run.folder import read_run
from jaxalign.training.checkpoint import EXTRAS
from jaxalign.training.program import learning_rate

log = logging.getLogger(__name__)


SCHEDULE = "schedule"  # in a checkpoint: last steps of the schedules of the learning rate


def counted_steps(steps: int | None, epochs: float, per_epoch: float) -> int:
    """`steps`; where it is None, as many as `epochs` of the data take."""
    return steps if steps is not None else max(1, int(np.ceil(epochs * per_epoch)))


def earlier_ends(
    config: TrainConfig, steps: int, *, per_epoch: float, exists: bool, updates: int, logs: bool = False
) -> list[int]:
    """Steps after which the schedule begins anew, of a run that goes on to `steps`: none, unless it was extended.

    Args:
      config: its `optimizer.extend` says what the schedule does if it was planned for other steps.
      steps: last step of the run from now on.
      per_epoch: steps in an epoch of its data.
      exists: whether its folder holds it already.
      updates: optimizer updates in a step.
      logs: log a change of the schedule.

    Raises:
      Mistake: the learning rate depends on the last step, and the config does not say what it does now.
    """
    extend = config.optimizer.extend
    if extend != "refuse" and config.optimizer.schedule == "constant":
        raise Mistake(f"`optimizer.extend` {extend}: a constant learning rate has no last step; leave it out")
    if extend != "refuse" and not exists:
        raise Mistake(f"`optimizer.extend` {extend}: {config.output} holds no run to extend; leave it out")
    checkpoint = _newest_extras(Path(config.output) / "checkpoints") if exists else None
    if checkpoint is None:
        return []
    done, extras = checkpoint
    planned = extras.whole_numbers(SCHEDULE)  # older versions wrote none, and stretched
    if not planned:
        first = read_run(config.output)["config"]
        end = counted_steps(first.get("steps"), first.get("epochs", 1.0), per_epoch)
        planned = [end if done <= end else steps]
    if done >= steps:
        return [step for step in planned[:-1] if step < steps]
    return _continued(config, steps, planned, done=done, updates=updates, logs=logs)


def _newest_extras(directory: Path) -> tuple[int, Fields] | None:
    """(step, extras) of the newest checkpoint whose extras can be read, without opening the folder for writing."""
    for step in sorted((int(f.name) for f in directory.glob("*") if f.name.isdigit()), reverse=True):
        with contextlib.suppress(Mistake):
            return step, read_object(directory / str(step) / EXTRAS)
    return None


def _continued(
    config: TrainConfig, steps: int, planned: Sequence[int], *, done: int, updates: int, logs: bool
) -> list[int]:
    """The same after `done` steps of schedules whose last steps are `planned`."""
    schedule, extend, end = config.optimizer.schedule, config.optimizer.extend, planned[-1]
    before = [step for step in planned[:-1] if step < steps]
    if steps == end or schedule == "constant":
        return before

    def rate(step: int, last: int, earlier: Sequence[int]) -> str:
        schedule = learning_rate(config, last, earlier, updates=updates)
        return f"{np.asarray(schedule((step - 1) * updates)).item():.3g}"

    ways = {"stretch": f"gives it that of {steps} steps, {rate(done + 1, steps, before)} at step {done + 1}"}
    if steps > end:
        ways["restart"] = f"begins it anew after step {end}, {rate(end + 1, steps, planned)} at step {end + 1}"
    if extend not in ways:
        raise Mistake(
            f"`steps` {steps}: {config.output} was planned for {end}, and the {schedule} learning rate depends on that "
            f"(it is {rate(max(done, 1), end, planned[:-1])} at step {max(done, 1)}). "
            + "; ".join(f"`optimizer.extend` {way} {effect}" for way, effect in ways.items()),
            setting="optimizer.extend",
        )
    if logs:
        log.info("the %s learning rate was planned for %d steps; %s %s", schedule, end, extend, ways[extend])
    return [*planned] if extend == "restart" else before
