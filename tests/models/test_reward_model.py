"""Sequence classifiers that transformers made: the same scores here, and the same file when they are written again."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.models import places
from jaxalign.models.files.reward import CLASSIFIERS, load_reward_params, member_scores, read_reward_model
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.heads import combine
from jaxalign.models.places import Layout
from jaxalign.training import sharding
from tests.models.tiny import TINY

FAMILIES = ["llama", "llama-tied-biased", "mistral", "qwen2", "gemma2", "gemma3", "gpt2", "gpt-neox"]
LENGTHS = (12, 7, 1)


def save_classifier(name, folder, *, labels=1, **changes):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    values = {**TINY[name], "pad_token_id": 0, "num_labels": labels, **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_ragged_rows_equal_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = save_classifier(name, tmp_path)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 67, length) for length in LENGTHS]
    tokens = np.full((4, 15), 5, np.int32)  # what follows a row is no part of it, whatever its id
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    with torch.no_grad():
        expected = [theirs(torch.tensor(row[None])).logits[0, 0].item() for row in rows]
    model = read_reward_model(str(tmp_path))
    params = load_reward_params(model)
    actual = jax.jit(member_scores, static_argnums=0)(model.graphdef, params, tokens, np.array([*LENGTHS, 0], np.int32))
    assert actual.shape == (4, 1) and np.std(expected) > 0.05
    np.testing.assert_allclose(combine(actual, model.rule), [*expected, 0.0], atol=1e-4)
    again, hf_config = tmp_path / "again", json.loads((tmp_path / "config.json").read_text())
    save_pretrained(again, params["model"], model.config, hf_config, head=params["head"])
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, again))
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


def test_on_a_mesh_the_scores_are_those_of_one_device(tmp_path):
    pytest.importorskip("torch")
    save_classifier("llama", tmp_path)
    mesh = places.make_mesh(data=2, fsdp=2, tensor=2)
    tokens, lengths = np.random.default_rng(0).integers(3, 67, (4, 8), np.int32), np.array([8, 5, 3, 8], np.int32)
    alone, cut = read_reward_model(str(tmp_path)), read_reward_model(str(tmp_path), layout=Layout(mesh))
    expected = member_scores(alone.graphdef, load_reward_params(alone), tokens, lengths)
    params = load_reward_params(cut, shardings=places.shardings(cut.like, mesh))
    assert "fsdp" in params["model"]["blocks"]["mlp"]["up"]["kernel"].sharding.spec
    batch = sharding.put_batch((tokens, lengths), mesh)
    actual = jax.jit(member_scores, static_argnums=0)(cut.graphdef, params, *batch)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_classifier_of_two_labels_and_a_language_model_are_refused(tmp_path):
    pytest.importorskip("torch")
    save_classifier("llama", tmp_path / "two", labels=2)
    with pytest.raises(ValueError, match="has 2 labels; a reward model has one"):
        read_reward_model(str(tmp_path / "two"))
    hf_config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(hf_config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, not a reward model"):
        read_reward_model(str(tmp_path / "two"))


def test_every_family_has_the_name_that_transformers_gives_its_classifier():
    transformers = pytest.importorskip("transformers")
    assert all(hasattr(transformers, name) for name in CLASSIFIERS)
