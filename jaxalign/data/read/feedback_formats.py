"""The formats of human (or AI) feedback, recognised from their columns: pairs, rankings and rated responses.

A response that is a text continues a prompt that is a text; messages are rendered with the chat template. `as_chat`
makes a conversation of two such texts: the prompt is a turn of the user, the response a turn of the assistant.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxalign.data.read import formats
from jaxalign.data.read.formats import Conversation, Format, Normal, PromptCompletion, turns_of
from jaxalign.data.read.sources import Row
from jaxalign.mistake import Mistake

PAIRS, RANKED, RATED = "pairs", "ranked", "rated"
# Columns of a pair: by how much the first is better, the probability that it is, whether the two are equally good.
OPINIONS = "margin", "preference", "tie"


@dataclasses.dataclass(frozen=True)
class Group:
    """Responses to one prompt, each behind it: a pair or a ranking, best first, or a single rated response."""

    sequences: tuple[Normal, ...]
    label: bool | None = None  # of a rated response: True where it is desirable
    opinions: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # of a pair: those of OPINIONS that its row has
    ranks: tuple[int, ...] | None = None  # of a ranking in which some are equal; 0 is the best


def sequence(prompt: Any, response: Any, as_chat: bool) -> Normal:
    """The normal form of a prompt (text or messages) with its response (text, message or messages)."""
    if isinstance(prompt, str) and isinstance(response, str) and not as_chat:
        return PromptCompletion(prompt, response)
    responses = [response] if isinstance(response, dict) else turns_of(response, "assistant")
    return _conversation([*turns_of(prompt), *responses])


def _conversation(turns: Sequence[Row]) -> Conversation:
    """The conversation of messages in either spelling: role and content, or from and value."""
    return formats.messages([{"role": t["from"], "content": t["value"]} if "from" in t else t for t in turns])


def _pair(column: str) -> Callable[[Row, bool], list[Group]]:
    """Converts rows with a prompt in `column` and with chosen and rejected, which may repeat or continue it."""

    def convert(row: Row, as_chat: bool) -> list[Group]:
        prompt = row[column]
        if row.get("system") and isinstance(prompt, str):
            prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": prompt}]
        parts = [_context_and_response(prompt, row[name]) for name in ("chosen", "rejected")]
        return [Group(tuple(sequence(*part, as_chat) for part in parts), opinions=_opinions(row))]

    return convert


def _context_and_response(prompt: Any, response: Any) -> tuple[Any, Any]:
    """(the context, the response to it) of a response whose messages repeat the prompt or go on behind it.

    A repeated prompt may have a system turn that the prompt lacks, or lack one that it has: the longer of the two is
    the context.
    """
    if not isinstance(response, list) or len(response) < 2:
        return prompt, response
    turns, before = (_conversation(turns_of(part)).messages for part in (response, prompt))
    if _within(before, turns[:-1]):
        return response[:-1], response[-1:]
    if _within(turns[:-1], before[1 - len(turns) :]):  # the last turns of the prompt
        return prompt, response[-1:]
    if turns[0]["role"] == "assistant":
        return turns_of(prompt), response
    raise Mistake(
        f"a response of {len(turns)} turns begins with {turns[0]['role']} and does not repeat the prompt; repeat all "
        "of it, or begin with the assistant's turn behind it"
    )


def _within(few: Sequence[Row], many: Sequence[Row]) -> bool:
    """True if `few` is a run of turns of `many`; white space around a text makes no difference."""
    part, whole = ([(turn["role"], turn["content"].strip()) for turn in turns] for turns in (few, many))
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _check_finite(name: str, *values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise Mistake(f"{name} is {value!r}, not a finite number; give one, or leave it out")


def _opinions(row: Row) -> dict[str, float]:
    for name in (*OPINIONS, "score_chosen", "score_rejected"):
        if isinstance(row.get(name), int | float):
            _check_finite(name, row[name])
    opinions = {name: float(row[name]) for name in OPINIONS if isinstance(row.get(name), int | float)}
    if not 0 <= opinions.get("preference", 1) <= 1:
        raise Mistake(f"preference is {row['preference']!r}, not a probability")
    chosen, rejected = row.get("score_chosen"), row.get("score_rejected")
    if "margin" not in opinions and isinstance(chosen, int | float) and isinstance(rejected, int | float):
        opinions["margin"] = float(chosen - rejected)
    return opinions


def _instruction_pair(row: Row, as_chat: bool) -> list[Group]:
    prompt = formats.with_context(row["instruction"], row.get("input") or "")
    return [Group(tuple(sequence(prompt, row[name], True) for name in ("chosen", "rejected")), opinions=_opinions(row))]


def _whole_dialogues(row: Row, as_chat: bool) -> list[Group]:
    """The pair of two dialogues, texts as in hh-rlhf or lists of messages, that share all but their last turn."""
    chosen, rejected = (_dialogue(row[name]) for name in ("chosen", "rejected"))
    return [Group((chosen, rejected), opinions=_opinions(row))]


def _dialogue(text: Any) -> Conversation:
    if not isinstance(text, str):
        return _conversation(list(text))
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if parts[0].strip() or len(parts) < 3:
        raise Mistake(r"a dialogue must begin with '\n\nHuman:' or '\n\nAssistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[r], "content": text.strip()} for r, text in zip(parts[1::2], parts[2::2], strict=True)]
    return formats.messages(turns)


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
    responses = list(row["responses"])
    if row.get("ranks") is not None:
        keys = list(row["ranks"])
    else:
        keys = [-s for s in row["scores"]] if row.get("scores") is not None else list(range(len(responses)))
    if len(keys) != len(responses):
        raise Mistake(f"{len(responses)} responses, but {len(keys)} ranks or scores")
    _check_finite("a rank or score", *keys)
    order = sorted(range(len(responses)), key=lambda i: keys[i])
    levels = sorted(set(keys))
    ranks = tuple(levels.index(keys[i]) for i in order)
    sequences = tuple(sequence(row["prompt"], responses[i], as_chat) for i in order)
    return [Group(sequences, ranks=ranks if len(levels) < len(keys) else None)]


def _rated(label: str) -> Callable[[Row, bool], list[Group]]:
    """Converts rows of a response each, with its label in the column `label`."""

    def convert(row: Row, as_chat: bool) -> list[Group]:
        value = row[label]
        if not isinstance(value, bool) and value not in (0, 1):
            raise Mistake(f"column {label} holds {value!r}, not true or false")
        if "messages" in row:
            return [Group((_conversation(row["messages"]),), label=bool(value))]
        return [Group((sequence(row["prompt"], row["completion"], as_chat),), label=bool(value))]

    return convert


FEEDBACK_FORMATS: tuple[Format, ...] = (
    Format("messages with a label", ("messages", "label"), _rated("label")),
    Format("prompt+completion with a label", ("prompt", "completion", "label"), _rated("label")),
    Format("prompt+completion, desirable", ("prompt", "completion", "desirable"), _rated("desirable")),
    Format("ShareGPT pair", ("conversations", "chosen", "rejected"), _pair("conversations")),
    Format("prompt with a pair", ("prompt", "chosen", "rejected"), _pair("prompt")),
    Format("Alpaca pair", ("instruction", "chosen", "rejected"), _instruction_pair),
    Format("question with a pair", ("question", "chosen", "rejected"), _pair("question")),
    Format("pair of dialogues", ("chosen", "rejected"), _whole_dialogues),
    Format("OASST tree", ("message_tree_id", "prompt"), _tree),
    Format("prompt with ranked responses", ("prompt", "responses"), _ranking),
)


def recognise(columns: Iterable[str], *, where: str) -> Format:
    """The format of rows of feedback with these columns. Raises Mistake as `formats.recognise` does."""
    return formats.recognise(columns, FEEDBACK_FORMATS, where=where, otherwise="hold no feedback")


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
