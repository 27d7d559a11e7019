"""Checkpoints made by transformers."""

import functools

import pytest

from jaxalign.models.files.huggingface import read_config
from jaxalign.models.files.load import load_params
from tests.models.tiny import save_random


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """name -> (folder of a checkpoint that transformers made, its config, its params)."""
    pytest.importorskip("peft")

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name) / "base"
        save_random(name, folder)
        config = read_config(str(folder))
        return folder, config, load_params(str(folder), config)

    return make
