"""The reward functions that come with the package: matches, patterns, lengths, a lexicon, reward models."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxalign.mistake import Mistake
from jaxalign.rollout.rewards.calls import RewardFn
from jaxalign.rollout.rewards.scorer import Scorer, load_reward_model

Texts = Sequence[str]
DTYPES = ("float32", "bfloat16")  # of a reward model
FROM_DATA = ("answer", "tokens")  # arguments of REWARDS that are columns; the others are bound by the user


def exact_match(prompts: Texts, responses: Texts, *, answer: Sequence[str | float]) -> list[float]:
    """1 where the response is the answer, apart from blanks around both; else 0."""
    return [
        float(response.strip() == str(checked_answer(right)).strip())
        for response, right in zip(responses, answer, strict=True)
    ]


def numeric_match(prompts: Texts, responses: Texts, *, answer: Sequence[str | float]) -> list[float]:
    """1 where the response's number is the answer's, else 0; of each the first number behind ####, or the last.

    Commas in numbers and a dollar sign before them are ignored, as GSM8K writes them.
    """
    return [
        float(_number(response) is not None and _number(response) == _number(checked_answer(right)))
        for response, right in zip(responses, answer, strict=True)
    ]


def checked_answer(value: Any) -> str | float:
    """The answer of a row. Raises Mistake where it is neither a text nor a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Mistake(f"`answer` holds {value!r}; it must be a text or a number")
    return value


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def _number(text: str | float) -> float | None:
    if not isinstance(text, str):
        return float(text)
    _, marked, final = text.rpartition("####")
    numbers = _NUMBER.findall(final if marked else text)
    return float(numbers[0 if marked else -1].replace(",", "").replace("$", "")) if numbers else None


def regex(prompts: Texts, responses: Texts, *, pattern: str) -> list[float]:
    """1 where the pattern (of Python's `re`) matches somewhere in the response, else 0."""
    compiled = re.compile(pattern)
    return [float(compiled.search(response) is not None) for response in responses]


def json_schema(prompts: Texts, responses: Texts, *, required: Sequence[str] = ()) -> list[float]:
    """1 where the whole response is a JSON object with the required names, else 0."""
    return [float(_is_object(response, required)) for response in responses]


def _is_object(text: str, required: Sequence[str]) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(required) <= set(value)


def length(prompts: Texts, responses: Texts, *, target: int) -> list[float]:
    """-|words - target| / target: 0 at the target."""
    if target <= 0:
        raise Mistake(f"target={target} must be above 0")
    return [-abs(len(response.split()) - target) / target for response in responses]


def overlong(prompts: Texts, responses: Texts, *, tokens: Sequence[int], max_length: int, buffer: int) -> list[float]:
    """0 for up to max_length - buffer tokens, from there evenly down to -1 at max_length, and -1 beyond.

    Args:
      prompts: not read.
      responses: not read.
      tokens: number of each response's tokens, its terminator included.
      max_length: usually the run's `max_new_tokens`, so that a response that was cut off costs 1.
      buffer: number of tokens over which the penalty grows.

    Reference: Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, eq. 13.
    """
    if not 0 < buffer <= max_length:
        raise Mistake(f"buffer={buffer} must be above 0 and at most max_length={max_length}")
    return [-min(max((count - max_length + buffer) / buffer, 0.0), 1.0) for count in tokens]


def lexicon(prompts: Texts, responses: Texts, *, path: str) -> list[float]:
    """Σ over words of their score in a file of `word<tab>score` lines, such as VADER's lexicon; unknown words are 0."""
    scores = _lexicon(path)
    return [sum(scores.get(word, 0.0) for word in re.findall(r"[\w']+", response.lower())) for response in responses]


def _lexicon(path: str) -> dict[str, float]:
    if path not in _lexicons:
        with open(path, encoding="utf-8") as file:
            lines = (line.rstrip("\n").split("\t") for line in file)
            _lexicons[path] = {parts[0]: float(parts[1]) for parts in lines if len(parts) > 1}
    return _lexicons[path]


_lexicons: dict[str, dict[str, float]] = {}


def reward_model(
    prompts: Sequence[Any],
    responses: Texts,
    *,
    path: str,
    quantise: str | None = None,
    offload: bool = False,
    dtype: str = "float32",
    finished: Sequence[bool] | None = None,
) -> list[float]:
    """Scores of the reward model in a folder, normalised and combined over its members as the folder specifies.

    It reads texts with its own tokenizer and chat template, whatever those of the policy are. Its parameters are split
    over all devices of the host, and each of several hosts scores a share of the responses. To save memory its kernels
    can be quantised (quantise='int8' or 'nf4'), its parameters and activations be bfloat16 (dtype='bfloat16'), and
    its parameters lie in the host's memory between calls (offload=True).
    """
    return scorer(path, quantise, offload, dtype)(prompts, responses, finished=finished).tolist()


def scorer(path: str, quantise: str | None = None, offload: bool = False, dtype: str = "float32") -> Scorer:
    """The model of `reward_model`, loaded once. Raises Mistake where it cannot be loaded."""
    return _loaded(path, quantise, offload, dtype)  # by position: to the cache, f(x) and f(path=x) are different calls


@functools.lru_cache
def _loaded(path: str, quantise: str | None, offload: bool, dtype: str) -> Scorer:
    if dtype not in DTYPES:
        raise Mistake(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    return load_reward_model(path, quantise=quantise, offload=offload, dtype=dtype, devices=jax.local_devices())


REWARDS: dict[str, RewardFn] = {
    "reward_model": reward_model,
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "regex": regex,
    "json_schema": json_schema,
    "length": length,
    "overlong": overlong,
    "lexicon": lexicon,
}
