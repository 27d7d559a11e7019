"""How reward functions are called: beside each other, for all responses at once or for each, awaited or not."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxalign.mistake import Mistake

Texts = Sequence[str]
# (prompts, responses, **columns) -> scores, or (prompt, response, **columns) -> score
RewardFn = Callable[..., Any]


class RowError(Exception):
    """A function that judges single responses failed at `row`."""

    def __init__(self, row: int):
        super().__init__(row)
        self.row = row


def started(work: Callable[[], Any]) -> concurrent.futures.Future:
    """What `work` will return, of a thread of its own.

    An executor's threads would keep the process from its end for as long as a function hangs; this one is left behind.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except SystemExit as error:  # out of this thread it would end the run without a word
            future.set_exception(RuntimeError(f"it called sys.exit({error.code!r})"))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="reward", daemon=True).start()
    return future


def call(function: RewardFn, prompts: Texts, responses: Texts, columns: dict[str, Sequence[Any]]) -> Any:
    """One call for all responses, or one for each."""
    given = {name: columns[name] for name in wanted(function, columns)}
    if not _judges_one(function):
        scores = function(prompts, responses, **given)
        return asyncio.run(_awaited(scores)) if inspect.isawaitable(scores) else scores
    one = lambda row: function(  # noqa: E731
        prompts[row], responses[row], **{name: values[row] for name, values in given.items()}
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
            raise RowError(row) from error

    return await asyncio.gather(*(judged(row) for row in range(count)))


def _judges_one(function: RewardFn) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "prompt"


def wanted(function: RewardFn, columns: Collection[str]) -> list[str]:
    """The data's columns that a function names; all of them where it takes any.

    Raises:
      Mistake: it asks for one that the data do not have.
    """
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
        name = name_of(function)
        raise Mistake(
            f"the data have no column {missing[0]!r}; they have {', '.join(columns) or 'none'}. {name} takes it as "
            f"an argument too: {name}({missing[0]}=...)"
        )
    return [name for name in parameters if name in columns and name not in bound and name not in own]


def name_of(function: RewardFn) -> str:
    """What to call it in messages and metrics."""
    return getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", "function")
