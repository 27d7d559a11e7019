"""Rewards of your own: functions of one response or of all of them, plain or async, from any module.

    python examples/own_reward.py --model MODEL --data PROMPTS --output RUN

is short for

    PYTHONPATH=examples jaxalign grpo --model MODEL --data PROMPTS --output RUN \
        --reward "own_reward:share_of(word='dog') + 0.1*own_reward:unlike_others"

The first parameter decides how a function is called: one named `prompt` gets one prompt and one response, any other
gets sequences of both. Columns of the data arrive by keyword, as do values in the text. The score of a response is the
weighted sum; metrics.jsonl has it as `score`, and that of each function as `scores/share_of`, `scores/unlike_others`.
Name and keywords are checked before a model is loaded, and a column that a function requires before the first step.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from jaxalign.cli.main import main

REWARD = "own_reward:share_of(word='dog') + 0.1*own_reward:unlike_others"


def share_of(prompt: str, response: str, *, word: str) -> float:
    """Share of the response's words that are `word`, from 0 to 1; called once for each response."""
    words = response.split()
    return words.count(word) / max(len(words), 1)


def unlike_others(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of the other responses to the same prompt that differ from a response; called once for all of a step.

    1 where a prompt has one response only.
    """
    counts, same = Counter(prompts), Counter(zip(prompts, responses, strict=True))
    return [
        1 - (same[prompt, response] - 1) / max(counts[prompt] - 1, 1)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def train(arguments: Sequence[str]) -> int:
    """Runs `jaxalign grpo` with the sum of both rewards; the exit status."""
    return main(["grpo", *arguments, "--reward", REWARD])


if __name__ == "__main__":
    raise SystemExit(train(sys.argv[1:]))
