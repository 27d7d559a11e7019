"""What responses are worth, on all hosts: functions are asked on the first, reward models read a share on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import hosts
from jaxalign.rollout.rewards.rewards import Rewards


def by_name(
    rewards: Rewards, prompts: Sequence[Any], responses: Sequence[str], columns: dict[str, Sequence[Any]]
) -> dict[str, np.ndarray]:
    """Each function's own scores [N], before weights, the same on all hosts.

    A function may ask a service, see the whole batch or draw lots, so one host calls it. A reward model's score is of
    one response, whatever is beside it, and every host holds the model.

    Raises:
      RewardError: what `Rewards` raises, on the host where it failed.
      RuntimeError: another host failed.
    """
    if jax.process_count() == 1:
        return rewards.by_name(prompts, responses, columns)

    def judged(names: Sequence[str], rows: slice) -> np.ndarray:
        part = {name: values[rows] for name, values in columns.items()}
        found = rewards.by_name(prompts[rows], responses[rows], part, names=names)
        return np.stack([found[name] for name in names])

    count, found = len(responses), {}
    models = [name for name in rewards.weights if name in rewards.models]
    functions = [name for name in rewards.weights if name not in rewards.models]
    if functions:
        said = hosts.from_first(lambda: judged(functions, slice(None)), len(functions), count)
        found |= zip(functions, said, strict=True)
    if models:
        said = hosts.from_each(lambda rows: judged(models, rows), len(models), count)
        found |= zip(models, said, strict=True)
    return {name: found[name] for name in rewards.weights}
