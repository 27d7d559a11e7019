"""The reward functions that come with the package: matches, patterns, lengths, a lexicon, reward models."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax

from jaxalign.mistake import Mistake
from jaxalign.outside import MIB, brief, read_text
from jaxalign.rollout.rewards.calls import RewardFn
from jaxalign.rollout.rewards.numerals import number
from jaxalign.rollout.rewards.scorer import Scorer, load_reward_model
from jaxalign.rollout.rewards.worker import matches

Texts = Sequence[str]
DTYPES = ("float32", "bfloat16")  # of a reward model
LEXICON_LIMIT = 256 * MIB  # bytes
FROM_DATA = ("answer", "tokens")  # arguments of REWARDS that are columns; the others are bound by the user


def exact_match(prompts: Texts, responses: Texts, *, answer: Sequence[str | float]) -> list[float]:
    """1 where the response is the answer, apart from blanks around both; else 0."""
    return [
        float(response.strip() == str(checked_answer(right)).strip())
        for response, right in zip(responses, answer, strict=True)
    ]


def numeric_match(prompts: Texts, responses: Texts, *, answer: Sequence[str | float]) -> list[float]:
    """1 where the response's number is exactly the answer's, else 0; `numerals` has the grammar."""
    return [float(number(text) == checked_number(right)) for text, right in zip(responses, answer, strict=True)]


def checked_answer(value: Any) -> str | float:
    """The answer of a row. Raises Mistake where it is neither a text nor a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Mistake(f"`answer` holds {brief(repr(value))}; it must be a text or a number")
    return value


def checked_number(value: Any) -> Fraction:
    """The number of a row's answer: 0.1 is 1/10, as it is written. Raises Mistake where there is none."""
    value = checked_answer(value)
    if isinstance(value, int):
        return Fraction(value)
    text = value if isinstance(value, str) else repr(value)  # that of nan and inf has no number
    exact = number(text, alone=True)
    if exact is None:
        raise Mistake(
            f"`answer` holds {brief(repr(value))}, which is no number, so no response can score; write one number, "
            "leave the row out, or use exact_match"
        )
    return exact


def checked_count(value: Any) -> int:
    """The number of a response's tokens. Raises Mistake where it is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Mistake(f"`tokens` holds {brief(repr(value))}; it must be a whole number")
    return value


def regex(prompts: Texts, responses: Texts, *, pattern: str) -> list[float]:
    """1 where the pattern (of Python's `re`) matches somewhere in the response, else 0."""
    if not isinstance(pattern, str):
        raise Mistake(f"pattern={pattern!r} must be a text")
    re.compile(pattern)
    return [matches("", response, pattern=pattern) for response in responses]


def json_schema(prompts: Texts, responses: Texts, *, required: Sequence[str] = ()) -> list[float]:
    """1 where the whole response is a JSON object with the required names, else 0.

    NaN and Infinity are not JSON; brackets that are nested too deeply to be read count as no object.
    """
    if isinstance(required, str) or not all(isinstance(name, str) for name in required):
        raise Mistake(f"required={required!r} must be a list of texts")
    return [float(_is_object(response, required)) for response in responses]


def _is_object(text: str, required: Sequence[str]) -> bool:
    try:  # integers as floats, since Python limits the digits of an int
        value = json.loads(text, parse_int=float, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(required) <= set(value)


def _not_json(name: str) -> None:
    raise ValueError(name)


def length(prompts: Texts, responses: Texts, *, target: int) -> list[float]:
    """-|words - target| / target: 0 at the target."""
    if target <= 0 or not math.isfinite(target):
        raise Mistake(f"target={target} must be above 0, and finite")
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


@functools.lru_cache
def _lexicon(path: str) -> dict[str, float]:
    lines = (line.split("\t") for line in read_text(path, limit=LEXICON_LIMIT).split("\n"))
    scores = {parts[0]: _score(parts, path) for parts in lines if len(parts) > 1}
    if not scores:
        raise Mistake(f"{path} has no line of a word, a tab and a score")
    return scores


def _score(parts: Sequence[str], path: str) -> float:
    try:
        score = float(parts[1])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise Mistake(f"{path} gives {brief(repr(parts[0]))} the score {brief(repr(parts[1]))}; it must be a number")
    return score


def reward_model(
    prompts: Sequence[Any],
    responses: Texts,
    *,
    path: str,
    quantise: str | None = None,
    offload: bool = False,
    dtype: str = "float32",
    rule: str | None = None,
    finished: Sequence[bool] | None = None,
) -> list[float]:
    """Scores of the reward model in a folder, normalised and combined over its members as the folder specifies.

    It reads texts with its own tokenizer and chat template, whatever those of the policy are. Its parameters are split
    over all devices of the host, and each of several hosts scores a share of the responses. To save memory its kernels
    can be quantised (quantise='int8' or 'nf4'), its parameters and activations be bfloat16 (dtype='bfloat16'), and
    its parameters lie in the host's memory between calls (offload=True). Its members can be combined by another rule
    (rule='min'), which may also be a function of your own (rule='my.module:function').
    """
    return scorer(path, quantise, offload, dtype, rule)(prompts, responses, finished=finished).tolist()


def scorer(
    path: str,
    quantise: str | None = None,
    offload: bool = False,
    dtype: str = "float32",
    rule: str | None = None,
) -> Scorer:
    """The model of `reward_model`, loaded once. Raises Mistake where it cannot be loaded."""
    return _loaded(
        path, quantise, offload, dtype, rule
    )  # by position: to the cache, f(x) and f(path=x) are different calls


@functools.lru_cache
def _loaded(path: str, quantise: str | None, offload: bool, dtype: str, rule: str | None) -> Scorer:
    if dtype not in DTYPES:
        raise Mistake(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    return load_reward_model(
        path, quantise=quantise, offload=offload, dtype=dtype, rule=rule, devices=jax.local_devices()
    )


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
