"""Tokenizers of the tiny model, without a chat template and with one."""

import pytest

from tests.shared import TEMPLATE


@pytest.fixture
def tokenizer(tiny_model):
    from jaxalign.models.files.huggingface import load_tokenizer

    return load_tokenizer(str(tiny_model))


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer
