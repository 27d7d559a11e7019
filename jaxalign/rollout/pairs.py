"""From responses and their scores to pairs: of each prompt the best and the worst, where they differ in worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.data.groups import Responses
from jaxalign.data.tokens import Examples
from jaxalign.rollout.dynamic import differ
from jaxalign.rollout.engine import Response


def best_and_worst(scores: np.ndarray) -> np.ndarray:
    """Int64[pairs 2], of scores [G n]: the numbers of each prompt's best and worst response, the first of equals.

    Prompts whose responses are all worth the same have none.
    """
    first = np.arange(len(scores)) * scores.shape[1]
    found = np.stack([first + scores.argmax(axis=1), first + scores.argmin(axis=1)], axis=1)
    return found[differ(scores)]


def pairs_of(prompts: Sequence[Sequence[int]], responses: Sequence[Response], chosen: np.ndarray) -> Responses:
    """Groups of two, the better one first, each response behind its prompt.

    Args:
      prompts: ids, one for each response.
      responses: what was drawn.
      chosen: Int64[pairs 2], numbers of responses.
    """
    parts = []
    for row in chosen.reshape(-1):
        ids = np.array([*prompts[row], *responses[row].tokens], np.int32)
        parts.append((ids, np.arange(len(ids)) >= len(prompts[row])))
    return Responses(Examples.of(parts), np.arange(chosen.size).reshape(-1, 2), {})
