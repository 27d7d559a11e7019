"""The tokenizer of words of the tiny model; it knows no double newline, so templates of one newline are used here."""

import pytest

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Assistant : {{ m.content }} {{ eos_token }}\n"
    "{% else %}Human : {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant : {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model):
    from jaxalign.models.files.huggingface import load_tokenizer

    return load_tokenizer(str(tiny_model))


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer
