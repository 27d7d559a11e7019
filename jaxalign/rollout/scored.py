"""Scored responses, and dynamic sampling: prompts whose responses all score the same are replaced by others.

Equal scores give a comparison nothing to learn from. Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, section
3.2, take the next prompts of the data. Here the replacements follow from the seed and the step alone, so a run that
resumes needs no cursor besides the step, and the order of an epoch is the same with or without them: every prompt has
its turn, and may be a replacement besides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxalign.rollout.engine.engine import Response


@dataclasses.dataclass(frozen=True)
class ScoredResponses:
    """N responses and their scores, those to one prompt side by side."""

    prompts: np.ndarray  # Int64[N], the number of each one's prompt in the data
    responses: list[Response]
    texts: list[str]
    scores: np.ndarray  # Float32[N]
    terms: dict[str, np.ndarray]  # Float64[N] by reward function: its own scores, before weights

    @classmethod
    def concatenate(cls, parts: Sequence[ScoredResponses]) -> ScoredResponses:
        """All of them, in order."""
        return cls(
            np.concatenate([part.prompts for part in parts]),
            [response for part in parts for response in part.responses],
            [text for part in parts for text in part.texts],
            np.concatenate([part.scores for part in parts]),
            {name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms},
        )

    def take(self, rows: np.ndarray) -> ScoredResponses:
        """The responses at `rows`, in that order."""
        return ScoredResponses(
            self.prompts[rows],
            [self.responses[i] for i in rows],
            [self.texts[i] for i in rows],
            self.scores[rows],
            {name: values[rows] for name, values in self.terms.items()},
        )


def has_spread(scores: np.ndarray) -> np.ndarray:
    """Bool[G], of scores [G n], True where a prompt's n responses have different scores."""
    return scores.max(axis=1) > scores.min(axis=1)


def score_std(scores: np.ndarray) -> float:
    """Mean over prompts of the standard deviation of a prompt's n scores, of scores [G n]; 0 for n = 1.

    It has n - 1 degrees of freedom, as the one that `ops/advantages.py: group_advantages` divides by.
    """
    return float(scores.std(axis=1, ddof=1).mean()) if scores.shape[1] > 1 else 0.0


def replacements(count: int, chosen: np.ndarray, *, seed: int, step: int) -> np.ndarray:
    """Numbers of all `count` prompts but the chosen, in an order of this step's own."""
    order = np.random.default_rng((seed, step, 1)).permutation(count)
    return order[~np.isin(order, chosen)]


def draw_with_spread(
    draw: Callable[[np.ndarray, int], ScoredResponses],
    chosen: np.ndarray,
    others: np.ndarray,
    *,
    n: int,
    rounds: int,
) -> tuple[ScoredResponses, dict[str, float]]:
    """(responses to as many prompts as were chosen, or fewer, each prompt's scores with a spread; metrics).

    A round draws as many prompts as should fill the rest, at the share with a spread so far, and at most as many as
    were chosen. If no round finds any, the chosen prompts' own responses are returned: they are the policy's, and their
    advantages are 0. Metrics: `sampling_rounds`; `kept_share`, that of drawn prompts whose scores have a spread; and
    `score_drawn`, the mean over all drawn responses, whether they are returned or not.

    Args:
      draw: (numbers of prompts, count of responses drawn before) -> n responses to each.
      chosen: numbers of the step's prompts.
      others: numbers of the replacements, in the order in which they are used.
      n: responses to each prompt.
      rounds: largest number of calls of `draw`.
    """
    wanted, parts, prompts_drawn = len(chosen), [draw(chosen, 0)], len(chosen)
    while True:
        drawn = ScoredResponses.concatenate(parts)
        groups = np.flatnonzero(has_spread(drawn.scores.reshape(-1, n)))
        if len(groups) >= wanted or len(parts) == rounds or not len(others):
            break
        expected = math.ceil((wanted - len(groups)) * prompts_drawn / max(len(groups), 1))
        count = min(expected, wanted, len(others))
        parts.append(draw(others[:count], prompts_drawn * n))
        others, prompts_drawn = others[count:], prompts_drawn + count
    metrics = {
        "sampling_rounds": len(parts),
        "kept_share": len(groups) / prompts_drawn,
        "score_drawn": float(drawn.scores.mean()),
    }
    groups = groups[:wanted] if len(groups) else np.arange(wanted)
    return drawn.take((groups[:, None] * n + np.arange(n)).reshape(-1)), metrics
