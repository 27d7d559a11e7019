"""The turns of the assistant that are learned: contexts to the letter of inference, responses up to their end."""

import pytest

from jaxalign.data.read.chat import TEMPLATES, choose_template
from jaxalign.data.read.formats import Conversation, PromptCompletion, Text
from jaxalign.data.read.tokens import Encoder, context_ids, show
from jaxalign.data.read.turns import Turns, context, with_turn_ends
from tests.data.read.vocabularies import CLOSES, HIDES, MARKERS, OPENS, THINKS, of_bytes, of_pieces


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


TALK = user("hi"), assistant("hello"), user("bye"), assistant("so long")
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = ({"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}},)


def encoder(template, make=of_bytes, terminators=None, **options):
    """An encoder whose tokenizer has the template, by name or as text; </s> is its eos token."""
    tokenizer = make()
    if template in TEMPLATES:
        choose_template(tokenizer, template)
    else:
        tokenizer.chat_template = template
    ends = with_turn_ends(tokenizer, [tokenizer.eos_token_id] if terminators is None else terminators)
    return Encoder(tokenizer, ends, 500, **options)


def shown(encoder, *messages, tools=None):
    """The examples of a conversation, learned parts between brackets; before each stands what inference reads."""
    rows = encoder.encode(Conversation(messages, tools), where="row 1")
    contexts = [
        encoder.tokenizer.apply_chat_template(messages[:i], tools=tools, add_generation_prompt=True)["input_ids"]
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and i
    ]
    for ids, mask in rows:
        assert all(ids[:k].tolist() in contexts for k in range(1, len(ids)) if mask[k] and not mask[k - 1])
    return [show(encoder.tokenizer, ids, mask) for ids, mask in rows]


def learned(encoder, *messages, **options):
    return [part.split("⟧")[0] for row in shown(encoder, *messages, **options) for part in row.split("⟦")[1:]]


def test_every_turn_of_the_assistant_is_learned_up_to_and_with_its_end():
    assert shown(encoder("chatml"), *TALK) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦hello<|im_end|>⟧\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n⟦so long<|im_end|>⟧"
    ]


def test_only_the_last_turn_is_learned_on_request_and_what_follows_it_is_left_out():
    assert learned(encoder("chatml", turns="last"), *TALK, user("?")) == ["so long<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_named_template_ends_a_turn_with_one_token_that_ends_texts_too(name):
    made = encoder(name)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    assert learned(made, *TALK) == [f"hello{end}", f"so long{end}"]
    assert made.tokenizer.convert_tokens_to_ids(end) in made.terminators


def test_turns_that_are_not_to_be_learned_and_silent_ones_are_context():
    talk = user("a"), assistant("b", learn=False), user("c"), assistant(" "), user("d"), assistant("e")
    assert learned(encoder("chatml"), *talk) == ["e<|im_end|>"]
    silent = encoder("chatml")
    assert learned(silent, user("a"), assistant("b"), user("c"), assistant("")) == []
    assert silent.dropped == {"empty response": 1}
    ignored = encoder("chatml", turns="last")
    assert learned(ignored, *TALK[:3], assistant("no", learn=False)) == ["hello<|im_end|>"]


def test_a_first_turn_of_the_assistant_is_context_as_nothing_asks_for_it():
    made = encoder("chatml")
    assert learned(made, assistant("welcome"), *TALK[:2]) == ["hello<|im_end|>"]
    assert [note.split(",")[0] for note in made.notes] == ["begin with the assistant"]
    assert learned(made, assistant("welcome"), user("hi")) == []


@pytest.mark.parametrize("make", [of_bytes, of_pieces])
def test_a_turn_whose_ids_inference_reads_otherwise_begins_an_example_of_its_own(make):
    """The generation prompt of `plain` ends in a blank, which the first letters of an answer take into their token."""
    made = encoder("plain", make)
    yo = assistant("yo")
    rows = shown(made, user("hi"), yo, user("hi"), yo)
    assert [row.count("⟦") for row in rows] == [1, 1] and list(made.notes.values()) == [1]
    assert len(shown(encoder("alpaca", make), user("hi"), yo, user("hi"), yo)) == 1


def test_the_turns_end_is_learned_alone_where_eos_is_another_token_and_is_a_terminator():
    made = encoder("chatml")
    ends = made.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert list(made.terminators) == ends
    assert learned(made, user("hi"), assistant("hello")) == ["hello<|im_end|>"]
    assert with_turn_ends(made.tokenizer, [ends[0]], first=True) == (ends[1], ends[0])
    assert with_turn_ends(of_bytes(), [7]) == (7,)  # no template


def test_eos_follows_only_a_turn_that_nothing_of_the_template_ends():
    made = encoder(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert shown(made, *TALK) == [
        "user: hi\nassistant:⟦ hello</s>⟧",
        "user: hi\nassistant: hello\nuser: bye\nassistant:⟦ so long</s>⟧",
    ]
    doubled = TEMPLATES["chatml"].replace("<|im_end|>", "<|eot_id|><|im_end|>")
    assert learned(encoder(doubled), *TALK) == ["hello<|eot_id|><|im_end|>", "so long<|eot_id|><|im_end|>"]


def test_an_added_token_that_is_not_special_ends_a_turn_too():
    def make():
        tokenizer = of_bytes(markers=[])
        tokenizer.add_tokens(MARKERS)
        return tokenizer

    assert learned(encoder("chatml", make), *TALK) == ["hello<|im_end|>", "so long<|im_end|>"]


@pytest.mark.parametrize("text", ["b", "b</s>", "b</s>\n", "b</s> </s>"])
def test_a_text_that_already_ends_in_eos_learns_it_once(text):
    made = encoder("chatml")
    for row in (PromptCompletion("a", text), Text(f"a{text}")):
        [(ids, _)] = made.encode(row, where="")
        assert made.tokenizer.decode(ids) == "ab</s>"
    assert learned(made, user("a"), assistant(text.replace("</s>", "<|im_end|>"))) == ["b<|im_end|>"]
    assert learned(made, user("a"), assistant("say <|im_end|> now")) == ["say <|im_end|> now<|im_end|>"]


@pytest.mark.parametrize("make", [of_bytes, of_pieces])
def test_eos_that_a_tokenizer_puts_behind_texts_is_not_behind_a_prompt(make):
    made = encoder("chatml", lambda: make(eos=True))
    [(ids, mask)] = made.encode(PromptCompletion("hi", " yo"), where="")
    assert (
        ids[~mask].tolist() == make()("hi")["input_ids"]
        and made.tokenizer.eos_token_id in make(eos=True)("hi")["input_ids"]
    )
    assert made.tokenizer.decode(ids[mask]).strip() == "yo</s>"


def test_a_history_that_the_template_rewrites_makes_an_example_a_turn():
    made = encoder(THINKS)
    talk = user("hi"), assistant("hello", reasoning_content="A"), user("bye"), assistant("<think>B</think>so long")
    first = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    second = "hello<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    assert shown(made, *talk) == [
        f"{first}⟦<think>\nA\n</think>\n\nhello<|im_end|>⟧",
        f"{first}{second}⟦<think>\nB\n</think>\n\nso long<|im_end|>⟧",
    ]
    assert shown(encoder(THINKS, turns="last"), *talk) == shown(made, *talk)[1:]
    assert learned(encoder(CLOSES), *TALK) == ["hello<|eot_id|>", "so long<|eot_id|>"]


@pytest.mark.parametrize("template", [OPENS, HIDES])
@pytest.mark.parametrize(
    ("answer", "response"),
    [
        (assistant("yo", reasoning_content="A"), "A\n</think>\n\nyo"),
        (assistant("<think>\nA\n</think>\n\nyo"), "A\n</think>\n\nyo"),
        (assistant("A\n</think>\n\nyo"), "A\n</think>\n\nyo"),
        (assistant("yo"), "\n</think>\n\nyo"),
        (assistant("<b>yo"), "\n</think>\n\n<b>yo"),
    ],
)
def test_a_generation_prompt_that_opens_thoughts_is_followed_by_them_or_their_end(template, answer, response):
    made = encoder(template, turns="last")
    end = "<|im_end|>" if template == OPENS else "<|eot_id|>"
    assert shown(made, user("hi"), answer)[0].endswith(f"<|im_start|>assistant\n<think>\n⟦{response}{end}⟧")


def test_a_template_that_changes_the_past_when_the_assistant_has_answered_is_learned_as_inference_reads_it():
    """Mistral's writes the system text and the tools before the user's turn only while nothing stands behind it."""
    system = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}, {% endif %}"
        "{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    made = encoder(system)
    instruction = {"role": "system", "content": "S"}
    assert shown(made, instruction, *TALK[:2]) == ["[INST] S, hi[/INST]⟦ hello</s>⟧"]
    assert shown(made, instruction, *TALK)[1] == "[INST] hi[/INST] hello</s>[INST] S, bye[/INST]⟦ so long</s>⟧"
    assert context(made.tokenizer, [instruction, *TALK[:3]]).endswith("[INST] S, bye[/INST]")


def test_a_template_that_writes_something_else_before_an_answer_once_there_is_one_is_refused():
    counts = "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}"
    with pytest.raises(
        ValueError, match="row 1: the chat template renders turn 2 in a way that changes what stands before"
    ):
        learned(encoder(counts), *TALK)


def test_calls_and_tools_are_rendered_and_turns_that_call_are_learned():
    made = encoder(THINKS)
    talk = user("1 + 1"), assistant("", tool_calls=CALLS), {"role": "tool", "content": "2"}, assistant("It is 2.")
    first, last = shown(made, *talk, tools=TOOLS)
    assert first.endswith('⟦<think>\n\n</think>\n\n\n<tool_call>add{"a": 1}</tool_call><|im_end|>⟧')
    assert first.startswith('[{"type": "function"') and "tool\n2<|im_end|>" in last
    assert last.endswith("⟦<think>\n\n</think>\n\nIt is 2.<|im_end|>⟧")


IGNORES = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "tools", "part"),
    [
        (
            IGNORES,
            [{"role": "system", "content": "s"}, *TALK[:2]],
            None,
            "the 'content' of turn 1, which is of the system",
        ),
        (IGNORES, [user("s"), {"role": "developer", "content": "s"}, TALK[1]], None, "the 'content' of turn 2"),
        (IGNORES, [*TALK, {"role": "tool", "content": "s"}, TALK[1]], None, "turn 5, which is of the tool"),
        ("plain", [TALK[0], assistant("", tool_calls=CALLS), *TALK[2:]], None, "the 'tool_calls' of turn 2"),
        ("plain", TALK, TOOLS, "the 'tools' of the conversation"),
        (
            "plain",
            [TALK[0], assistant("hello", reasoning_content="so"), *TALK[2:]],
            None,
            "'reasoning_content' of turn 2",
        ),
        ("plain", [*TALK[:3], assistant("hello", reasoning_content="so")], None, "'reasoning_content' of turn 4"),
        (
            HIDES.replace("<think>\n", ""),
            [*TALK[:3], assistant("<think>so</think>hello")],
            None,
            "a part of the 'content' of turn 4, '<think>so</think>hello'",
        ),
    ],
)
@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_template_that_leaves_out_a_part_of_a_row_is_refused(template, messages, tools, part, turns):
    with pytest.raises(ValueError, match=f"row 1: the chat template leaves out .*{part}.*; use another"):
        encoder(template, turns=turns).encode(Conversation(tuple(messages), tools), where="row 1")


def test_so_is_one_that_leaves_out_a_part_of_a_prompt():
    tokenizer = encoder("plain").tokenizer
    for messages, tools in ((TALK[:3], TOOLS), ([TALK[0], assistant("", tool_calls=CALLS), TALK[2]], None)):
        with pytest.raises(ValueError, match="the chat template leaves out"):
            context(tokenizer, messages, tools)
    assert context(tokenizer, TALK[:3]).endswith("User: bye\nAssistant: ")


def test_a_context_ends_behind_the_last_turn_where_the_response_continues_it():
    for name in ("chatml", "llama3"):
        tokenizer = encoder(name).tokenizer
        before = tokenizer.decode(context_ids(tokenizer, TALK, open_turn=True))
        assert before.endswith("assistant\n" * (name == "chatml") + "\n\n" * (name == "llama3") + "so long")


def test_a_template_without_ends_or_of_other_roles_has_none():
    tokenizer = of_bytes()
    for template in ("{% for m in messages %}{{ m.content }}{% endfor %}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert Turns(tokenizer).ends() == []
