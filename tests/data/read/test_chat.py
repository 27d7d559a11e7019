"""Stretches of a rendered conversation that are learned."""

import jinja2
import pytest

from jaxalign.data.read.chat import TEMPLATES, Span, choose_template, require_template, spans


class Renderer:
    """A tokenizer as far as templates go."""

    bos_token, eos_token = "<s>", "</s>"

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(self.chat_template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
        )


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def test_every_assistant_turn_is_learned_up_to_and_with_its_terminator():
    stretches = spans(Renderer(TEMPLATES["chatml"]), TALK, terminators=["<|im_end|>"])
    assert stretches == [
        Span("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        Span("hello<|im_end|>", True),
        Span("\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n", False),
        Span("so long<|im_end|>", True),
    ]


def test_only_the_last_turn_is_learned_on_request():
    stretches = spans(Renderer(TEMPLATES["chatml"]), TALK, terminators=["<|im_end|>"], turns="last")
    assert [span.text for span in stretches if span.learned] == ["so long<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_named_template_gives_back_the_whole_conversation(name):
    tokenizer = Renderer(TEMPLATES[name])
    stretches = spans(tokenizer, TALK, terminators=["</s>", "<|im_end|>", "<|eot_id|>"])
    whole = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=False)
    assert whole.startswith("".join(span.text for span in stretches))
    answers = [span.text for span in stretches if span.learned]
    assert [a.startswith(m["content"]) for a, m in zip(answers, TALK[1::2], strict=True)] == [True, True]
    assert all(a.endswith(("</s>", "<|im_end|>", "<|eot_id|>")) for a in answers)


def test_what_follows_the_last_answer_is_left_out():
    stretches = spans(
        Renderer(TEMPLATES["chatml"]), [*TALK, {"role": "user", "content": "?"}], terminators=["<|im_end|>"]
    )
    assert stretches[-1] == Span("so long<|im_end|>", True)


def test_an_answer_that_names_the_terminator_ends_at_the_last_one():
    talk = [TALK[0], {"role": "assistant", "content": "say <|im_end|> now"}]
    stretches = spans(Renderer(TEMPLATES["chatml"]), talk, terminators=["<|im_end|>"])
    assert stretches[-1].text == "say <|im_end|> now<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}: {{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ValueError, match="renders turn 4 in a way that changes what stands before it"):
        spans(Renderer(forgetful), TALK, terminators=[])


def test_a_template_that_refuses_is_quoted():
    strict = "{{ raise_exception('only users') if messages[0].role == 'system' }}{{ messages[0].content }}"

    class Strict(Renderer):
        def apply_chat_template(self, messages, **options):
            raise jinja2.TemplateError("only users")

    with pytest.raises(ValueError, match="refuses a conversation of user: only users"):
        spans(Strict(strict), TALK[:2], terminators=[])


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="without a turn of the assistant"):
        spans(Renderer(TEMPLATES["plain"]), TALK[:1], terminators=[])


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


def test_a_named_template_says_which_token_ends_its_turns(tokenizer):
    assert choose_template(tokenizer, None) is None and choose_template(tokenizer, "alpaca") is None
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    assert choose_template(tokenizer, "chatml") == "<|im_end|>"
