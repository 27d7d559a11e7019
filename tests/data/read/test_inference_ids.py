"""The law of ids: before every learned token stand the ids that generation reads for the same messages or text.

It is held against transformers itself, for tokenizers made here and for real ones, with every template that fits.
"""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.read.chat import TEMPLATES, choose_template
from jaxalign.data.read.formats import Conversation, PromptCompletion
from jaxalign.data.read.tokens import Encoder, text_ids
from jaxalign.data.read.turns import with_turn_ends
from jaxalign.data.sets.prompts import encode
from jaxalign.mistake import Mistake
from tests.data.read.vocabularies import CLOSES, HIDES, MARKERS, OPENS, THINKS, of_bytes, of_pieces

REAL = [f"models/{name}" for name in ("stories260K", "babyllama-char361")]
REAL += [f"tokenizers/{name}" for name in ("gpt2", "pythia", "mistral-v1")]
MADE = {"bytes": of_bytes, "pieces": of_pieces, "closed pieces": functools.partial(of_pieces, eos=True)}
ALL = {**TEMPLATES, "thinks": THINKS, "opens": OPENS, "hides": HIDES, "closes": CLOSES}

WORDS = st.text("yo h[1\n é<", min_size=1, max_size=8)  # what the tokenizers made here have tokens across, and more
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


@functools.cache
def made(kind):
    return MADE[kind]()


@pytest.fixture(scope="module")
def real(shared_data):
    from jaxalign.models.files.huggingface import load_tokenizer

    @functools.cache
    def load(name):
        tokenizer = load_tokenizer(str(shared_data / name))
        tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
        return tokenizer

    return load


def check(tokenizer, template, system, exchanges, turns):
    """Asserts the law for a conversation, and that the learned text is the response."""
    choose_template(tokenizer, template) if template in TEMPLATES else setattr(
        tokenizer, "chat_template", ALL[template]
    )
    messages = [{"role": "system", "content": system}] * bool(system)
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoder = Encoder(tokenizer, with_turn_ends(tokenizer, [tokenizer.eos_token_id]), 10_000, turns)
    rows = encoder.encode(Conversation(tuple(messages)), where="")
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant" and (m["content"].strip())]
    expected = {
        tuple(tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)["input_ids"]): messages[i]
        for i in places
    }
    count = 0
    for ids, mask in rows:
        edges = np.flatnonzero(np.diff([False, *mask, False]))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            count += 1
            message = expected[tuple(ids[:start].tolist())]
            assert ids[stop - 1] in encoder.terminators
            text = tokenizer.decode(ids[start:stop], skip_special_tokens=True)
            assert "".join(message["content"].split()) in "".join(text.split())
    conversation = messages[:-1]
    assert tuple(encode(conversation, tokenizer, "")) in expected or places[-1:] != [len(messages) - 1]
    if messages[-1]["content"].strip():
        assert count == (len(places) if turns == "all" else 1)


@pytest.mark.parametrize("template", ALL)
@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=15, deadline=None)
@given(system=st.sampled_from(["", "Be y."]), exchanges=TURNS, turns=st.sampled_from(["all", "last"]))
def test_before_what_is_learned_stands_what_inference_reads(kind, template, system, exchanges, turns):
    check(made(kind), template, system, exchanges, turns)


@pytest.mark.parametrize("template", ALL)
@pytest.mark.parametrize("name", REAL)
def test_so_it_is_with_real_tokenizers(real, name, template):
    exchanges = [("Hi, who are you?", "I'm Lily."), ("2 + 2 =", " 4\n\nThat's it."), ("é\n", "[1] <b>日本</b>")]
    for system in ("", "You are a cat."):
        for turns in ("all", "last"):
            check(real(name), template, system, exchanges, turns)


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=30, deadline=None)
@given(prompt=WORDS, completion=WORDS)
def test_a_prompt_that_is_a_text_has_the_ids_of_inference_and_its_completion_goes_on(kind, prompt, completion):
    tokenizer = made(kind)
    rows = Encoder(tokenizer, (tokenizer.eos_token_id,), 1000).encode(PromptCompletion(prompt, completion), where="")
    for ids, mask in rows:
        assert ids[~mask].tolist() == encode(prompt, tokenizer, "") == text_ids(tokenizer, prompt)
        texts = [
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids, text_ids(tokenizer, prompt + completion))
        ]
        assert texts[0] == texts[1]


def test_no_bos_is_doubled_and_no_eos_put_behind_a_prompt():
    tokenizer = of_pieces(eos=True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("yo")["input_ids"] == [bos, *tokenizer("yo", add_special_tokens=False)["input_ids"], eos]
    assert text_ids(tokenizer, "yo") == text_ids(tokenizer, "<s>yo") == tokenizer("yo")["input_ids"][:-1]


def test_messages_without_a_template_are_refused():
    with pytest.raises(Mistake, match="the tokenizer has no chat template"):
        encode([{"role": "user", "content": "a"}], of_bytes(), "row 1")
