"""The chat template of a tokenizer, and the form in which messages are handed to it."""

import logging

import pytest

from jaxalign.data.read.chat import TEMPLATES, choose_template, render, require_template
from tests.data.read.vocabularies import of_bytes, of_pieces

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_templates_come_by_name_or_file(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no chat template; choose one with `chat_template` \(plain, alpaca, chatml"):
        require_template(tokenizer)
    choose_template(tokenizer, "plain")
    assert tokenizer.chat_template == TEMPLATES["plain"]
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    choose_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="'polite' is neither a file nor one of plain, alpaca, chatml, llama3"):
        choose_template(tokenizer, "polite")
    with pytest.raises(ValueError, match=r"needs the tokens <\|im_end\|>, <\|im_start\|>, which this tokenizer"):
        choose_template(tokenizer, "chatml")


def test_markers_that_a_tokenizer_has_and_yet_cuts_into_pieces_are_refused():
    tokenizer = of_pieces(markers=[])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])  # searched for behind the blank that it puts before a text
    with pytest.raises(ValueError, match=r"needs the tokens <\|im_end\|>, <\|im_start\|>, .* or cuts into pieces"):
        choose_template(tokenizer, "chatml")


@pytest.mark.parametrize(("name", "beginning"), [("plain", "<s>"), ("chatml", "no bos token"), ("llama3", "<s>")])
def test_a_named_template_decides_whether_a_bos_token_opens_a_conversation_and_says_so(name, beginning, caplog):
    with caplog.at_level(logging.INFO, "jaxalign"):
        choose_template(of_pieces(), name)
    assert f"chat template {name}: a conversation begins with {beginning}" in caplog.messages


def test_a_template_that_refuses_is_quoted_and_one_that_is_damaged_named_with_its_line():
    tokenizer = of_bytes()
    tokenizer.chat_template = "{{ raise_exception('only\x1b users') }}"
    with pytest.raises(ValueError, match=r"cannot render a conversation of user, assistant: only\\x1b users"):
        render(tokenizer, TALK, True)
    tokenizer.chat_template = "\n{% for %}"
    with pytest.raises(ValueError, match="it is not Jinja, line 2"):
        render(tokenizer, TALK, True)


def test_templates_read_reasoning_under_both_names_calls_as_objects_or_json_and_not_what_is_ours():
    tokenizer = of_bytes()
    turn = {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [CALL], "learn": False}
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.thinking ~ m.reasoning_content ~ m.learn }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments.a }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}"
    )
    assert render(tokenizer, [turn], False) == 'soso1{"a": 1}'
    tokenizer.chat_template = "{% for m in messages %}{{ 'call ' + m.tool_calls[0].function.arguments }}{% endfor %}"
    assert render(tokenizer, [turn], False) == 'call {"a": 1}'
