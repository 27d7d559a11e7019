"""Chat templates of others are rendered as transformers does, and end in bounded time and memory."""

import os

import pytest

from jaxalign.data.read import rendering
from jaxalign.data.read.chat import TEMPLATES, choose_template, render
from jaxalign.mistake import Mistake

TALK = [
    {"role": "system", "content": "é 😀 \u2028"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"arguments": {"n": 1.5}}}]},
]


@pytest.fixture
def hurried(monkeypatch):
    """The time limit is a fifth of a second."""
    monkeypatch.setattr(rendering, "SECONDS", 0.2)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{{ messages | tojson }}{{ tools | tojson }}"])
@pytest.mark.parametrize("generation", [True, False])
def test_a_template_renders_as_in_transformers(template, generation, tokenizer):
    tokenizer.chat_template = template
    options = {"add_generation_prompt": generation, "tools": [{"type": "function", "function": {"name": "f"}}]}
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, **options)
    assert rendering.rendered(tokenizer, TALK, **options) == expected


FAILS = {
    "{% include 'notes.txt' %}": "TypeError: no loader for this environment",
    "{% import 'os' as os %}": "TypeError: no loader for this environment",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ 'a' + 1 }}": "TypeError: can only concatenate str",
    "{{ messages[9].content }}": "list object has no element 9",
    "{{ unknown() }}": "'unknown' is undefined",
    "{{ raise_exception('no \x1b[2J users') }}": r"no \x1b[2J users",
    "{% for m in messages": "it is not Jinja, line 1",
    "{{ messages.append(1) }}": "is unsafe",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for i in range(10 ** 9) %}a{% endfor %}": "OverflowError: Range too big",
    "{{ 'a' * 10 ** 11 }}": "more than 4 GiB of memory",
    "{{ 'a' | center(10 ** 11) }}": "more than 4 GiB of memory",
}


@pytest.mark.parametrize("template", FAILS)
def test_a_template_that_fails_is_a_mistake_of_one_safe_line(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(Mistake) as caught:
        render(tokenizer, TALK, True)
    text = str(caught.value)
    assert text.startswith("the chat template cannot render a conversation of system, user, assistant: ")
    assert FAILS[template] in text and text.isprintable()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}",
    ],
)
def test_a_template_that_does_not_end_is_ended_and_the_next_one_renders(template, tokenizer, hurried):
    tokenizer.chat_template = template
    with pytest.raises(Mistake, match=r"it was still computing after 0\.2 s, and was ended"):
        render(tokenizer, TALK, True)
    tokenizer.chat_template = "{{ messages[1].content }}"
    assert render(tokenizer, TALK, True) == "hi"


def test_a_template_file_is_a_small_regular_file_of_text(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "pipe.jinja")
    (tmp_path / "latin.jinja").write_bytes(b"\xff{{ messages }}")
    with (tmp_path / "huge.jinja").open("wb") as file:
        file.truncate(2**31)
    for name, rule in {
        "pipe": "not a regular file",
        "latin": "not UTF-8 text",
        "huge": "more than the 1,048,576",
    }.items():
        with pytest.raises(Mistake, match=rule):
            choose_template(tokenizer, str(tmp_path / f"{name}.jinja"))
