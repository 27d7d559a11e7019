"""What the quickstart's reward model is worth: on pairs it has not seen, and beside the judge that knows the truth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.quickstart import world
from jaxalign.rollout.rewards.scorer import load_reward_model


class Agreement(NamedTuple):
    """Shares of pairs that the reward model orders rightly."""

    accuracy: float  # of a good and a bad answer to held-out questions
    pairs: int
    with_judge: float  # of two stages' answers to one question, where the judge's scores differ
    compared: int
    seconds: float

    def sentence(self) -> str:
        return (
            f"The reward model, trained in {self.seconds:.0f} seconds, prefers the good answer in {self.accuracy:.2f} "
            f"of {self.pairs} held-out pairs, and agrees with the judge on {self.with_judge:.2f} of {self.compared} "
            "pairs of answers that the stages before it gave."
        )


def measure(
    model: str, seed: int, questions: Sequence[world.Question], stages: Sequence[Any], seconds: float
) -> Agreement:
    """Of the reward model in a folder, on the questions and on what the stages answered to them."""
    scorer = load_reward_model(model, batch_size=64)
    held = world.held_out_pairs(seed, questions)
    prompts = [row["prompt"] for row in held]
    chosen, rejected = (scorer(prompts, [row[name] for row in held]) for name in ("chosen", "rejected"))
    scores = np.stack([scorer(prompts, stage.answers, finished=stage.finished) for stage in stages])
    gold = np.array([[verdict.score for verdict in stage.verdicts] for stage in stages])
    share, compared = agreement(scores, gold)
    return Agreement(float(np.mean(chosen > rejected)), len(held), share, compared, seconds)


def agreement(scores: np.ndarray, gold: np.ndarray) -> tuple[float, int]:
    """(share of pairs that both order alike, number of pairs that gold orders), of answers [stages questions].

    Pairs are of two answers to one question.
    """
    alike = []
    for a, b in itertools.combinations(range(len(scores)), 2):
        differ = gold[a] != gold[b]
        alike += list(((scores[a] > scores[b]) == (gold[a] > gold[b]))[differ])
    return float(np.mean(alike)) if alike else 0.0, len(alike)
