"""The formats of human (or AI) feedback, recognised from their columns: pairs, rankings and rated responses.

A response that is a text continues a prompt that is a text; messages are rendered with the chat template. `as_chat`
makes a conversation of two such texts: the prompt is a turn of the user, the response a turn of the assistant.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from jaxalign.data.read import formats
from jaxalign.data.read.formats import (
    BEFORE,
    BESIDE,
    SYSTEM,
    TOOLS,
    Format,
    Normal,
    PromptCompletion,
    continued,
    framed,
    question,
    sequence,
    tools_beside,
)
from jaxalign.data.read.sources import Row
from jaxalign.data.read.spellings import is_empty
from jaxalign.mistake import Mistake
from jaxalign.outside import brief

PAIRS, RANKED, RATED = "pairs", "ranked", "rated"
# Columns of a pair: by how much the first is better, the probability that it is, whether the two are equally good.
OPINIONS = "margin", "preference", "tie"
SCORES = "score_chosen", "score_rejected"  # of a pair: without a margin, their difference is the margin
LARGEST = (2 - 2**-23) * 2.0**127  # float32


@dataclasses.dataclass(frozen=True)
class Group:
    """Responses to one prompt, each behind it: a pair or a ranking, best first, or a single rated response."""

    sequences: tuple[Normal, ...]
    label: bool | None = None  # of a rated response: True where it is desirable
    opinions: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # of a pair: those of OPINIONS that its row has
    ranks: tuple[int, ...] | None = None  # of a ranking in which some are equal; 0 is the best


def _pair(column: str, *, as_turns: bool = False) -> Callable[[Row, bool], list[Group]]:
    """Converts rows with a prompt in `column` and with chosen and rejected, which may repeat or continue it."""

    def convert(row: Row, as_chat: bool) -> list[Group]:
        prompt, responses = (
            framed(question(row, column), row),
            [_response(row, name) for name in ("chosen", "rejected")],
        )
        pair = tuple(continued(row, prompt, response, as_chat or as_turns) for response in responses)
        return [Group(pair, opinions=_opinions(row))]

    return convert


def _response(row: Row, column: str) -> Any:
    """A text, a message or messages."""
    return row[column] if isinstance(row[column], list | dict) else formats.text_in(row, column)


def number_in(name: str, value: Any) -> float:
    """The value as a float that float32 can hold. Raises Mistake."""
    if isinstance(value, Decimal):  # of a Parquet file
        value = float(value)
    if not isinstance(value, int | float):
        raise Mistake(f"{name} is {brief(repr(value))}, not a number; give one, leave it out, or rename the column")
    if not abs(value) <= LARGEST:  # an int may be too large for a float
        shown = brief(repr(value)) if isinstance(value, float) or abs(value) < 10**30 else "beyond 1e30"
        raise Mistake(f"{name} is {shown}, not a finite number in float32; give one, or leave it out")
    return float(value)


def _opinions(row: Row) -> dict[str, float]:
    names = (*OPINIONS, *SCORES)
    opinions = {name: number_in(name, row[name]) for name in names if not is_empty(row.get(name))}
    if not 0 <= opinions.get("preference", 1) <= 1:
        raise Mistake(f"preference is {row['preference']!r}, not a probability")
    chosen, rejected = (opinions.pop(name, None) for name in SCORES)
    if "margin" not in opinions and chosen is not None and rejected is not None:
        opinions["margin"] = number_in("score_chosen - score_rejected", chosen - rejected)
    return opinions


def _whole_dialogues(row: Row, as_chat: bool) -> list[Group]:
    """The pair of two dialogues, texts as in hh-rlhf or lists of messages, that share all but their last turn."""
    tools = tools_beside(row)
    chosen, rejected = (formats.messages(framed(_dialogue(row[n]), row), tools) for n in ("chosen", "rejected"))  # type: ignore[arg-type]
    return [Group((chosen, rejected), opinions=_opinions(row))]


def _dialogue(text: Any) -> list[Row]:
    if not isinstance(text, str):
        return list(text)
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 3:
        raise Mistake(r"a dialogue must begin with '\n\nHuman:' or '\n\nAssistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": text.strip()} for r, text in zip(parts[1::2], parts[2::2], strict=True)]


def _texts_of_dialogues(row: Row, as_chat: bool) -> list[Group]:
    """The pair of two texts, whose prompt is what both begin with, markers of turns included; of messages, themselves.

    A space at the end of the prompt opens the responses, as in TRL's `extract_prompt`.
    """
    if not isinstance(row["chosen"], str):
        return _whole_dialogues(row, as_chat)
    chosen, rejected = (formats.text_in(row, name) for name in ("chosen", "rejected"))
    shortest = min(len(chosen), len(rejected))
    shared = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if shared == shortest:  # one text is the beginning of the other
        shared = max(shared - 1, 0)
    elif chosen[:shared].endswith(" "):
        shared -= 1
    pair = tuple(PromptCompletion(text[:shared], text[shared:]) for text in (chosen, rejected))
    return [Group(pair, opinions=_opinions(row))]


def _tree(row: Row, as_chat: bool) -> list[Group]:
    """A ranking for every message of the tree that has two or more ranked replies of the assistant."""
    rankings: list[Group] = []

    def visit(node: Row, before: list[Row]) -> None:
        thread = [*before, {"role": node["role"], "content": node["text"]}]
        replies = [r for r in node.get("replies") or [] if not r.get("deleted")]
        ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda r: r["rank"])
        if len(ranked) > 1 and ranked[0]["role"] == "assistant":
            rankings.append(Group(tuple(sequence(thread, reply["text"], True) for reply in ranked)))
        for reply in replies:
            visit(reply, thread)

    visit(row["prompt"], [])
    return rankings


def _ranking(row: Row, as_chat: bool) -> list[Group]:
    """A ranking by `ranks` (1 is best) or `scores` (more is better), or of `responses` that stand best first."""
    responses = row["responses"]
    if not isinstance(responses, list) or not all(isinstance(response, str | list | dict) for response in responses):
        raise Mistake(f"'responses' holds {brief(repr(responses))}; it must be a list of texts or messages")
    names = [name for name in ("ranks", "scores") if not is_empty(row.get(name))]
    if len(names) > 1:
        raise Mistake("a row has both 'ranks' and 'scores'; keep one of the two")
    name = next(iter(names), None)
    keys = [number_in(f"a value in {name!r}", key) for key in row[name]] if name else list(range(len(responses)))
    if len(keys) != len(responses):
        raise Mistake(f"{len(responses)} responses, but {len(keys)} ranks or scores")
    if name == "scores":
        keys = [-key for key in keys]
    order = sorted(range(len(responses)), key=lambda i: keys[i])
    levels = sorted(set(keys))
    ranks = tuple(levels.index(keys[i]) for i in order)
    prompt = framed(question(row, "prompt"), row)
    sequences = tuple(continued(row, prompt, responses[i], as_chat) for i in order)
    return [Group(sequences, ranks=ranks if len(levels) < len(keys) else None)]


def _rated(label: str, form: Format) -> Format:
    """Rows of a format of instruction data, each with its label in the column `label`."""

    def convert(row: Row, as_chat: bool) -> list[Group]:
        value = row[label]
        if not is_rating(value):
            raise Mistake(f"column {label!r} holds {brief(repr(value))}, not true or false")
        return [Group((form.convert(row, as_chat),), label=bool(value))]

    name = f"{form.name} with a label" if label == "label" else f"{form.name}, {label}"
    return Format(name, (*form.columns, label), convert, form.reads)


def is_rating(value: Any) -> bool:
    """True for true, false, 1 and 0."""
    return isinstance(value, int | float) and value in (0, 1)


_FORMATS = {form.name: form for form in formats.FORMATS}
_OF_PAIRS = (*OPINIONS, *SCORES)
_OF_PROMPTS = (*BEFORE, *BESIDE)
_OF_TURNS = (*SYSTEM, *TOOLS)
_DIALOGUES = Format("pair of dialogues", ("chosen", "rejected"), _whole_dialogues, (*_OF_TURNS, *_OF_PAIRS))
_TEXTS = Format("pair of dialogues as texts", ("chosen", "rejected"), _texts_of_dialogues, _OF_PAIRS)
_TREE = Format("OASST tree", ("message_tree_id", "prompt"), _tree)
FEEDBACK_FORMATS: tuple[Format, ...] = (
    _rated("label", _FORMATS["messages"]),
    _rated("label", _FORMATS["ShareGPT"]),
    _rated("label", _FORMATS["prompt+completion"]),
    _rated("desirable", _FORMATS["prompt+completion"]),
    _rated("label", _FORMATS["Alpaca"]),
    Format("ShareGPT pair", ("conversations", "chosen", "rejected"), _pair("conversations"), (*_OF_TURNS, *_OF_PAIRS)),
    Format("prompt with a pair", ("prompt", "chosen", "rejected"), _pair("prompt"), (*_OF_PROMPTS, *_OF_PAIRS)),
    Format(
        "Alpaca pair",
        ("instruction", "chosen", "rejected"),
        _pair("instruction", as_turns=True),
        (*_OF_PROMPTS, *_OF_PAIRS),
    ),
    Format("question with a pair", ("question", "chosen", "rejected"), _pair("question"), (*_OF_PROMPTS, *_OF_PAIRS)),
    Format("messages with a pair", ("messages", "chosen", "rejected"), _pair("messages"), (*_OF_TURNS, *_OF_PAIRS)),
    _DIALOGUES,
    _TREE,
    Format("prompt with ranked responses", ("prompt", "responses"), _ranking, (*_OF_PROMPTS, "ranks", "scores")),
)


def recognise(columns: Iterable[str], *, where: str, dialogues_as_texts: bool = False) -> Format:
    """The format of rows of feedback with these columns. Raises Mistake as `formats.recognise` does.

    Args:
      columns: of the first row.
      where: the place of the data, for errors.
      dialogues_as_texts: two dialogues are the texts that they are, for a tokenizer without a chat template.
    """
    forms = _with_texts(FEEDBACK_FORMATS, dialogues_as_texts)
    return formats.recognise(columns, forms, where=where, otherwise="hold no feedback")


def recognise_demonstrations(row: Row, *, where: str, dialogues_as_texts: bool = False) -> Format:
    """The format of supervised data: instruction data, or feedback, of which `demonstrations` are learned.

    A label that is meant as neither true nor false in the first row is not a rating.
    """
    forms = [form for form in _with_texts(FEEDBACK_FORMATS, dialogues_as_texts) if form is not _TREE]
    others = {label for label in formats.LABELS if not formats.may_rate(row.get(label))}
    forms = [form for form in forms if not {c for c in others if not is_empty(row.get(c))} & set(form.columns)]
    return formats.recognise(row.keys() - others, [*forms, *formats.FORMATS], where=where)


def _with_texts(forms: Sequence[Format], as_texts: bool) -> list[Format]:
    return [_TEXTS if as_texts and form is _DIALOGUES else form for form in forms]


def demonstrations(converted: Normal | list[Group]) -> list[Normal]:
    """Sequences of a row that are worth imitating: of feedback the best of each group, unless it is undesirable."""
    if not isinstance(converted, list):
        return [converted]
    return [group.sequences[0] for group in converted if group.label is not False]


def as_kind(groups: list[Group], kind: str, *, ties: bool = False) -> list[Group]:
    """Groups of the kind that a method learns from: a ranking gives all its pairs, a pair two rated responses.

    A group in which no response is better than another gives nothing; only with `ties` do PAIRS keep a tied pair.
    """
    if kind == RATED:
        return [rated for group in groups for rated in _rate(group)]
    if kind == PAIRS:
        return [pair for group in groups for pair in _pairs(group, ties)]
    return [group for group in groups if compares(_levels(group))]


def compares(ranks: Sequence[int]) -> bool:
    """True if one of the responses is better than another."""
    return len(set(ranks)) > 1


def _levels(group: Group) -> tuple[int, ...]:
    """The rank of each response, 0 the best."""
    if group.label is not None:
        raise Mistake(
            "responses with a label each are no pairs; `jaxalign kto` learns from them, or give chosen and rejected"
        )
    count = len(group.sequences)
    return (0,) * count if group.opinions.get("tie") else group.ranks or tuple(range(count))


def _rate(group: Group) -> list[Group]:
    """Two rated responses: the better of a pair, or best of a ranking, is desirable; the worse, or worst, is not."""
    if group.label is not None:
        return [group]
    if not compares(_levels(group)):
        return []
    return [Group((group.sequences[0],), label=True), Group((group.sequences[-1],), label=False)]


def _pairs(group: Group, ties: bool) -> list[Group]:
    """The pairs of a ranking, the better response first: K choose 2, without those whose two ranks are equal."""
    ranks = _levels(group)
    if len(ranks) == 2 and group.ranks is None and (ties or compares(ranks)):
        return [group]
    count = range(len(ranks))
    return [Group((group.sequences[i], group.sequences[j])) for i in count for j in count if ranks[i] < ranks[j]]
