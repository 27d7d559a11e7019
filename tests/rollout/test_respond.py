"""Texts in, texts out: what is refused before weights are read, and which settings a config gives."""

import dataclasses
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.config.inference import GenerateConfig
from jaxalign.config.on_policy import PPOConfig
from jaxalign.mistake import Mistake
from jaxalign.rollout.engine.http import HttpEngine
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import encode_prompts, load_model, load_tokenizer_only, respond
from tests.rollout.server import Server


def test_a_config_without_a_setting_samples_with_its_default(tmp_path):
    config = PPOConfig(model="m", data="d", output=tmp_path, max_new_tokens=8, temperature=0.5)
    assert not hasattr(config, "top_k")
    assert Sampling.of(config, [2]) == Sampling(8, 0.5, terminators=(2,))
    config = GenerateConfig("m", "p", max_new_tokens=8, top_p=0.9, repetition_penalty=1.5, stop=(".",))
    assert Sampling.of(config, stop=config.stop) == Sampling(8, top_p=0.9, repetition_penalty=1.5, stop=(".",))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_settings_that_cannot_be_are_refused_by_name(tiny_model, wrong):
    model = load_tokenizer_only(str(tiny_model))
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"`{name}` {value}"):
        encode_prompts(model, ["the cat"], Sampling()._replace(**wrong))


def test_prompts_are_refused_before_weights_are_read(tiny_model):
    model = load_tokenizer_only(str(tiny_model))
    with pytest.raises(ValueError, match="prompt 2 has no tokens"):
        encode_prompts(model, ["the cat", ""], Sampling(4))
    with pytest.raises(ValueError, match=r"prompt 1: .* no chat template"):
        encode_prompts(model, [[{"role": "user", "content": "the cat"}]], Sampling(4))
    short = model._replace(config=dataclasses.replace(model.config, learned_positions=5))
    with pytest.raises(ValueError, match=r"more than the 5 positions of .*; shorten the prompt or lower"):
        encode_prompts(short, ["the cat"], Sampling(4))
    with pytest.raises(ValueError, match="was loaded without its weights"):
        respond(model, ["the cat"], Sampling(4))
    with pytest.raises(ValueError, match="has random weights, which answer nothing"):
        load_model(f"config:{tiny_model}", dtype="float32")


def test_a_server_answers_as_the_model_here_with_the_tokenizer_alone(tiny_model):
    sampling, prompts = Sampling(6, temperature=0.0), ["the cat sees", "a dog"]
    local = respond(load_model(str(tiny_model), dtype="float32"), prompts, sampling)
    with Server(tiny_model) as server:
        model = load_tokenizer_only(str(tiny_model))
        assert respond(model, prompts, sampling, engine=HttpEngine(server.url)) == local


def test_of_a_tokenizer_longer_than_the_embedding_only_the_ids_that_occur_are_refused(tiny_model, tmp_path):
    folder = tmp_path / "few"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:20].copy()
    save_file(tensors, folder / "model.safetensors")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"vocab_size": 20}))
    model = load_tokenizer_only(str(folder))
    assert encode_prompts(model, ["the cat"], Sampling(4)) == [[4, 6]]
    with pytest.raises(Mistake, match=r"token '\.' is number 20 of the tokenizer of .* has embeddings for 20"):
        encode_prompts(model, ["the cat", "the cat ."], Sampling(4))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 20]}))
    with pytest.raises(Mistake, match="token 20 is to end texts, and the model has tokens 0 to 19"):
        load_tokenizer_only(str(folder))
