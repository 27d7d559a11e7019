"""Turns of a conversation as data sets spell them, brought to one form; whatever a turn carries is read or refused.

{"role": "user", "content": "hi"}                         OpenAI
{"from": "human", "value": "hi"}                          ShareGPT
{"from": "function_call", "value": '{"name": ...}'}       LLaMA-Factory: a call of a tool, as JSON text
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief, parse_json

Turn = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
CALLS = ("function_call", "tool_call")  # roles of turns that are a call, as JSON text
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")  # what the assistant thinks before it responds
LEARNED = ("weight", "train", "training", "loss")  # 1 or true: the turn is learned; 0 or false: it is only context
TOOLS = ("tools", "functions")
KEYS = ("role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id", *TOOLS)
READ = (*KEYS, *REASONING, *LEARNED)
# Keys of a turn, and columns of a row, that carry content and that nothing here can render.
UNREADABLE = (
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
    "document",
    "documents",
    "train_detail",
    "kto_tag",
)
# Further keys of a turn of which the same is true; as columns they may be anything.
UNREADABLE_IN_TURNS = (
    *UNREADABLE,
    "parts",
    "refusal",
    "function_calls",
    "tool_responses",
    "tool_results",
    "thought",
    "thoughts",
    "reasoning_details",
    "training_detail",
    "mask",
    "masked",
)
OF_CALLS = ("name", "arguments", "parameters", "id", "type", "index", "function")  # keys of a call that are read


def is_empty(value: Any) -> bool:
    """True for a value that carries no content: None, and empty texts, lists and objects."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def message(turn: Turn) -> Turn:
    """The turn as {"role", "content", ...}, with the keys that `formats.Conversation` lists. Raises Mistake."""
    for key in UNREADABLE_IN_TURNS:
        if not is_empty(turn.get(key)):
            raise Mistake(f"a turn has {key!r}, which is not read; write it into the text, or leave the row out")
    spelling = _value(turn, "role", "from")
    if not isinstance(spelling, str) or spelling not in ROLES:
        raise Mistake(f"role {brief(repr(spelling))} is not one of {', '.join(ROLES)}")
    role, calls = ROLES[spelling], _calls(turn)
    content = "" if calls and not {"content", "value"} & set(turn) else _content(_value(turn, "content", "value"))
    if spelling in CALLS:
        calls, content = calls + _calls_in(content), ""
    if calls and role != "assistant":
        raise Mistake(f"a turn of the {role} has 'tool_calls' or 'function_call', which only the assistant's have")
    result: Turn = {"role": role, "content": content}
    if calls:
        result["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if not is_empty(turn.get(key)):
            result[key] = _text_under(turn, key)
    if reasoning := _reasoning(turn, role):
        result["reasoning_content"] = reasoning
    if not _is_learned(turn, role):
        result["learn"] = False
    return result


def _value(turn: Turn, name: str, other: str) -> Any:
    """The value under the one of two names that the turn has. Raises KeyError without either."""
    values = [turn[key] for key in (name, other) if not is_empty(turn.get(key))]
    same = values[:1] == values[1:] or (name == "role" and len({ROLES.get(str(v), str(v)) for v in values}) == 1)
    if len(values) == 2 and not same:
        raise Mistake(f"a turn has {name!r} {brief(repr(values[0]))} and {other!r} {brief(repr(values[1]))}; keep one")
    return values[0] if values else turn[other if other in turn and name not in turn else name]


def _content(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(map(_part, value))
    if not isinstance(value, str):
        raise Mistake(f"column 'content' holds {brief(value)}, not text")
    return value


def _part(part: Any) -> str:
    """The text of a part of a content in parts."""
    if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise Mistake(
            f"'content' has a part {brief(repr(kind))}; only parts of type 'text' are read: leave the row out"
        )
    return part["text"]


def _text_under(turn: Turn, key: str) -> str:
    if not isinstance(turn[key], str):
        raise Mistake(f"{key!r} of a turn is {brief(repr(turn[key]))}, not text")
    return turn[key]


def _reasoning(turn: Turn, role: str) -> str:
    texts = dict.fromkeys(_text_under(turn, key) for key in REASONING if not is_empty(turn.get(key)))
    if texts and role != "assistant":
        raise Mistake(f"a turn of the {role} has {' and '.join(map(repr, REASONING))}, which only the assistant's have")
    if len(texts) > 1:
        raise Mistake(f"a turn has several of {', '.join(map(repr, REASONING))}, and they differ; keep one")
    return next(iter(texts), "")


def _is_learned(turn: Turn, role: str) -> bool:
    marks = {key: turn[key] for key in LEARNED if not is_empty(turn.get(key))}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise Mistake(f"{key!r} of a turn is {brief(repr(mark))}; a turn is learned (1, true) or not (0, false)")
        if mark and role != "assistant":
            raise Mistake(f"{key!r} of a turn of the {role} is {mark!r}; only the assistant's turns are learned")
    if len(set(map(bool, marks.values()))) > 1:
        raise Mistake(f"a turn has {', '.join(f'{k!r} {v!r}' for k, v in marks.items())}, which disagree; keep one")
    return all(marks.values())


def unlearned(turn: Turn) -> Turn:
    """A turn of the assistant as context, unless it says itself whether it is learned; other turns as they are."""
    unmarked = all(is_empty(turn.get(key)) for key in LEARNED)
    spelling = turn.get("role") or turn.get("from")
    return turn | {"train": False} if unmarked and ROLES.get(str(spelling)) == "assistant" else turn


def _calls(turn: Turn) -> list[Turn]:
    """Calls of tools in OpenAI's keys: a list under 'tool_calls', or one under the older 'function_call'."""
    calls = turn.get("tool_calls")
    if not is_empty(calls) and not isinstance(calls, list):
        raise Mistake(f"'tool_calls' of a turn is {brief(calls)}, not a list")
    older = turn.get("function_call")
    return [_call(call) for call in [*(calls or []), *([] if is_empty(older) else [older])]]


def _calls_in(text: str) -> list[Turn]:
    calls = parse_json(text, "a turn that calls a tool")
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any) -> Turn:
    """{"type": "function", "function": {"name": ..., "arguments": {...}}}, with the call's id if it has one."""
    fields = Fields(call, "a call of a tool")
    if fields.get("type", str, "function") != "function":
        raise Mistake(f"a call of a tool has type {brief(repr(call['type']))}; only 'function' is read")
    function = fields.object("function") if "function" in fields else fields
    for key, value in [*fields.content.items(), *function.content.items()]:
        if key not in OF_CALLS and not is_empty(value):
            raise Mistake(f"a call of a tool has {brief(repr(key))}, which is not read; write it into 'arguments'")
    if not is_empty(function.content.get("arguments")) and not is_empty(function.content.get("parameters")):
        raise Mistake("a call of a tool has both 'arguments' and 'parameters'; keep one of the two")
    arguments = function.content.get("arguments")
    if is_empty(arguments):
        arguments = function.content.get("parameters") or {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments.strip() or "{}", "'arguments' of a call of a tool")
    arguments = Fields(arguments, "'arguments' of a call of a tool").content
    identity = {"id": call["id"]} if call.get("id") else {}
    return identity | {"type": "function", "function": {"name": function.get("name", str), "arguments": arguments}}


def tools_in(value: Any) -> tuple[Turn, ...] | None:
    """JSON schemas of functions, from a list or its JSON text; a bare function is wrapped as OpenAI's form has it."""
    tools = parse_json(value, "'tools'") if isinstance(value, str) and value.strip() else value
    if not isinstance(tools := tools or [], list | tuple):
        raise Mistake(f"'tools' holds {brief(value)}, not a list of functions")
    return tuple(map(_tool, tools)) or None


def _tool(tool: Any) -> Turn:
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise Mistake(f"'tools' holds {brief(tool)}, not a function with a 'name'")
    return {"type": "function", "function": tool}


def tools_of(turns: Sequence[Turn], tools: tuple[Turn, ...] | None) -> tuple[Turn, ...] | None:
    """The tools of a row or of one of its turns. Raises Mistake if two places differ."""
    everything = [tools, *(tools_in(turn.get(key)) for turn in turns for key in TOOLS)]
    distinct = [value for i, value in enumerate(everything) if value and value not in everything[:i]]
    if len(distinct) > 1:
        raise Mistake("'tools' stand in several places of a row, and differ; keep one list")
    return distinct[0] if distinct else None


def unread_keys(turns: Any) -> set[str]:
    """Keys of turns that have a value and that nothing reads."""
    turns = [turns] if isinstance(turns, dict) else turns if isinstance(turns, list | tuple) else []
    return {k for turn in turns if isinstance(turn, dict) for k, v in turn.items() if k not in READ and not is_empty(v)}
