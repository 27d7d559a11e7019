"""Chat templates: which one a tokenizer has, and the text that it makes of messages.

Every template is rendered by `render`, for training and for inference alike; data/read/turns.py parts its text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.read.rendering import TemplateError, rendered
from jaxalign.mistake import Mistake
from jaxalign.outside import MIB, brief, read_text

log = logging.getLogger(__name__)

Message = dict[str, Any]  # as formats.Conversation has them

# Small templates for tokenizers without one. Each ends a turn of the assistant with the tokenizer's own eos token.
TEMPLATES: dict[str, str] = {
    "plain": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
        "{% else %}{{ m.role | capitalize }}: {{ m.content }}{% endif %}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}


def choose_template(tokenizer: Any, choice: str | None) -> None:
    """Sets the tokenizer's template: a name of TEMPLATES or a Jinja file; None keeps the tokenizer's own.

    The template decides alone whether a bos token opens a conversation; of a named one the log says what it decides.

    Raises:
      Mistake: there is no such template, or its markers are not tokens of the tokenizer.
    """
    if choice is None:
        return
    if choice in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[choice]
        _check_markers(tokenizer, choice)
        opens = "{{ bos_token }}" in TEMPLATES[choice] and tokenizer.bos_token
        log.info("chat template %s: a conversation begins with %s", choice, opens or "no bos token")
    elif not Path(choice).exists():
        raise Mistake(f"chat template {brief(repr(choice))} is neither a file nor one of {', '.join(TEMPLATES)}")
    else:
        tokenizer.chat_template = read_text(choice, limit=MIB)


def _check_markers(tokenizer: Any, choice: str) -> None:
    markers = sorted(set(re.findall(r"<\|[a-z_]+\|>", TEMPLATES[choice])))
    unknown = [marker for marker in markers if not is_token(tokenizer, marker)]
    if unknown:
        raise Mistake(
            f"chat template {choice!r} needs the tokens {', '.join(unknown)}, which this tokenizer does not have, or "
            "cuts into pieces; 'plain' and 'alpaca' need none"
        )


def is_token(tokenizer: Any, marker: str) -> bool:
    """True if a marker in a text is one token: some tokenizers cut even a token of theirs into pieces."""
    ids = tokenizer(f"\n{marker}", add_special_tokens=False)["input_ids"]
    return marker in tokenizer.get_vocab() and ids[-1:] == [tokenizer.convert_tokens_to_ids(marker)]


def require_template(tokenizer: Any) -> None:
    """Raises Mistake when the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise Mistake(
            "the data are conversations, but the tokenizer has no chat template; choose one with `chat_template` "
            f"({', '.join(TEMPLATES)}, or a Jinja file)"
        )


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    generation: bool,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    open_turn: bool = False,
) -> str:
    """The conversation as text.

    Args:
      tokenizer: with a chat template.
      messages: as `formats.Conversation` has them.
      generation: end with the beginning of an assistant turn.
      tools: JSON schemas of the functions that the assistant may call.
      open_turn: end behind the text of the last message, which a response continues.

    Raises:
      Mistake: the template is damaged, or refuses the messages.
    """

    def apply(*, json_arguments: bool = False) -> str:
        turns = [_as_templates_read(message, json_arguments=json_arguments) for message in messages]
        options = {"add_generation_prompt": generation, "continue_final_message": open_turn}
        return rendered(tokenizer, turns, tools=list(tools) if tools else None, **options)

    try:
        try:
            return apply()
        except TemplateError as error:  # some templates join the arguments of a call to text, so they need them as JSON
            if not (str(error).startswith("TypeError") and any(m.get("tool_calls") for m in messages)):
                raise
            return apply(json_arguments=True)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise Mistake(
            f"the chat template cannot render a conversation of {brief(roles)}: {brief(str(error), 200)}"
        ) from None


def _as_templates_read(message: Message, *, json_arguments: bool = False) -> Message:
    """The message without what is ours, and its reasoning under both names that templates have for it."""
    turn = {key: value for key, value in message.items() if key != "learn"}
    if "reasoning_content" in turn:
        turn["thinking"] = turn["reasoning_content"]
    if json_arguments and turn.get("tool_calls"):
        calls = [dict(call["function"]) for call in turn["tool_calls"]]
        texts = [call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls]
        turn["tool_calls"] = [call | {"function": text} for call, text in zip(turn["tool_calls"], texts, strict=True)]
    return turn
