"""The formats of instruction data, recognised from their columns, and the three normal forms of a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxalign.data.read.sources import Row
from jaxalign.mistake import Mistake


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, of which every token is learned."""

    text: str


@dataclasses.dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion, of which the completion is learned."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages {"role": system | developer | user | assistant | tool, "content": text}. The assistant's are learned.

    A message may have "tool_calls" (of {"type": "function", "function": {"name": ..., "arguments": {...}}}), "name",
    "tool_call_id", "reasoning_content" (text), and "learn": False, which makes a turn of the assistant mere context.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None  # JSON schemas of the functions that the assistant may call


Normal = Text | PromptCompletion | Conversation


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to write a row. Of several formats, the first whose `columns` are all present is that of the data."""

    name: str
    columns: tuple[str, ...]
    convert: Callable[..., Any]  # row -> its normal form; of feedback, (row, as_chat) -> groups of responses


ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
CALLS = "tool_calls", "function_call"  # of a turn, beside its text


def _role(name: str) -> str:
    if name not in ROLES:
        raise Mistake(f"role {name!r} is not one of {', '.join(ROLES)}")
    return ROLES[name]


def _text(row: Row, column: str) -> str:
    """The text in a column; None is an empty text, as an empty cell of a CSV file is."""
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Mistake(f"column {column} holds {value!r}, not text")
    return value


def messages(turns: Sequence[Row], role: str = "role", content: str = "content") -> Conversation:
    """The conversation of turns whose role and content stand under these names. Raises Mistake."""
    if isinstance(turns, str) or not all(isinstance(turn, dict) for turn in turns):
        raise Mistake(f"{repr(turns)[:60]} is not a list of turns, each with `{role}` and `{content}`")
    if any(turn.get(call) for turn in turns for call in CALLS):
        raise Mistake(
            f"a turn calls a tool in `{'` or `'.join(CALLS)}`, which templates do not read; write the call into its "
            f"`{content}`, as the model should write it, or leave the row out"
        )
    return Conversation(tuple({"role": _role(t[role]), "content": _text(t, content)} for t in turns))


def _instruction(row: Row, instruction: str, context: str, response: str) -> Conversation:
    """A question and its answer, from the columns of these names; `context` may be absent."""
    question = with_context(_text(row, instruction), _text(row, context) if context in row else "")
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": _text(row, response)}))


def with_context(instruction: str, context: str) -> str:
    """The instruction, with its context, if any, in a paragraph behind it."""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _prompt_completion(row: Row) -> Normal:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return PromptCompletion(_text(row, "prompt"), _text(row, "completion"))
    return messages([*turns_of(prompt), *turns_of(completion, "assistant")])


def turns_of(text_or_messages: Any, role: str = "user") -> list[Row]:
    """A text as a turn of this role; messages as they are."""
    if isinstance(text_or_messages, str):
        return [{"role": role, "content": text_or_messages}]
    return list(text_or_messages)


def _oasst_tree(row: Row) -> Conversation:
    """The conversation from the root along the best-ranked replies."""
    turns, node = [], row["prompt"]
    while node is not None:
        turns.append({"role": node["role"], "content": node["text"]})
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=_rank) if replies else None
    return messages(turns[: len(turns) - (turns[-1]["role"] == "prompter")])


def _rank(reply: Row) -> float:
    return float("inf") if reply.get("rank") is None else reply["rank"]


def _best_of_pair(row: Row) -> Conversation:
    return messages([*turns_of(row["prompt"]), {"role": "assistant", "content": row["chosen"]}])


def _self_instruct(row: Row) -> Conversation:
    first = row["instances"][0]
    return _instruction({"instruction": row["instruction"], **first}, "instruction", "input", "output")


MESSAGES = Format("messages", ("messages",), lambda row: messages(row["messages"]))
FORMATS: tuple[Format, ...] = (
    MESSAGES,
    Format("ShareGPT", ("conversations",), lambda row: messages(row["conversations"], "from", "value")),
    Format("OASST tree", ("message_tree_id", "prompt"), _oasst_tree),
    Format("prompt+completion", ("prompt", "completion"), _prompt_completion),
    Format("chosen of a pair", ("prompt", "chosen"), _best_of_pair),
    Format("Alpaca", ("instruction", "output"), lambda row: _instruction(row, "instruction", "input", "output")),
    Format("self-instruct", ("instruction", "instances"), _self_instruct),
    Format(
        "Dolly",
        ("instruction", "context", "response"),
        lambda row: _instruction(row, "instruction", "context", "response"),
    ),
    Format(
        "Alpaca with response",
        ("instruction", "response"),
        lambda row: _instruction(row, "instruction", "input", "response"),
    ),
    Format("FLAN", ("inputs", "targets"), lambda row: PromptCompletion(_text(row, "inputs"), _text(row, "targets"))),
    Format("question and answer", ("question", "answer"), lambda row: _instruction(row, "question", "", "answer")),
    Format("text", ("text",), lambda row: Text(_text(row, "text"))),
)


def recognise(
    columns: Iterable[str],
    formats: Sequence[Format] = FORMATS,
    *,
    where: str,
    otherwise: str = "are no known format",
) -> Format:
    """The format of rows with these columns. Raises Mistake, which lists the columns and the known formats."""
    columns = set(columns)
    for form in formats:
        if columns.issuperset(form.columns):
            return form
    known = "; ".join(f"{'+'.join(form.columns)} ({form.name})" for form in formats)
    raise Mistake(f"{where}: columns {', '.join(sorted(columns))} {otherwise}; known are {known}")


def normalise(form: Format, row: Row, *options: bool, where: str) -> Any:
    """The row in its normal form. Raises Mistake, with the place, when a column holds something else."""
    try:
        return form.convert(row, *options)
    except KeyError as error:
        raise Mistake(f"{where}: {error} is missing, which the format {form.name} of the first row needs") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise Mistake(f"{where}: not a row of format {form.name} ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise Mistake(f"{where}: {error}") from None
