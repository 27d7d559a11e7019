"""What a response is worth: functions (prompts, responses, **columns) -> one score each, and weighted sums of them.

"numeric_match"                               of the table below; it reads the data's column `answer`
"my_lab.rewards:short(most=40)"               your own
"numeric_match + 0.2*length(target=60)"       a sum

A function of (prompt, response, **columns) judges one response and is called for each. Both kinds may be `async def`:
one that judges single responses then has all of them under way at once, as one that asks a service should.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import json
import math
import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxalign.rollout.score import Scorer, load_reward_model
from jaxalign.select import select_sum

Texts = Sequence[str]
RewardFn = Callable[..., Any]  # (prompts, responses, **columns) -> scores, or (prompt, response, **columns) -> score


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
        raise ValueError(f"buffer={buffer} must be above 0 and at most max_length={max_length}")
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
    prompts: Sequence[Any], responses: Texts, *, path: str, finished: Sequence[bool] | None = None
) -> list[float]:
    """Scores of a reward model's folder, normalised and combined over its members as the folder says.

    It reads texts with its own tokenizer and chat template, whatever those of the policy are.
    """
    return _scorer(path)(prompts, responses, finished=finished).tolist()


@functools.lru_cache
def _scorer(path: str) -> Scorer:
    return load_reward_model(path)


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


class Rewards:
    """A weighted sum of reward functions, each within a time limit, its scores checked."""

    def __init__(self, text: str, *, seconds: float = 60.0):
        """
        Args:
          text: what `select_sum` takes, over REWARDS.
          seconds: that the functions, which run side by side, may take for the responses of one call.

        Raises:
          ValueError: a function or keyword does not exist, and the message lists what does; or a reward model cannot be
            read.
        """
        terms, self._seconds = select_sum(text, REWARDS), seconds
        for _, function in terms:
            if getattr(function, "func", None) is reward_model:
                _scorer(function.keywords["path"])  # what is wrong with it is said before training starts
        names = _distinct([_name(function) for _, function in terms])
        self._functions = dict(zip(names, (function for _, function in terms), strict=True))
        self.weights = dict(zip(names, (weight for weight, _ in terms), strict=True))

    def check(self, columns: Sequence[str]) -> None:
        """Raises ValueError when a function asks for a column that is not among these."""
        for function in self._functions.values():
            _wanted(function, columns)

    def __call__(self, prompts: Texts, responses: Texts, columns: dict[str, Sequence[Any]]) -> np.ndarray:
        """Float32[N], the weighted sum.

        Raises:
          RewardError: a function raised, took too long, or gave other than one finite number for each response.
        """
        return self.summed(self.by_name(prompts, responses, columns))

    def by_name(self, prompts: Texts, responses: Texts, columns: dict[str, Sequence[Any]]) -> dict[str, np.ndarray]:
        """Each function's own scores, Float64[N], before weights. Raises what the sum does."""
        run = lambda function: _started(functools.partial(_call, function, prompts, responses, columns))  # noqa: E731
        until = time.monotonic() + self._seconds
        calls = {name: run(function) for name, function in self._functions.items()}
        return {name: self._checked(name, call, until, len(responses)) for name, call in calls.items()}

    def summed(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """Float32[N] of `by_name`'s scores."""
        return sum(self.weights[name] * values for name, values in scores.items()).astype(np.float32)

    def _checked(self, name: str, call: concurrent.futures.Future, until: float, count: int) -> np.ndarray:
        name = f"the reward {name}"
        try:
            scores = list(call.result(timeout=max(0.0, until - time.monotonic())))
        except concurrent.futures.TimeoutError:
            raise RewardError(f"{name} took longer than {self._seconds:g} s for {count} responses") from None
        except _RowError as error:
            cause = error.__cause__
            raise RewardError(f"{name} raised {type(cause).__name__} for response {error.row}: {cause}") from cause
        except Exception as error:  # a function of the user's may raise anything
            raise RewardError(f"{name} raised {type(error).__name__}: {error}") from error
        if len(scores) != count:
            raise RewardError(f"{name} gave {len(scores)} scores for {count} responses; it must give one each")
        for row, score in enumerate(scores):
            if not isinstance(score, int | float | np.number) or not math.isfinite(score):
                raise RewardError(f"{name} gave {score!r} for response {row}; a score is a finite number")
        return np.array(scores, np.float64)


class _RowError(Exception):
    """A function that judges single responses failed at `row`."""

    def __init__(self, row: int):
        super().__init__(row)
        self.row = row


def _started(work: Callable[[], Any]) -> concurrent.futures.Future:
    """What `work` will return, of a thread of its own. An executor's threads would keep the process from its end for as
    long as a function hangs; this one is left behind."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def _call(function: RewardFn, prompts: Texts, responses: Texts, columns: dict[str, Sequence[Any]]) -> Any:
    """One call for all responses, or one for each."""
    wanted = {name: columns[name] for name in _wanted(function, columns)}
    if not _judges_one(function):
        scores = function(prompts, responses, **wanted)
        return asyncio.run(_awaited(scores)) if inspect.isawaitable(scores) else scores
    one = lambda row: function(  # noqa: E731
        prompts[row], responses[row], **{name: values[row] for name, values in wanted.items()}
    )
    return asyncio.run(_each(one, len(responses)))


async def _awaited(scores: Any) -> Any:
    return await scores


async def _each(one: Callable[[int], Any], count: int) -> list[Any]:
    async def judged(row: int) -> Any:
        try:
            score = one(row)
            return await score if inspect.isawaitable(score) else score
        except Exception as error:
            raise _RowError(row) from error

    return await asyncio.gather(*(judged(row) for row in range(count)))


def _judges_one(function: RewardFn) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "prompt"


def _wanted(function: RewardFn, columns: Collection[str]) -> list[str]:
    """The data's columns that a function names; all of them where it takes any."""
    parameters = inspect.signature(function).parameters
    own = list(parameters)[:2]  # prompts and responses, whatever the data call theirs
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return [name for name in columns if name not in own]
    bound = getattr(function, "keywords", {})
    missing = [
        name
        for name, p in parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in columns and name not in bound
    ]
    if missing:
        raise ValueError(f"the data have no column {missing[0]!r}; they have {', '.join(columns) or 'none'}")
    return [name for name in parameters if name in columns and name not in bound and name not in own]


def _name(function: RewardFn) -> str:
    return getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", "function")


def _distinct(names: Sequence[str]) -> list[str]:
    """A name that comes again is numbered: length, length_2."""
    return [name if (seen := names[:i].count(name)) == 0 else f"{name}_{seen + 1}" for i, name in enumerate(names)]
