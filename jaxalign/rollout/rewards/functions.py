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
FROM_DATA = ("answer", "tokens")  # what functions of REWARDS need for each response; what else they need is told them


def exact_match(prompts: Texts, responses: Texts, *, answer: Sequence[str | float]) -> list[float]:
    """1 where the response is the answer, blanks around both aside."""
    return [
        float(said.strip() == str(checked_answer(right)).strip()) for said, right in zip(responses, answer, strict=True)
    ]


def numeric_match(prompts: Texts, responses: Texts, *, answer: Sequence[str | float]) -> list[float]:
    """1 where the response's number is the answer's: the first behind ####, else the last.

    Commas in numbers and a dollar sign before them are ignored, as GSM8K writes them.
    """
    return [
        float(_number(said) is not None and _number(said) == _number(checked_answer(right)))
        for said, right in zip(responses, answer, strict=True)
    ]


def checked_answer(value: Any) -> str | float:
    """A row's answer. Raises Mistake where it is neither a text nor a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Mistake(f"`answer` holds {value!r}; it must be a text or a number")
    return value


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def _number(text: str | float) -> float | None:
    if not isinstance(text, str):
        return float(text)
    _, marked, final = text.rpartition("####")
    found = _NUMBER.findall(final if marked else text)
    return float(found[0 if marked else -1].replace(",", "").replace("$", "")) if found else None


def regex(prompts: Texts, responses: Texts, *, pattern: str) -> list[float]:
    """1 where the pattern (of Python's `re`) is found in the response."""
    found = re.compile(pattern)
    return [float(found.search(said) is not None) for said in responses]


def json_schema(prompts: Texts, responses: Texts, *, required: Sequence[str] = ()) -> list[float]:
    """1 where the whole response is a JSON object with the required names."""
    return [float(_is_object(said, required)) for said in responses]


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
    return [-abs(len(said.split()) - target) / target for said in responses]


def overlong(prompts: Texts, responses: Texts, *, tokens: Sequence[int], max_length: int, buffer: int) -> list[float]:
    """0 for up to max_length - buffer tokens, from there evenly down to -1 at max_length, and -1 beyond.

    Args:
      prompts: not read.
      responses: not read.
      tokens: of each response, its terminator included.
      max_length: usually --max-new-tokens, so that a response that was cut off costs 1.
      buffer: over which the penalty grows.

    Reference: Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, eq. 13.
    """
    if not 0 < buffer <= max_length:
        raise Mistake(f"buffer={buffer} must be above 0 and at most max_length={max_length}")
    return [-min(max((count - max_length + buffer) / buffer, 0.0), 1.0) for count in tokens]


def lexicon(prompts: Texts, responses: Texts, *, path: str) -> list[float]:
    """Σ over words of their score in a file of `word<tab>score` lines, such as VADER's lexicon; unknown words are 0."""
    scores = _lexicon(path)
    return [sum(scores.get(word, 0.0) for word in re.findall(r"[\w']+", said.lower())) for said in responses]


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
    """Scores of a reward model's folder, normalised and combined over its members as the folder says.

    It reads texts with its own tokenizer and chat template, whatever those of the policy are. All devices of the host
    hold a share of it, and each of several hosts scores some of the responses. Its kernels may be kept in few bits
    (quantise='int8' or 'nf4'), all of it in half (dtype='bfloat16'), and in the host's memory between calls
    (offload=True).
    """
    return scorer(path, quantise, offload, dtype)(prompts, responses, finished=finished).tolist()


def scorer(path: str, quantise: str | None = None, offload: bool = False, dtype: str = "float32") -> Scorer:
    """The model of `reward_model`, loaded once. Raises Mistake where it cannot be."""
    return _loaded(path, quantise, offload, dtype)  # by place, for the cache tells f(x) from f(path=x)


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
