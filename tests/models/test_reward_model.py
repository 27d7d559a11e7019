"""Sequence classifiers that transformers made: the same scores here, and the same file when they are written again."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.mistake import Mistake
from jaxalign.models import heads, places
from jaxalign.models.files.huggingface import read_config, read_hf_config
from jaxalign.models.files.load import load_params
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


@pytest.fixture(scope="module")
def classifier(tiny_model, tmp_path_factory):
    """A classifier of the tiny model's trunk, in several files."""
    config = heads.trunk_config(read_config(str(tiny_model)))
    hf_config = read_hf_config(str(tiny_model)) | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    head = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    folder = tmp_path_factory.mktemp("classifier") / "model"
    save_pretrained(folder, load_params(str(tiny_model), config), config, hf_config, head=head, max_shard_bytes=20_000)
    return folder


def with_bias(folder, to, bias):
    """A copy of the classifier whose last file holds a bias too."""
    folder = shutil.copytree(folder, to)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["score.weight"]
    save_file(load_file(folder / file) | {"score.bias": np.array([bias], np.float32)}, folder / file)
    index["weight_map"]["score.bias"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


score = jax.jit(member_scores, static_argnums=0)


def scores_of(folder):
    model = read_reward_model(str(folder))
    tokens, lengths = np.full((2, 8), 6, np.int32), np.array([8, 3], np.int32)
    return score(model.graphdef, load_reward_params(model), tokens, lengths)


def test_a_bias_is_added_to_the_score_before_it_is_normalised(classifier, tmp_path):
    biased = with_bias(classifier, tmp_path / "biased", 0.75)
    expected = scores_of(classifier) + 0.75
    np.testing.assert_allclose(scores_of(biased), expected, atol=1e-5)
    (biased / "reward.json").write_text(json.dumps({"mean": [0.5], "std": [2]}))
    np.testing.assert_allclose(scores_of(biased), (expected - 0.5) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"rule": "stray:rule"}, "'rule' is stray:rule, code of somebody's own, which no file may make run"),
        ({"rule": "os:system"}, "name it yourself: reward_model\\(path=..., rule=...\\)"),
        ({"rule": "median"}, "'rule' is median, which cannot be used .*known are"),
        ({"rule": "mean_minus_std(k='x')"}, "'rule' is mean_minus_std.* which cannot be used"),
        ({"rule": ["mean"]}, "'rule' is .*; it must be a text"),
        ({"mean": [0.0, 1.0]}, "'mean' is .*; it must hold 1 finite numbers"),
        ({"mean": "0"}, "'mean' is 0; it must be a list"),
        ({"mean": [None]}, "'mean' is absent"),
        ({"std": [0.0]}, "'std' is .*; it must hold 1 finite numbers above 0"),
        ({"std": [1e400]}, "'std' is inf; it must be a finite number"),
        ({"members": 2}, "'members' is 2, and the folder has 1 heads"),
        ({"members": True}, "'members' is True; it must be a whole number"),
        ({"max_length": 0}, "'max_length' is 0; it must be at least 1"),
        ({"as_chat": "yes"}, "'as_chat' is yes; it must be true or false"),
        ({"quantise": "int3"}, "quantise='int3' is not one of none"),
        ([1], "not an object with names and values"),
    ],
)
def test_a_description_that_is_damaged_or_names_code_is_refused_by_key_and_value(
    described, message, classifier, tmp_path, monkeypatch
):
    (tmp_path / "stray.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef rule(scores): return scores\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(classifier, tmp_path / "damaged")
    (folder / "reward.json").write_text(json.dumps(described))
    with pytest.raises(Mistake, match=message):
        load_reward_params(read_reward_model(str(folder)))
    assert not (tmp_path / "trace").exists()


def test_a_rule_of_the_callers_own_is_used_and_one_of_the_folder_is_not_read_then(classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "own")
    (folder / "reward.json").write_text(json.dumps({"rule": "os:system"}))
    assert read_reward_model(str(folder), rule="jaxalign.models.heads:least").rule == "jaxalign.models.heads:least"


def test_a_head_of_another_width_is_refused(classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "narrow")
    (folder / "members").mkdir()
    save_file({"heads": np.ones((2, 7), np.float32)}, folder / "members" / "heads.safetensors")
    with pytest.raises(Mistake, match=r"its head has shape \[2, 7\]"):
        read_reward_model(str(folder))
