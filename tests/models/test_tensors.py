"""Weights are the file's: what a folder of tensors may hold, where it may lie, and what becomes of every tensor."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import init_params
from jaxalign.models.files.families import model_config
from jaxalign.models.files.huggingface import read_config, read_hf_config
from jaxalign.models.files.load import check_files, load_params
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.files.tensors import CHUNK, EXPONENTS, INDEX, all_finite, read_file
from tests.models.tiny import TINY, save_random

LLAMA = {"architectures": ["LlamaForCausalLM"], **TINY["llama"], "num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    """A folder of two files and an index."""
    config = model_config(LLAMA)
    save_pretrained(tmp_path / "m", init_params(config, jax.random.key(0)), config, LLAMA, max_shard_bytes=20_000)
    return tmp_path / "m"


def refused(path):
    """The one line with which the files are refused before an array is made."""
    with pytest.raises(Mistake) as raised:
        check_files(str(path), read_config(str(path)))
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    return str(raised.value)


def changed_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..", "", "\x1b[2J/../x"])
def test_an_index_names_no_file_outside_its_folder(model, name):
    changed_index(model, lambda index: index["weight_map"].update({UP: name}))
    assert "'weight_map' names" in refused(model) and "it must name files of this folder" in refused(model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i["weight_map"].update({UP: 3}), f"'weight_map': '{UP}' is 3; it must be a text"),
        (lambda i: i["weight_map"].update({UP: ["x"]}), "it must be a text"),
        (lambda i: i.update(weight_map=[1]), "'weight_map' is [1]; it must be an object"),
        (lambda i: i.pop("weight_map"), "'weight_map' is absent"),
    ],
)
def test_a_damaged_index_is_named_with_its_key(model, change, message):
    changed_index(model, change)
    assert message in refused(model) and INDEX in refused(model)


def test_a_link_out_of_the_folder_is_refused_and_links_of_the_hub_cache_are_followed(model, tmp_path):
    shard = sorted(model.glob("*.safetensors"))[0]
    elsewhere = tmp_path / "elsewhere.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    assert "is a link to" in refused(model) and "outside its folder" in refused(model)
    blob = tmp_path / "models--owner--name" / "blobs" / "0123"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "89ab"
    blob.parent.mkdir(parents=True)
    elsewhere.rename(blob)
    shard.unlink()
    snapshot.parent.mkdir()
    model.rename(snapshot)
    (snapshot / shard.name).symlink_to(os.path.join("..", "..", "blobs", "0123"))
    check_files(str(snapshot), read_config(str(snapshot)))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(model, kind):
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.unlink()
    if kind == "pipe":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to("/dev/zero")
    message = refused(model)
    assert shard.name in message and ("is not a regular file" in message or "is a link to /dev/zero" in message)


def test_a_link_to_itself_and_a_name_that_is_too_long_are_named(model):
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    assert "Too many levels of symbolic links" in refused(model) or "which is not there" in refused(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "a" * 5000}}))
    assert "which is not there" in refused(model)


def test_float64_numbers_beyond_float32_are_refused(tmp_path):
    save_file({"x": np.array([1e300, 1.0])}, tmp_path / "a.safetensors")
    with pytest.raises(Mistake, match="'x' holds numbers beyond float32"):
        read_file(tmp_path / "a.safetensors")


def test_more_layers_than_the_file_has_are_refused_from_its_headers(model):
    for changes in ({"num_hidden_layers": 9_999}, {"vocab_size": 10_000_000}, {"intermediate_size": 10_000_000}):
        (model / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        assert "is missing" in refused(model) or "config.json implies" in refused(model)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_one_number_that_is_not_finite_is_noticed_in_every_dtype(dtype):
    array = np.zeros(2 * CHUNK + 5, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array[:3] = [1e-7, -2.0, 60_000 if dtype == "float16" else 3e38]
    assert dtype in EXPONENTS and all_finite(array) and all_finite(array[:0])
    for place in (0, CHUNK - 1, CHUNK, -1):
        for value in (np.nan, np.inf, -np.inf):
            spoiled = array.copy()
            spoiled[place] = value
            assert not all_finite(spoiled)


@pytest.mark.parametrize(
    "dtype, named",
    [("int8", "I8"), ("int64", "I64"), ("bool", "BOOL"), ("float8_e4m3fn", "F8_E4M3"), ("uint8", "U8")],
)
def test_weights_of_other_dtypes_are_refused_by_tensor(model, dtype, named):
    file = next(f for f in model.glob("*.safetensors") if UP in load_file(f))
    tensors = load_file(file)
    kind = getattr(ml_dtypes, dtype, dtype)
    save_file(tensors | {UP: np.zeros(tensors[UP].shape, kind)}, file)
    assert f"tensor '{UP}' is of dtype {named}; weights must be of F64, F32, F16, BF16" in refused(model)


def test_nan_in_a_weight_is_refused_by_tensor(model):
    file = next(f for f in model.glob("*.safetensors") if UP in load_file(f))
    tensors = load_file(file)
    tensors[UP][3, 4] = np.nan
    save_file(tensors, file)
    with pytest.raises(Mistake, match=f"{file.name}: tensor '{UP}' holds NaN or infinity"):
        load_params(str(model), read_config(str(model)))


def test_every_tensor_of_a_file_is_read_or_logged_or_refused(model, caplog):
    caplog.set_level("INFO")
    extra = model / sorted(f.name for f in model.glob("*.safetensors"))[0]
    tensors = load_file(extra)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "surprise", "model.layers.0.mlp.bias", "lm_head.bias"):
        save_file(tensors | {name: np.ones(4, np.float32)}, extra)
        changed_index(model, lambda index, name=name: index["weight_map"].update({name: extra.name}))
        if name.endswith("inv_freq"):
            check_files(str(model), read_config(str(model)))
            assert f"not read, since the config or another tensor says the same: {name}" in caplog.text
        else:
            assert f"LlamaForCausalLM has no place for {name}" in refused(model)


@pytest.mark.parametrize("name", ["llama-tied-biased", "gemma2", "gpt2"])
def test_a_head_in_the_file_of_a_tied_config_is_kept_as_transformers_keeps_it(name, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    caplog.set_level("INFO")
    save_random(name, tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, file, metadata={"format": "pt"})
    assert read_config(str(tmp_path / "in")).tied  # the same matrix twice is one
    head = np.ascontiguousarray(embedding[::-1])
    save_file(tensors | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    config, hf = read_config(str(tmp_path / "in")), read_hf_config(str(tmp_path / "in"))
    assert not config.tied and hf["tie_word_embeddings"] is False and "the matrix is kept" in caplog.text
    params = load_params(str(tmp_path / "in"), config)
    np.testing.assert_array_equal(params["unembedding"]["embedding"], head)
    save_pretrained(tmp_path / "out", params, config, hf)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / side, attn_implementation="eager").eval()(ids).logits
            for side in ("in", "out")
        )
    assert torch.equal(before, after)
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)
