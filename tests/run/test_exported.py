"""Folders that a run leaves: transformers and PEFT compute what was trained, and stop where training ended texts."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import LoraConfig
from jaxalign.models.adapters.lora import join, split
from jaxalign.models.adapters.merge import merge_by_layer
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.huggingface import load_tokenizer
from jaxalign.models.files.load import load_params
from jaxalign.models.files.weights import trained_on_other_weights
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import load_model, load_tokenizer_only, respond
from jaxalign.run import final
from jaxalign.run.run import Run
from jaxalign.run.vocabulary import Vocabulary
from tests.models.tiny import save_random

ADAPTERS = {
    "llama": {"rank": 2},
    "gpt2": {"rank": 2, "rslora": True},
    "phi3": {"rank": 2, "dora": True},
}
TALK = [{"role": "user", "content": "the cat sees"}]
# PEFT asks transformers for an attribute that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def words(tiny_model, tmp_path_factory):
    """A tokenizer with ChatML's two tokens and nothing to pad with; its eos is not what ends a turn."""
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.pad_token = None
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": 60}))
    return folder


def logits_of(config, params, lora, tokens):
    graphdef, _ = make_decoder(config, lora=lora)

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        unembedding = model.unembed()
        logits = model(tokens) @ unembedding.weight.T
        return logits if unembedding.softcap is None else unembedding.softcap * jnp.tanh(logits / unembedding.softcap)

    return np.asarray(forward(params))


@pytest.fixture(scope="module", params=ADAPTERS)
def exported(request, words, tmp_path_factory):
    """(base, final/, adapter/, ids, the logits of what was trained)"""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp(request.param)
    save_random(request.param, folder / "base")
    config = SFTConfig(
        model=str(folder / "base"),
        data="data.jsonl",
        output=folder,
        tokenizer=str(words),
        chat_template="chatml",
        max_length=32,
        lora=LoraConfig(**ADAPTERS[request.param]),
    )
    run = Run.read(config, "sft", exists=False)
    _, abstract = split(make_decoder(run.model, lora=run.lora)[1])
    draw = np.random.default_rng(0).standard_normal
    adapter = jax.tree.map(lambda x: jnp.asarray(0.1 * draw(x.shape) + (x.ndim == 2), x.dtype), abstract)
    params = join(adapter, load_params(config.model, run.model))
    tokens = np.random.default_rng(0).integers(3, 29, (2, 12))
    expected = logits_of(run.model, params, run.lora, tokens)
    final.save_lora(folder / "adapter", run, adapter, 1)
    final.save_model(folder / "final", run, merge_by_layer(params, run.lora), 1)
    return folder / "base", folder / "final", folder / "adapter", tokens, expected


def test_transformers_and_peft_compute_the_logits_of_what_was_trained(exported):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, merged, adapter, tokens, expected = exported
    models = [
        AutoModelForCausalLM.from_pretrained(merged),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    ]
    for model in models:
        with torch.no_grad():
            logits = model.eval()(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_both_folders_say_what_ends_a_text_how_turns_are_written_and_what_to_pad_with(exported):
    from transformers import AutoTokenizer, GenerationConfig

    base, merged, adapter, _, _ = exported
    for folder in (merged, adapter):
        tokenizer, generation = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert generation.eos_token_id == [end, 2] and generation.max_length == 60
        assert tokenizer.pad_token_id == generation.pad_token_id not in (end, 2)
        text = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and "the cat sees" in text
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == [end, 2]
    ours = load_tokenizer_only(str(base), adapter)
    assert ours.terminators == (end, 2) and ours.tokenizer.chat_template == tokenizer.chat_template


def test_an_adapter_on_other_weights_than_it_was_trained_on_is_said(exported, tmp_path):
    base, _, adapter, _, _ = exported
    other = shutil.copytree(base, tmp_path / "other")
    scaled = {name: (x * 1.05).astype(x.dtype) for name, x in load_file(base / "model.safetensors").items()}
    save_file(scaled, other / "model.safetensors", metadata={"format": "pt"})
    assert not trained_on_other_weights(adapter, str(base)) and trained_on_other_weights(adapter, str(other))


@pytest.mark.parametrize("exported", ["llama"], indirect=True)
def test_greedy_text_of_padded_prompts_is_ours(exported):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, merged, _, _, _ = exported
    theirs = AutoModelForCausalLM.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged, padding_side="left")
    texts = ["the cat", "a dog sees the red cat"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=10)
    responses = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = respond(load_model(str(merged), dtype="float32"), texts, Sampling(max_new_tokens=10, temperature=0.0))
    assert [text.split() for text in responses] == [text.split() for text, _ in ours]


def test_a_vocabulary_with_nothing_but_an_eos_token_generates_with_it_as_padding(tiny_model):
    """A word as padding would be left out of texts, for padding is a special token."""
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.pad_token = None
    config = SFTConfig(model=str(tiny_model), data="", output=tiny_model)
    padded, generation = final.for_generation(config, Vocabulary(tokenizer, (5, 2)))
    assert padded.pad_token_id == generation["pad_token_id"] == 2 and generation["eos_token_id"] == [5, 2]
    assert tokenizer.pad_token_id is None
