"""From responses and their scores to a batch that an update learns from.

From responses and their scores to pairs: of each prompt the best and the worst, where they differ in worth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.data.batches.groups import Responses
from jaxalign.data.read.tokens import Examples
from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.scored import differ
from jaxalign.types import RolloutBatch, TokenBatch


def rollout_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    *,
    scores: np.ndarray,
    advantages: np.ndarray | None = None,
    width: int,
    rows: int,
) -> RolloutBatch:
    """Prompts and responses side by side, padded on the right.

    Args:
      prompts: ids, one for each response.
      responses: what was drawn.
      scores: Float[N], of each response.
      advantages: Float[N], the same for all tokens of a response; None: a critic will say.
      width: tokens of a row.
      rows: of the batch; those beyond N are empty.
    """
    tokens, positions, segments = (np.zeros((rows, width), np.int32) for _ in range(3))
    mask = np.zeros((rows, width), bool)
    logps, gains = (np.zeros((rows, width), np.float32) for _ in range(2))
    each = np.zeros(len(responses)) if advantages is None else advantages
    given, ended = np.zeros(rows, np.float32), np.zeros(rows, bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(prompt) + len(response.tokens)
        answer = slice(len(prompt), length)
        tokens[row, :length] = [*prompt, *response.tokens]
        positions[row, :length], segments[row, :length] = np.arange(length), 1
        mask[row, answer], logps[row, answer], gains[row, answer] = True, response.logps, each[row]
        given[row], ended[row] = scores[row], response.finished
    columns = {"old_logps": logps, "scores": given, "ended": ended}
    if advantages is not None:
        columns["advantages"] = gains
    return RolloutBatch(TokenBatch(tokens=tokens, mask=mask, positions=positions, segment_ids=segments), columns)


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
