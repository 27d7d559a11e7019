"""What a response is worth: functions (prompts, responses, **columns) -> one score each, and weighted sums of them.

"numeric_match"                               of the table below; it reads the data's column `answer`
"my_lab.rewards:short(most=40)"               your own
"numeric_match + 0.2*length(target=60)"       a sum
"""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxalign.rollout.score import Scorer, load_reward_model
from jaxalign.select import select_sum

Texts = Sequence[str]
RewardFn = Callable[..., Sequence[float]]  # (prompts, responses, **columns) -> scores


class RewardError(RuntimeError):
    """A reward function failed; the message names it, and the row where one is to blame."""


def exact_match(prompts: Texts, responses: Texts, *, answer: Texts) -> list[float]:
    """1 where the response is the answer, blanks around both aside."""
    return [float(said.strip() == right.strip()) for said, right in zip(responses, answer, strict=True)]


def numeric_match(prompts: Texts, responses: Texts, *, answer: Texts) -> list[float]:
    """1 where the response's number is the answer's: the first behind ####, else the last.

    Commas in numbers and a dollar sign before them are ignored, as GSM8K writes them.
    """
    return [
        float(_number(said) is not None and _number(said) == _number(right))
        for said, right in zip(responses, answer, strict=True)
    ]


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def _number(text: str) -> float | None:
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
    return [-abs(len(said.split()) - target) / target for said in responses]


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
    finished: Sequence[bool] | None = None,
) -> list[float]:
    """Scores of a reward model's folder, normalised and combined over its members as the folder says.

    It reads texts with its own tokenizer and chat template, whatever those of the policy are. Its kernels may be kept
    in few bits (quantise='int8' or 'nf4'), and all of it in the host's memory between calls (offload=True).
    """
    return _scorer(path, quantise=quantise, offload=offload)(prompts, responses, finished=finished).tolist()


def _scorer(path: str, *, quantise: str | None = None, offload: bool = False, **others: Any) -> Scorer:
    """By the keywords of `reward_model`, of which it reads these; each is loaded once."""
    return _loaded(path, quantise, offload)


@functools.lru_cache
def _loaded(path: str, quantise: str | None, offload: bool) -> Scorer:
    return load_reward_model(path, quantise=quantise, offload=offload)


REWARDS: dict[str, RewardFn] = {
    "reward_model": reward_model,
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "regex": regex,
    "json_schema": json_schema,
    "length": length,
    "lexicon": lexicon,
}


class Rewards:
    """A weighted sum of reward functions, each within a time limit, its scores checked."""

    def __init__(self, text: str, *, seconds: float = 60.0):
        """
        Args:
          text: what `select_sum` takes, over REWARDS.
          seconds: that one call of one function may take.

        Raises:
          ValueError: a function or keyword does not exist, and the message lists what does; or a reward model cannot be
            read.
        """
        self._terms, self._seconds = select_sum(text, REWARDS), seconds
        for _, function in self._terms:
            if getattr(function, "func", None) is reward_model:
                _scorer(**function.keywords)  # what is wrong with it is said before training starts
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=len(self._terms))

    @property
    def folders(self) -> list[str]:
        """Of the reward models in the sum."""
        terms = (function for _, function in self._terms if getattr(function, "func", None) is reward_model)
        return [function.keywords["path"] for function in terms]

    def check(self, columns: Sequence[str]) -> None:
        """Raises ValueError when a function asks for a column that the data do not have."""
        for _, function in self._terms:
            _wanted(function, [*columns, "finished"])

    def __call__(self, prompts: Texts, responses: Texts, columns: dict[str, Sequence[Any]]) -> np.ndarray:
        """Float32[N].

        Raises:
          RewardError: a function raised, took too long, or gave other than one finite number for each response.
        """
        calls = [self._pool.submit(self._call, function, prompts, responses, columns) for _, function in self._terms]
        total = np.zeros(len(responses), np.float64)
        for (weight, function), call in zip(self._terms, calls, strict=True):
            total += weight * self._checked(function, call, len(responses))
        return total.astype(np.float32)

    def _call(self, function: RewardFn, prompts: Texts, responses: Texts, columns: dict) -> Any:
        return function(prompts, responses, **{name: columns[name] for name in _wanted(function, columns)})

    def _checked(self, function: RewardFn, call: concurrent.futures.Future, count: int) -> np.ndarray:
        name = f"the reward {_name(function)}"
        try:
            scores = list(call.result(timeout=self._seconds))
        except concurrent.futures.TimeoutError:
            raise RewardError(f"{name} took longer than {self._seconds:g} s for {count} responses") from None
        except Exception as error:  # a function of the user's may raise anything
            raise RewardError(f"{name} raised {type(error).__name__}: {error}") from error
        if len(scores) != count:
            raise RewardError(f"{name} gave {len(scores)} scores for {count} responses; it must give one each")
        for row, score in enumerate(scores):
            if not isinstance(score, int | float | np.number) or not math.isfinite(score):
                raise RewardError(f"{name} gave {score!r} for response {row}; a score is a finite number")
        return np.array(scores, np.float64)


def _wanted(function: RewardFn, columns: Collection[str]) -> list[str]:
    """The data's columns that a function names; all of them where it takes any."""

    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return list(columns)
    bound = getattr(function, "keywords", {})
    missing = [
        name
        for name, p in parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in columns and name not in bound
    ]
    if missing:
        raise ValueError(f"the data have no column {missing[0]!r}; they have {', '.join(columns) or 'none'}")
    return [name for name in parameters if name in columns and name not in bound]


def _name(function: RewardFn) -> str:
    return getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", "function")
