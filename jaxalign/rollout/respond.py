"""Ids in, ids out: the engine for callers that want no more; and the text of a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.types import PyTree

CONTEXT = 8  # tokens of a prompt, which tell how the first of a response is written


def generate_ids(
    graphdef: Any,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    sampling: Sampling,
    batch_size: int = 16,
) -> list[tuple[list[int], bool]]:
    """(response ids without the terminator, whether it ended with one) for each prompt, in the order given."""
    requests = [Request(tuple(prompt), seed) for seed, prompt in enumerate(prompts)]
    found = LocalEngine(graphdef, slots=batch_size).generate(params, requests, key, sampling=sampling)
    return [(without_terminator(response.tokens, sampling), response.finished) for response in found]


def text_after(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What ids add to the text of the prompt that they continue.

    Llama's and Mistral's first tokenizers write no blank before the first word of a text, so that ids by themselves,
    "▁upon ▁a ▁time", would lose theirs, and what judges the text would read "Onceupon a time".
    """
    known = list(prompt[-CONTEXT:])
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (known, [*known, *ids]))
    # a prompt may end within a character
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(ids), skip_special_tokens=True)


def without_terminator(tokens: np.ndarray, sampling: Sampling) -> list[int]:
    """The ids of a response that are its text."""
    return tokens[:-1].tolist() if tokens[-1] in sampling.terminators else tokens.tolist()
