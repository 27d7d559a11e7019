"""Scores on several hosts: reward functions run on host 0 only, reward models score a share on every host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import hosts
from jaxalign.rollout.rewards.rewards import Rewards


def scores_by_function(
    rewards: Rewards, prompts: Sequence[Any], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> dict[str, np.ndarray]:
    """Each function's own scores [N], before weights, the same on all hosts.

    A function may call a paid service, compare the whole batch or use random numbers, so one host calls it. A reward
    model scores each response by itself, and every host holds the model.

    Raises:
      RewardError: what `Rewards` raises, on the host where it failed.
      Mistake: on the other hosts, with the failed one's message.
    """
    if jax.process_count() == 1:
        return rewards.scores_by_function(prompts, responses, columns)

    def scores_of(names: Sequence[str], rows: slice) -> np.ndarray:
        part = {name: values[rows] for name, values in columns.items()}
        scores = rewards.scores_by_function(prompts[rows], responses[rows], part, names=names)
        return np.stack([scores[name] for name in names])

    count, scores = len(responses), {}
    models = [name for name in rewards.weights if name in rewards.models]
    functions = [name for name in rewards.weights if name not in rewards.models]
    if functions:
        values = hosts.run_on_first(lambda: scores_of(functions, slice(None)), len(functions), count)
        scores |= zip(functions, values, strict=True)
    if models:
        values = hosts.run_on_each(lambda rows: scores_of(models, rows), len(models), count)
        scores |= zip(models, values, strict=True)
    return {name: scores[name] for name in rewards.weights}
