"""Chat templates, rendered turn by turn, which finds the assistant's responses without template markers.

For each assistant turn, the text up to and including the generation prompt is context; what the template adds for the
turn, up to its terminator, is the response; what follows the terminator (a newline, often) is context of the next turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.mistake import Mistake

Message = dict[str, str]

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


# The marker that ends an assistant's turn, where that is not the tokenizer's eos token.
ENDINGS: dict[str, str] = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}


class Span(NamedTuple):
    """A stretch of rendered text."""

    text: str
    learned: bool


def choose_template(tokenizer: Any, choice: str | None) -> str | None:
    """Sets the tokenizer's template: a name of TEMPLATES or a Jinja file; None keeps the tokenizer's own.

    Returns the token that ends an assistant's turn, if the template is a named one that has its own.

    Raises:
      Mistake: there is no such template, or its markers are not tokens of the tokenizer.
    """
    if choice is None:
        return None
    if choice in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[choice]
        _check_markers(tokenizer, choice)
        return ENDINGS.get(choice)
    if Path(choice).is_file():
        tokenizer.chat_template = Path(choice).read_text()
        return None
    raise Mistake(f"chat template {choice!r} is neither a file nor one of {', '.join(TEMPLATES)}")


def _check_markers(tokenizer: Any, choice: str) -> None:
    unknown = sorted(set(re.findall(r"<\|[a-z_]+\|>", TEMPLATES[choice])) - set(tokenizer.get_vocab()))
    if unknown:
        raise Mistake(
            f"chat template {choice!r} needs the tokens {', '.join(unknown)}, which this tokenizer does not have; "
            "'plain' and 'alpaca' need none"
        )


def require_template(tokenizer: Any) -> None:
    """Raises Mistake when the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise Mistake(
            "the data are conversations, but the tokenizer has no chat template; choose one with `chat_template` "
            f"({', '.join(TEMPLATES)}, or a Jinja file)"
        )


def spans(tokenizer: Any, messages: Sequence[Message], *, terminators: Sequence[str], turns: str = "all") -> list[Span]:
    """The rendered conversation as stretches of context and response, up to the terminator of its last response.

    Args:
      tokenizer: with a chat template.
      messages: the conversation; messages behind the last assistant turn are left out.
      terminators: texts of the tokens that may end a turn.
      turns: the assistant turns that are responses, "all" or the "last". An empty turn before the last is never one:
        it would teach the model to be silent.

    Raises:
      Mistake: there is no assistant turn, or the template changes earlier turns when later ones are added.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        raise Mistake("a conversation without a turn of the assistant")
    stretches, done = [], ""
    for i in answers:
        before = render(tokenizer, messages[:i], True)
        after = render(tokenizer, messages[: i + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise Mistake(
                f"the chat template renders turn {i + 1} in a way that changes what stands before it, so the response "
                "cannot be separated from its context; use another with `chat_template`"
            )
        response = _until_terminator(after[len(before) :], terminators)
        is_response = i == answers[-1] or (turns == "all" and bool(messages[i]["content"].strip()))
        stretches += [Span(before[len(done) :], False), Span(response, is_response)]
        done = before + response
    return stretches


def render(tokenizer: Any, messages: Sequence[Message], generation: bool) -> str:
    """The conversation as text, which ends with the beginning of an assistant turn if `generation`. Raises Mistake."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except jinja2.TemplateSyntaxError as error:
        raise Mistake(f"the chat template is not Jinja, line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise Mistake(f"the chat template refuses a conversation of {roles}: {error}") from None


def _until_terminator(text: str, terminators: Sequence[str]) -> str:
    ends = [text.rfind(t) + len(t) for t in terminators if t and t in text]
    return text[: max(ends)] if ends else text.rstrip("\n")
