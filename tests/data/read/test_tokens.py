"""Ids and masks by hand: what is learned, what opens and ends a sequence, and what is cut or dropped."""

import numpy as np
import pytest

from jaxalign.data.read.formats import Conversation, PromptCompletion, Text
from jaxalign.data.read.tokens import Encoder, Examples, joined, show

EOS = 2
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "a", "cat", "dog", "sees", "likes", "runs", "to", "from"]


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def encode(tokenizer, row, *, max_length=20, **options):
    encoder = Encoder(tokenizer, (EOS,), max_length, **options)
    return encoder, encoder.encode(row, where="rows, row 1")


def test_a_completion_is_learned_with_its_terminator_and_the_prompt_is_not(tokenizer):
    _, [(tokens, mask)] = encode(tokenizer, PromptCompletion("the cat", "sees a dog"))
    assert tokens.tolist() == [*ids("the cat sees a dog"), EOS]
    assert mask.tolist() == [False, False, True, True, True, True]


def test_every_token_of_a_text_is_learned_but_the_first_which_nothing_predicts(tokenizer):
    _, parts = encode(tokenizer, Text("the cat runs"))
    tokens, mask = Examples.of(parts)[0]
    assert tokens.tolist() == [*ids("the cat runs"), EOS]
    assert mask.tolist() == [False, True, True, True]


def test_the_assistants_turns_are_learned_with_one_terminator_each(chat_tokenizer):
    talk = [("user", "the cat"), ("assistant", "runs"), ("user", "a dog"), ("assistant", "likes to")]
    row = Conversation(tuple({"role": role, "content": content} for role, content in talk))
    _, [(tokens, mask)] = encode(chat_tokenizer, row, max_length=40)
    learned = [chat_tokenizer.decode(int(t)) for t in tokens[mask]]
    assert learned == ["runs", "</s>", "likes", "to", "</s>"]
    assert tokens.tolist().count(EOS) == 2 and tokens[-1] == EOS
    _, [(same, mask)] = encode(chat_tokenizer, row, max_length=40, turns="last")
    assert np.array_equal(tokens, same)
    assert [chat_tokenizer.decode(int(t)) for t in same[mask]] == ["likes", "to", "</s>"]


def test_an_empty_turn_of_the_assistant_is_not_learned(chat_tokenizer):
    talk = [("user", "the cat"), ("assistant", " "), ("tool", "a dog"), ("assistant", "runs")]
    row = Conversation(tuple({"role": role, "content": content} for role, content in talk))
    _, [(tokens, mask)] = encode(chat_tokenizer, row, max_length=40)
    assert [chat_tokenizer.decode(int(t)) for t in tokens[mask]] == ["runs", "</s>"]
    asked_on = Conversation((*row.messages[:2], {"role": "user", "content": "?"}))
    encoder, parts = encode(chat_tokenizer, asked_on, max_length=40)
    assert not parts and encoder.dropped == {"empty response": 1}


def test_a_terminator_is_added_where_the_template_writes_none(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Assistant {% endif %}"
    ).replace("{{ m.content }}", "{% if m.role == 'assistant' %}Assistant {% endif %}{{ m.content }}")
    row = Conversation(({"role": "user", "content": "a cat"}, {"role": "assistant", "content": "runs"}))
    _, [(tokens, mask)] = encode(chat_tokenizer, row)
    assert [chat_tokenizer.decode(int(t)) for t in tokens[mask]] == ["runs", "</s>"]


