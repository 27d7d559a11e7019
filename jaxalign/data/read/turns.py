"""Turns of the assistant in rendered conversations: the text that inference reads before each, and what it must write.

The context of a turn is the text that the template renders of the messages before it, generation prompt included, to
the letter. The response is what the template writes for the turn behind that context, up to and with the tokens that
end the turn. Marks, put behind the texts of messages, show where a template writes them, and whether it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxalign.data.read.chat import Message, is_token, render
from jaxalign.data.read.formats import Conversation
from jaxalign.mistake import Mistake
from jaxalign.outside import brief

TEXTS = "content", "reasoning_content"  # keys of a message whose text the template must write
BLOCK = r"\s*<(\w+)>\s*\Z"  # the beginning of thoughts, at the end of some generation prompts
WAY_OUT = "use another template with `chat_template`"


class Turn(NamedTuple):
    """A turn of the assistant."""

    context: str  # what inference reads before it
    response: str
    end: str  # the token at the end of the response that the template ends turns with; "" if there is none


def says(message: Message) -> bool:
    """True if a turn has a text, thoughts or a call."""
    return bool(message.get("tool_calls")) or any((message.get(key) or "").strip() for key in TEXTS)


def context(tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, open_turn: bool = False) -> str:
    """The text that inference reads of messages, up to the beginning of the response.

    Args:
      tokenizer: with a chat template.
      messages: at least one.
      tools: JSON schemas, or None.
      open_turn: the response continues the last message.

    Raises:
      Mistake: the template refuses the messages, or leaves out a part of them.
    """
    start = 0
    for stop in sorted({*(i + 1 for i in _assistants(messages)), len(messages)}):
        _marked_text(tokenizer, messages, tools, start, stop)
        start = stop
    text = render(tokenizer, messages, not open_turn, tools=tools, open_turn=open_turn)
    if tools:
        _check_tools(tokenizer, messages, text, not open_turn, open_turn=open_turn)
    return text


class Turns:
    """Finds the turns of the assistant in conversations, as the tokenizer's template writes them."""

    def __init__(self, tokenizer: Any, terminators: Sequence[str] = ()):
        """
        Args:
          tokenizer: with a chat template.
          terminators: texts of the tokens that end a response.
        """
        self._tokenizer, self._terminators = tokenizer, terminators
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *terminators, *(t.content for t in added if t.special)}
        others = {t.content for t in added} - special
        self._special, self._others = (re.compile(_alternatives(texts)) for texts in (special, others))
        self._run = re.compile(f"(?:{_alternatives(special)})+")

    def learned(self, row: Conversation, indices: Sequence[int]) -> Iterator[Turn]:
        """The turns of the assistant at these indices, in order; each has messages before it.

        Raises:
          Mistake: the template refuses the messages, leaves out a part of them, or changes those before a turn.
        """
        tokenizer, messages, tools, start = self._tokenizer, row.messages, row.tools, 0
        for i in [i for i in _assistants(messages) if i <= indices[-1]]:
            marked = _marked_text(tokenizer, messages, tools, start, i + 1, learned=i in indices)
            start = i + 1
            if i not in indices:
                continue
            before = render(tokenizer, messages[:i], True, tools=tools)
            whole = render(tokenizer, messages[: i + 1], False, tools=tools)
            if tools:
                _check_tools(tokenizer, messages[: i + 1], whole, False)
            response = _behind_context(tokenizer, messages[: i + 1], tools, before, whole)
            suffix = marked.rpartition(_mark(i))[2]
            end = self._end(suffix)
            tail = suffix[end.end() :] if end else ""
            if not response.endswith(tail):
                raise Mistake(f"the chat template ends turn {i + 1} otherwise than others of its kind; {WAY_OUT}")
            response = response[: len(response) - len(tail)] if end else response.rstrip("\n")
            _check_texts(messages[i], before[-64:] + response, i, self._terminators)
            yield Turn(before, response, self._last_token(end[0]) if end else "")

    def ends(self) -> list[int]:
        """Ids of the tokens with which the template ends an answer and a call of a tool, if it has such tokens."""
        function = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
        call = {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
        question, tokens = {"role": "user", "content": "a"}, []
        for answer, tools in (({"content": "a"}, None), (call, [{"type": "function", "function": function}])):
            try:
                text = _marked_text(self._tokenizer, [question, {"role": "assistant", **answer}], tools, 1, 2)
            except Mistake:  # the template refuses or ignores such a turn; data that have one get the error
                continue
            if end := self._end(text.rpartition(_mark(1))[2]):
                tokens.append(self._last_token(end[0]))
        known = [token for token in dict.fromkeys(tokens) if is_token(self._tokenizer, token)]
        return self._tokenizer.convert_tokens_to_ids(known)

    def _last_token(self, end: str) -> str:
        return (self._special.findall(end) or self._others.findall(end))[-1]

    def _end(self, suffix: str) -> re.Match | None:
        """The tokens that end a turn in the text behind its last word: the first run of special tokens.

        Where there are no special ones, it is the last of the other tokens that were added to the vocabulary.
        """
        return self._run.search(suffix) or next(reversed([*self._others.finditer(suffix)]), None)


def with_turn_ends(tokenizer: Any, terminators: Sequence[int], *, first: bool = False) -> tuple[int, ...]:
    """The terminators with the ends of the template's turns that are not among them, behind or before the others."""
    ends = Turns(tokenizer).ends() if tokenizer.chat_template else []
    others = [end for end in ends if end not in terminators]
    return (*others, *terminators) if first else (*terminators, *others)


def once_ended(text: str, terminators: Sequence[str]) -> tuple[str, str]:
    """(the text without the terminators at its end and the white space between and behind, the first of them or "")"""
    ends, rest, end = sorted(filter(str.strip, terminators), key=len, reverse=True), text.rstrip(), ""
    while match := next((token for token in ends if rest.endswith(token)), ""):
        end, text = match, rest[: len(rest) - len(match)]
        rest = text.rstrip()
    return text, end


def _alternatives(texts: set[str]) -> str:
    """A regular expression of these texts, the longest first; of none, one that matches nothing."""
    return "|".join(re.escape(t) for t in sorted(filter(str.strip, texts), key=len, reverse=True)) or r"(?!)"


def _left_out(part: str) -> str:
    return f"the chat template leaves out {part}; {WAY_OUT}, or take that out of the data"


def _check_tools(
    tokenizer: Any, messages: Sequence[Message], text: str, generation: bool, *, open_turn: bool = False
) -> None:
    """Raises Mistake if the template makes the same text of messages with tools and without."""
    try:
        without = render(tokenizer, messages, generation, open_turn=open_turn)
    except Mistake:  # a template that needs tools does not leave them out
        return
    if text == without:
        raise Mistake(_left_out("the 'tools' of the conversation"))


def _assistants(messages: Sequence[Message]) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def _mark(i: int, key: str = "") -> str:
    """A word that no data have; the marks of all keys of message i end alike."""
    return f"{key[:1]}qz{i}zq"


def _marked(message: Message, i: int) -> tuple[Message, dict[str, str]]:
    """(the message with a mark behind each text and in the arguments of each call, the mark of each such key)"""
    marks = {key: _mark(i, key) for key in TEXTS if (message.get(key) or "").strip()}
    calls = message.get("tool_calls")
    if not marks and not calls:
        return {**message, "content": _mark(i)}, {}
    marked = {**message, **{key: message[key] + mark for key, mark in marks.items()}}
    if calls:
        marks["tool_calls"] = mark = _mark(i, "tool_calls")
        functions = [c["function"] | {"arguments": {**c["function"]["arguments"], mark: mark}} for c in calls]
        marked["tool_calls"] = [c | {"function": function} for c, function in zip(calls, functions, strict=True)]
    return marked, marks


def _marked_text(
    tokenizer: Any, messages: Sequence[Message], tools: Any, start: int, stop: int, *, learned: bool = False
) -> str:
    """The rendered messages before `stop`, with marks from `start`; of these at most the last is the assistant's.

    Raises Mistake where a mark is missing. Thoughts may be, where the generation prompt opens a block for them; those
    that are `learned` are looked for in what is learned.
    """
    parts = [_marked(m, i) for i, m in enumerate(messages[start:stop], start)]
    turns = [*messages[:start], *(message for message, _ in parts)]
    text = render(tokenizer, turns, turns[-1]["role"] != "assistant", tools=tools)
    marks_before = [mark for _, marks in parts[:-1] for mark in marks.values()]
    before_response = text  # some templates write the system text, or the tools, only as long as nothing is responded
    if turns[-1]["role"] == "assistant" and not all(mark in text for mark in marks_before):
        before_response = render(tokenizer, turns[:-1], True, tools=tools)
    for i, (_, marks) in enumerate(parts, start):
        for key, mark in marks.items():
            if (
                mark in text
                or mark in before_response
                or (key == "reasoning_content" and (learned or _opens(tokenizer, turns[:-1], tools)))
            ):
                continue
            raise Mistake(_left_out(f"the {key!r} of turn {i + 1}, which is of the {messages[i]['role']}"))
    return text


def _opens(tokenizer: Any, messages: Sequence[Message], tools: Any) -> bool:
    """True if the generation prompt behind these messages opens a block of thoughts."""
    return bool(messages) and re.search(BLOCK, render(tokenizer, messages, True, tools=tools)[-64:]) is not None


def _behind_context(tokenizer: Any, messages: Sequence[Message], tools: Any, before: str, whole: str) -> str:
    """The text of the last message behind its context `before`, in the conversation `whole`.

    Where the generation prompt opens a block of thoughts that the template leaves out of the turn, or writes with other
    white space, the thoughts are written as the model must write them behind that prompt: "...</think>" and the answer.
    """
    if whole.startswith(before):
        return whole[len(before) :]
    message, history = messages[-1], render(tokenizer, messages[:-1], False, tools=tools)
    probe = render(tokenizer, [*messages[:-1], {"role": message["role"], "content": _mark(0)}], False, tools=tools)
    header = _common_prefix(before, probe)  # up to where an answer begins, whatever it is
    if len(header) < len(_common_prefix(before, history)) or not whole.startswith(header):
        response = _behind_last_text(tokenizer, messages, tools)
        if response is not None:
            return response
        raise Mistake(
            f"the chat template renders turn {len(messages)} in a way that changes what stands before it, so the "
            f"response cannot be separated from its context; {WAY_OUT}"
        )
    opener, rest = before[len(header) :], whole[len(header) :]
    block = re.match(BLOCK, opener)
    if block is None:
        return rest.lstrip() if opener[-1:].isspace() else rest
    opening, closing = f"<{block[1]}>", f"</{block[1]}>"
    if rest.lstrip().startswith(opening):
        return rest.lstrip()[len(opening) :].lstrip("\n" if opener.endswith("\n") else "")
    if closing in rest:
        return rest
    if closing in message["content"]:  # the template keeps the answer only
        thoughts, answer = message["content"].rsplit(closing, 1)
        space = "" if rest.startswith(answer) else answer[: len(answer) - len(answer.lstrip())]
        return f"{thoughts.lstrip().removeprefix(opening).lstrip()}{closing}{space}{rest}"
    thoughts = (message.get("reasoning_content") or "").strip("\n")
    return f"{thoughts}\n{closing}\n\n{rest.lstrip()}"


def _behind_last_text(tokenizer: Any, messages: Sequence[Message], tools: Any) -> str | None:
    """The text of the last message behind its generation prompt, where the template changes what stands further before.

    Both stand behind the text of the message before the last, which a mark ends; None if they do not.
    """
    i = len(messages) - 2
    marked, marks = _marked(messages[i], i)
    question = [*messages[:i], marked]
    prompt = render(tokenizer, question, True, tools=tools).rpartition(marks.get("content", "\0"))
    whole = render(tokenizer, [*question, messages[-1]], False, tools=tools).rpartition(marks.get("content", "\0"))
    behind = prompt[2]
    return whole[2][len(behind) :] if prompt[1] and whole[1] and whole[2].startswith(behind) else None


def _common_prefix(one: str, other: str) -> str:
    return one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def _check_texts(message: Message, written: str, i: int, terminators: Sequence[str]) -> None:
    """Raises Mistake where a text of turn i is not in what is learned of it; white space makes no difference."""
    for key in TEXTS:
        text, _ = once_ended(message.get(key) or "", terminators)
        if "".join(text.split()) not in "".join(written.split()):
            raise Mistake(_left_out(f"a part of the {key!r} of turn {i + 1}, {brief(text)!r}"))
