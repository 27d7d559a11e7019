"""The formats of instruction data, recognised from their columns, and the three normal forms of a row.

A format states every column that it reads. A column of CONTENT that has a value and that the format does not read is a
mistake; other columns are listed in the log. docs/data.md explains both to users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from jaxalign.data.read import spellings
from jaxalign.data.read.sources import Row
from jaxalign.data.read.spellings import is_empty
from jaxalign.mistake import Mistake
from jaxalign.outside import brief


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
    convert: Callable[..., Any]  # (row, as_chat) -> its normal form; of feedback, groups of responses
    reads: tuple[str, ...] = ()  # further columns, where a row has them
    earlier: tuple[Format, ...] = dataclasses.field(default=(), compare=False)  # that the first row is not of

    def reads_column(self, column: str) -> bool:
        """True if the column decides what is learned; `split` always does."""
        return column in self.columns or column in self.reads or column == "split"


SYSTEM = ("system", "system_prompt", "system_message")  # a turn of the system, in front
TOOLS = ("tools", "functions")  # JSON schemas of functions, for the chat template
BEFORE = (*SYSTEM, "history", *TOOLS)  # in front of a prompt that is a text; it becomes a conversation
BESIDE = ("input", "context")  # paragraphs behind a question or an instruction
LABELS = ("label", "desirable")  # of a rated response; in other data a label may be anything
ROW_WEIGHTS = ("weight", "weights", "train", "training")  # of a row; 1 and true change nothing
OF_RESPONSES = (*spellings.REASONING, "tool_calls", "function_call", *ROW_WEIGHTS, "train_detail")
# Columns that are known to carry content. A row whose format does not read one of them is refused.
CONTENT = (*BEFORE, *BESIDE, *spellings.UNREADABLE, *OF_RESPONSES, "chat_template_kwargs")
IN_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")  # may hold turns


def text_in(row: Row, column: str) -> str:
    """The text in a column; None is an empty text, as an empty cell of a CSV file is. Raises Mistake."""
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Mistake(f"column {column!r} holds {brief(value)}, not text")
    return value


def messages(turns: Sequence[Row], tools: Any = None) -> Conversation:
    """The conversation of turns in any spelling, with the tools of its row. Raises Mistake."""
    _check_turns(turns)
    return Conversation(tuple(map(spellings.message, turns)), spellings.tools_of(turns, tools))


def _check_turns(turns: Any) -> None:
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, dict) for turn in turns):
        raise Mistake(f"{brief(repr(turns), 60)} is not a list of turns, each with 'role' and 'content'")


def tools_beside(row: Row) -> Any:
    """The tools in the columns of a row."""
    return spellings.tools_of([{"tools": row.get(name)} for name in TOOLS], None)


def framed(prompt: Any, row: Row) -> str | list[Row]:
    """A prompt (text or turns) behind the system text and the history of its row: a text if there are neither."""
    systems = dict.fromkeys(text_in(row, name) for name in SYSTEM if not is_empty(row.get(name)))
    if len(systems) > 1:
        raise Mistake(f"{', '.join(map(repr, SYSTEM))} differ where a row has several; keep one")
    system: list[Row] = [{"role": "system", "content": text} for text in systems if text.strip()]
    if isinstance(prompt, str):
        before = [*system, *_history(row.get("history"))]
        return [*before, {"role": "user", "content": prompt}] if before else prompt
    _check_turns(prompt)
    if not is_empty(row.get("history")):
        raise Mistake("'history' stands beside messages, which are not a text; write it in front of them")
    if system and prompt:
        first = spellings.message(prompt[0])
        if first["role"] in ("system", "developer"):
            if first["content"].strip() != system[0]["content"].strip():
                raise Mistake("'system' differs from the messages' own system turn; keep one of the two")
            system = []
    return [*system, *prompt]


def _history(history: Any) -> list[Row]:
    """Earlier turns: pairs of a text of the user and one of the assistant, or messages."""
    if is_empty(history):
        return []
    if not isinstance(history, list):
        raise Mistake(f"'history' holds {brief(history)}, not a list of [question, answer]")
    result: list[Row] = []
    for item in history:
        if isinstance(item, dict):
            result.append(item)
        elif isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
            result += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), item, strict=True)]
        else:
            raise Mistake(f"'history' holds {brief(item)}, not [question, answer]")
    return result


def question(row: Row, column: str) -> Any:
    """The prompt in a column; a text has `input` and `context` in paragraphs behind it."""
    if isinstance(row[column], str | None):
        text = text_in(row, column)
        for name in BESIDE:
            text = with_context(text, text_in(row, name) if name in row else "")
        return text
    for name in BESIDE:
        if not is_empty(row.get(name)):
            raise Mistake(f"{name!r} stands beside messages; write it into the turn that it belongs to")
    return row[column]


def with_context(instruction: str, context: str) -> str:
    """The instruction, with its context, if any, in a paragraph behind it."""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def continued(row: Row, prompt: Any, response: Any, as_chat: bool) -> Normal:
    """The normal form of a response behind the prompt of its row, which it may repeat or go on from.

    Of a prompt of messages the assistant's turns are context, unless they are marked; those of a `history` are learned.
    """
    context, response = context_and_response(prompt, response)
    if not isinstance(prompt, str) and is_empty(row.get("history")):
        _check_turns(prompt)
        before = [spellings.message(turn) for turn in prompt]
        context = [spellings.unlearned(turn) if spellings.message(turn) in before else turn for turn in context]
    return sequence(context, response, as_chat, tools_beside(row))


def sequence(prompt: Any, response: Any, as_chat: bool, tools: Any = None) -> Normal:
    """The normal form of a prompt (text or messages) with its response (text, message or messages)."""
    if isinstance(prompt, str) and isinstance(response, str) and not as_chat and not tools:
        return PromptCompletion(prompt, response)
    responses = [response] if isinstance(response, dict) else turns_of(response, "assistant")
    return messages([*turns_of(prompt), *responses], tools)


def turns_of(text_or_messages: Any, role: str = "user") -> list[Row]:
    """A text as a turn of this role; messages as they are."""
    if isinstance(text_or_messages, str):
        return [{"role": role, "content": text_or_messages}]
    return list(text_or_messages)


def context_and_response(prompt: Any, response: Any) -> tuple[Any, Any]:
    """(the context, the response to it) of a response whose messages repeat the prompt or go on behind it.

    A repeated prompt may have a system turn that the prompt lacks, or lack one that it has: the longer of the two is
    the context.
    """
    if not isinstance(response, list) or len(response) < 2:
        return prompt, response
    turns, before = (messages(turns_of(part)).messages for part in (response, prompt))
    goes_on = turns[0]["role"] in ("assistant", "tool")
    first = next((turn["role"] for turn in before if turn["role"] not in ("system", "developer")), None)
    if not goes_on or first == turns[0]["role"]:
        if _within(before, turns[:-1]):
            return response[:-1], response[-1:]
        if _within(turns[:-1], before[1 - len(turns) :]):  # the last turns of the prompt
            return prompt, response[-1:]
    if goes_on:
        return turns_of(prompt), response
    raise Mistake(
        f"a response of {len(turns)} turns begins with {turns[0]['role']} and does not repeat the prompt; repeat all "
        "of it, or begin with the assistant's turn behind it"
    )


def _within(few: Sequence[Row], many: Sequence[Row]) -> bool:
    """True if `few` is a run of turns of `many`; white space around a text makes no difference."""
    part, whole = ([turn | {"content": turn["content"].strip()} for turn in turns] for turns in (few, many))
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _texts(prompt: str, response: str) -> Callable[..., Normal]:
    """Converts rows of a text, or messages, and a text that continues it."""

    def convert(row: Row, as_chat: bool = False) -> Normal:
        texts = ["" if row[name] is None else row[name] for name in (prompt, response)]
        for name, value in zip((prompt, response), texts, strict=True):
            if not isinstance(value, str | list | dict):
                text_in(row, name)  # raises
        return continued(row, framed(texts[0], row), texts[1], as_chat)

    return convert


def _instruction(instruction: str, response: str) -> Callable[..., Normal]:
    """Converts rows of a question, with `input` and `context`, and its answer, which are a conversation."""

    def convert(row: Row, as_chat: bool = False) -> Normal:
        text_in(row, instruction)
        return sequence(framed(question(row, instruction), row), text_in(row, response), True, tools_beside(row))

    return convert


def _messages(column: str) -> Callable[..., Conversation]:
    """Converts rows of turns."""

    def convert(row: Row, as_chat: bool = False) -> Conversation:
        _check_turns(row[column])
        return messages(framed(row[column], row), tools_beside(row))  # type: ignore[arg-type]

    return convert


def _oasst_tree(row: Row, as_chat: bool = False) -> Conversation:
    """The conversation from the root along the best-ranked replies."""
    thread, node = [], row["prompt"]
    while node is not None:
        thread.append({"role": node["role"], "content": node["text"]})
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=_rank) if replies else None
    return messages(thread[: len(thread) - (thread[-1]["role"] == "prompter")])


def _rank(reply: Row) -> float:
    return float("inf") if reply.get("rank") is None else reply["rank"]


def _self_instruct(row: Row, as_chat: bool = False) -> Normal:
    instances = row["instances"]
    if len(instances) > 1:
        raise Mistake(f"'instances' holds {len(instances)} examples; write a row for each")
    merged = {**row, **instances[0]}
    _check_columns(ALPACA, merged, ())
    return ALPACA.convert(merged)


MESSAGES = Format("messages", ("messages",), _messages("messages"), (*SYSTEM, *TOOLS))
ALPACA = Format("Alpaca", ("instruction", "output"), _instruction("instruction", "output"), (*BEFORE, *BESIDE))
FORMATS: tuple[Format, ...] = (
    MESSAGES,
    Format("ShareGPT", ("conversations",), _messages("conversations"), (*SYSTEM, *TOOLS)),
    Format("OASST tree", ("message_tree_id", "prompt"), _oasst_tree),
    Format("prompt+completion", ("prompt", "completion"), _texts("prompt", "completion"), BEFORE),
    Format("chosen of a pair", ("prompt", "chosen"), _texts("prompt", "chosen"), BEFORE),
    ALPACA,
    Format("self-instruct", ("instruction", "instances"), _self_instruct, BEFORE),
    Format(
        "Dolly",
        ("instruction", "context", "response"),
        _instruction("instruction", "response"),
        (*BEFORE, "input"),
    ),
    Format(
        "Alpaca with response",
        ("instruction", "response"),
        _instruction("instruction", "response"),
        (*BEFORE, *BESIDE),
    ),
    Format("FLAN", ("inputs", "targets"), _texts("inputs", "targets"), BEFORE),
    Format("question and answer", ("question", "answer"), _instruction("question", "answer"), (*BEFORE, *BESIDE)),
    Format("text", ("text",), lambda row, as_chat=False: Text(text_in(row, "text"))),
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
    for number, form in enumerate(formats):
        if columns.issuperset(form.columns):
            return dataclasses.replace(form, earlier=tuple(formats[:number]))
    known = "; ".join(f"{'+'.join(form.columns)} ({form.name})" for form in formats)
    names = ", ".join(brief(column, 40) for column in sorted(columns))
    raise Mistake(f"{where}: columns {brief(names, 400)} {otherwise}; known are {known}")


def normalise(form: Format, row: Row, *options: bool, where: str, elsewhere: Container[str] = ()) -> Any:
    """The row in its normal form.

    Args:
      form: of the data.
      row: a row.
      options: `as_chat`, where the format has it.
      where: the place of the row, for errors.
      elsewhere: columns that something else reads.

    Raises:
      Mistake: a column holds another type, or one of CONTENT that the format does not read holds something.
    """
    try:
        _check_columns(form, row, elsewhere)
        return form.convert(row, *options)
    except KeyError as error:
        raise Mistake(f"{where}: {error} is missing, which the format {form.name} of the first row needs") from None
    except (TypeError, AttributeError, IndexError) as error:
        reason = brief(f"{type(error).__name__}: {error}")
        raise Mistake(f"{where}: not a row of format {form.name} ({reason})") from None
    except RecursionError:
        raise Mistake(f"{where}: lists or objects are nested too deeply") from None
    except ValueError as error:
        raise Mistake(f"{where}: {error}") from None


def _check_columns(form: Format, row: Row, elsewhere: Container[str]) -> None:
    other = next((other for other in form.earlier if all(_fills(row, column) for column in other.columns)), None)
    if other is not None:
        raise Mistake(
            f"a row of format {other.name} ({'+'.join(other.columns)}), and the first row is of format {form.name} "
            f"({'+'.join(form.columns)}); write each format into a file of its own, and mix the files"
        )
    for column in CONTENT:
        value = row.get(column)
        if is_empty(value) or form.reads_column(column) or column in elsewhere:
            continue
        if column in ROW_WEIGHTS and value in (1, "1", "1.0", "true", "True"):  # the cells of a CSV file are texts
            continue
        raise Mistake(
            f"column {column!r} holds {brief(value, 40)}, which the format {form.name} does not read; write it into "
            f"{' or '.join(map(repr, form.columns))}, or rename or remove the column"
        )


def _fills(row: Row, column: str) -> bool:
    return not is_empty(row.get(column)) and (column not in LABELS or may_rate(row[column]))


def may_rate(value: Any) -> bool:
    """True for a label that is a rating, or is meant as one."""
    return str(value).strip().lower() in ("true", "false", "1", "0", "-1", "1.0", "0.0", "-1.0")


def unread(form: Format, row: Row) -> set[str]:
    """Columns of the row with a value that the format does not read, and keys of its turns, as 'messages.id'."""
    names = {name for name, value in row.items() if not form.reads_column(name) and not is_empty(value)}
    columns = [name for name in IN_TURNS if name in form.columns and name in row]
    if "message_tree_id" not in form.columns:
        names |= {f"{column}.{key}" for column in columns for key in spellings.unread_keys(row[column])}
    return names