def test_pad_and_eos_being_one_token_takes_nothing_from_the_mask(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    _, [(_, mask)] = encode(tokenizer, PromptCompletion("a", "dog"))
    assert mask.tolist() == [False, True, True]


def test_rows_longer_than_the_window_keep_their_first_tokens_and_are_counted(tokenizer):
    encoder, [(tokens, mask)] = encode(tokenizer, PromptCompletion("the cat", "sees a dog"), max_length=4)
    assert tokens.tolist() == ids("the cat sees a") and mask.tolist() == [False, False, True, True]
    assert encoder.shortened == 1 and not encoder.dropped


def test_a_long_text_is_cut_into_windows_that_lose_nothing_on_request(tokenizer):
    text = "the cat sees a dog the dog sees a cat"
    _, parts = encode(tokenizer, Text(text), max_length=4, windows=True)
    assert [len(tokens) for tokens, _ in parts] == [4, 4, 3]
    assert np.concatenate([tokens for tokens, _ in parts]).tolist() == [*ids(text), EOS]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PromptCompletion("the cat", " \n"), "empty response"),
        (PromptCompletion("the cat sees a dog", "runs"), "the prompt fills the window"),
        (Text("  "), "empty text"),
        (Conversation(({"role": "user", "content": "a"},)), "no turn of the assistant"),
        (Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": ""})), "empty response"),
    ],
)
def test_rows_with_nothing_to_learn_are_dropped_and_counted_under_their_reason(chat_tokenizer, row, reason):
    encoder, parts = encode(chat_tokenizer, row, max_length=5)
    assert parts == [] and dict(encoder.dropped) == {reason: 1}
    assert encoder.first_dropped == {reason: "rows, row 1"}


@pytest.mark.parametrize("windows", [False, True])
def test_a_text_that_the_window_leaves_one_token_of_is_dropped_and_counted(windows, tokenizer):
    encoder, parts = encode(tokenizer, Text("the cat runs"), max_length=1, windows=windows)
    assert not parts and encoder.dropped == {"a text of one token, which nothing predicts": 1}


def test_examples_keep_their_order_and_a_fingerprint_sees_every_change():
    a = Examples.of([(np.array([1, 2, 3]), np.array([1, 0, 1])), (np.array([4, 5]), np.array([1, 1]))])
    assert a.lengths.tolist() == [3, 2] and a[1][0].tolist() == [4, 5]
    assert a.mask.tolist() == [False, False, True, False, True]
    assert joined([a, a.take([1])]).ids.tolist() == [1, 2, 3, 4, 5, 4, 5]
    others = [
        Examples.of([(np.array([1, 2, 9]), np.array([1, 0, 1])), (np.array([4, 5]), np.array([1, 1]))]),
        Examples.of([(np.array([1, 2, 3]), np.array([1, 1, 1])), (np.array([4, 5]), np.array([1, 1]))]),
        Examples.of([(np.array([1, 2]), np.array([1, 0])), (np.array([3, 4, 5]), np.array([1, 0, 1]))]),
    ]
    assert a.fingerprint() == joined([a]).fingerprint()
    assert len({a.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_an_example_is_shown_with_what_is_learned_in_brackets(tokenizer):
    _, [(tokens, mask)] = encode(tokenizer, PromptCompletion("the cat", "runs"))
    assert show(tokenizer, tokens, mask) == "the cat⟦runs </s>⟧"


@pytest.mark.parametrize(
    "name", ["models/stories260K", "models/babyllama-char361", "tokenizers/mistral-v1", "tokenizers/gpt2"]
)
def test_real_tokenizers_join_prompt_and_completion_as_one_text(shared_data, name):
    from jaxalign.models.files.huggingface import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / name))
    prompt, completion = "Lily said: ", "I like the red ball."
    encoder = Encoder(tokenizer, (tokenizer.eos_token_id or 0,), 200)
    [(tokens, mask)] = encoder.encode(PromptCompletion(prompt, completion), where="")
    text = tokenizer.decode(tokens[:-1], skip_special_tokens=True)
    assert text.strip() == prompt + completion
    assert tokenizer.decode(tokens[mask][:-1]).strip() == completion
    bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokens.tolist().count(tokenizer.bos_token_id) == bos or tokenizer.bos_token_id == tokenizer.eos_token_id
