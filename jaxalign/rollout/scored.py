"""Dynamic sampling: prompts whose responses are all worth the same teach a comparison nothing, and give way to others.

Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, section 3.2. The paper takes the next prompts of the data; here
those that stand in follow from the seed and the step alone, so that a run which resumes needs no cursor besides the
step, and the order of an epoch stays what it is without them: every prompt has its turn, and may stand in besides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxalign.rollout.engine.engine import Response


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Responses and what they are worth, those to one prompt side by side."""

    prompts: np.ndarray  # Int64[N], numbers
    responses: list[Response]
    texts: list[str]
    scores: np.ndarray  # Float32[N]
    terms: dict[str, np.ndarray]  # Float64[N], of each reward function

    @classmethod
    def joined(cls, parts: Sequence[Drawn]) -> Drawn:
        """All of them, in order."""
        return cls(
            np.concatenate([part.prompts for part in parts]),
            [response for part in parts for response in part.responses],
            [text for part in parts for text in part.texts],
            np.concatenate([part.scores for part in parts]),
            {name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms},
        )

    def take(self, rows: np.ndarray) -> Drawn:
        """Some of the responses, in the order given."""
        pick = lambda values: [values[i] for i in rows]  # noqa: E731
        terms = {name: values[rows] for name, values in self.terms.items()}
        return Drawn(self.prompts[rows], pick(self.responses), pick(self.texts), self.scores[rows], terms)


def differ(scores: np.ndarray) -> np.ndarray:
    """Bool[G], of scores [G n]: the responses to the prompt are not all worth the same."""
    return scores.max(axis=1) > scores.min(axis=1)


def stand_ins(count: int, chosen: np.ndarray, *, seed: int, step: int) -> np.ndarray:
    """The numbers of all prompts but the chosen, in an order of this step's own."""
    order = np.random.default_rng((seed, step, 1)).permutation(count)
    return order[~np.isin(order, chosen)]


def fill(
    draw: Callable[[np.ndarray, int], Drawn], chosen: np.ndarray, others: np.ndarray, *, n: int, rounds: int
) -> tuple[Drawn, dict[str, float]]:
    """As many groups of unequal scores as prompts were chosen, or fewer, and what is said of how they were found.

    Each round asks for as many prompts as should fill the rest by the share kept so far, and at most for as many as
    were chosen. Where no round finds any group, the chosen prompts' own are the answer: what they say of the policy
    is true, and their advantages are 0. `score_drawn` is the mean over all that was drawn, kept or not.

    Args:
      draw: (numbers of prompts, how many responses were drawn before) -> n responses to each.
      chosen: numbers of the step's prompts.
      others: that may stand in, the first first.
      n: responses to each.
      rounds: calls of `draw` at most.
    """
    wanted, parts, asked = len(chosen), [draw(chosen, 0)], len(chosen)
    while True:
        drawn = Drawn.joined(parts)
        kept = np.flatnonzero(differ(drawn.scores.reshape(-1, n)))
        if len(kept) >= wanted or len(parts) == rounds or not len(others):
            break
        more = math.ceil((wanted - len(kept)) * asked / max(len(kept), 1))
        count = min(more, wanted, len(others))
        parts.append(draw(others[:count], asked * n))
        others, asked = others[count:], asked + count
    said = {"sampling_rounds": len(parts), "kept_share": len(kept) / asked, "score_drawn": float(drawn.scores.mean())}
    groups = kept[:wanted] if len(kept) else np.arange(wanted)
    return drawn.take((groups[:, None] * n + np.arange(n)).reshape(-1)), said
