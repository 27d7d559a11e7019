"""Schedules of runs that go on to another last step than they were planned for.

A run's schedule is a list of last steps: [4] falls to 0 after step 4; [4, 8] falls to 0 there, begins anew with its
warm-up, and falls again. Checkpoints hold it, so a continued run need not be told twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from jaxalign.config.shared import TrainConfig
from jaxalign.mistake import Mistake
from jaxalign.training.program import learning_rate

log = logging.getLogger(__name__)


def earlier_ends(
    config: TrainConfig, steps: int, planned: Sequence[int], *, done: int, updates: int, logs: bool = False
) -> list[int]:
    """Steps after which the schedule begins anew, of a run that goes on to `steps`.

    Args:
      config: its `optimizer.extend` says what the schedule does if it was planned for other steps.
      steps: last step of the run from now on.
      planned: last steps of its schedules so far.
      done: steps that were taken.
      updates: optimizer updates in a step.
      logs: log a change of the schedule.

    Raises:
      Mistake: the learning rate depends on the last step, and the config does not say what it does now.
    """
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
