"""Files to sharded arrays and back: bit for bit, tensor by tensor, and a name for everything that is wrong."""

import json
import os
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.files.families import model_config, tensor_maps
from jaxalign.models.files.huggingface import folder, load_tokenizer, read_config, read_hf_config, terminators
from jaxalign.models.files.load import load_params
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.places import make_mesh, shardings
from jaxalign.types import leaf_names
from tests.models.tiny import TINY, hf_config, save_random

LLAMA = hf_config("llama")


def write(path, hf=LLAMA, *, seed=0, dtype=jnp.float32, **options):
    config = model_config(hf)
    params = init_params(config, jax.random.key(seed), param_dtype=dtype)
    save_pretrained(path, params, config, hf, **options)
    return config, params


def tensors_in(path):
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model"
    config, params = write(path)
    return path, config, params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "phi3", "gemma3"])
def test_export_of_an_import_is_the_same_file_tensor_by_tensor(name, dtype, tmp_path):
    pytest.importorskip("torch")
    save_random(name, tmp_path / "in", dtype=dtype)
    config = read_config(str(tmp_path / "in"))
    params = load_params(str(tmp_path / "in"), config, param_dtype=dtype)
    hf = read_hf_config(str(tmp_path / "in"))
    save_pretrained(tmp_path / "out", params, config, hf, max_shard_bytes=20_000)
    before, after = tensors_in(tmp_path / "in"), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for key in before:
        assert before[key].dtype == after[key].dtype and before[key].tobytes() == after[key].tobytes(), key
    assert read_hf_config(str(tmp_path / "out")) == hf


@pytest.mark.parametrize("name", TINY)
def test_every_family_reloads_in_transformers_with_identical_tensors(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_random(name, tmp_path / "in")
    config = read_config(str(tmp_path / "in"))
    params = load_params(str(tmp_path / "in"), config)
    save_pretrained(tmp_path / "out", params, config, read_hf_config(str(tmp_path / "in")))
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "in").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_device_gets_its_share_and_the_values_are_the_same(llama, sizes):
    path, config, params = llama
    placed = shardings(make_decoder(config)[1], make_mesh(**sizes))
    loaded = load_params(str(path), config, shardings=placed)
    for name, expected, actual in zip(*map(jax.tree.leaves, (leaf_names(params), params, loaded)), strict=True):
        np.testing.assert_array_equal(expected, actual, err_msg=name)
    kernel = loaded["blocks"]["mlp"]["up"]["kernel"]
    cut = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // cut}


def test_the_host_holds_two_tensors_at_a_time(tmp_path):
    hf = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "vocab_size": 512}
    config, params = write(tmp_path / "big", hf, max_shard_bytes=10_000_000)
    model_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = 1024 * 256 * 4
    del params
    load_params(str(tmp_path / "big"), config)  # compiles
    tracemalloc.start()  # counts numpy's buffers, not the arrays of the (CPU) device
    load_params(str(tmp_path / "big"), config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model_bytes > 80 * largest
    # the tensor that is read and the one that travels, each as read and as a transposed copy; 0.3 is names and headers
    assert peak < 4.5 * largest, f"{peak:,} bytes on the host for a model of {model_bytes:,}"


def test_a_checkpoint_without_the_base_prefix_loads(tmp_path):
    hf = hf_config("gpt2")
    config, params = write(tmp_path / "in", hf)
    bare = {k.removeprefix("transformer."): v for k, v in tensors_in(tmp_path / "in").items()}
    bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for i in range(3)}
    save_file(bare, tmp_path / "in" / "model.safetensors")
    loaded = load_params(str(tmp_path / "in"), config)
    np.testing.assert_array_equal(loaded["blocks"]["mlp"]["up"]["kernel"], params["blocks"]["mlp"]["up"]["kernel"])


def spoil(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(DOWN), f"tensor {DOWN} of LlamaForCausalLM is missing"),
        (
            lambda t: t.update({DOWN: t[DOWN][:, :-1].copy()}),
            rf"{DOWN} has shape \[32, 47\], config.json implies \[32, 48\]",
        ),
        (lambda t: t.update(surprise=np.ones(3)), "LlamaForCausalLM has no place for surprise"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    config, _ = write(tmp_path / "model")
    spoil(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        load_params(str(tmp_path / "model"), config)


def test_a_truncated_file_is_named_with_its_size(tmp_path):
    config, _ = write(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors \([0-9,]+ bytes\) is truncated or damaged"):
        load_params(str(tmp_path / "model"), config)


def test_a_shard_that_is_listed_but_absent_is_named(tmp_path):
    config, _ = write(tmp_path / "model", max_shard_bytes=30_000)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(Mistake, match=f"lists {shard.name}, which is not there"):
        load_params(str(tmp_path / "model"), config)


def test_files_that_could_run_code_are_refused_with_the_way_out(tmp_path):
    config, _ = write(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(Mistake, match=r"pytorch_model.bin but no .*can run code.*save_pretrained"):
        load_params(str(tmp_path / "model"), config)


@pytest.mark.parametrize(
    "source, message",
    [
        ("./nowhere/model", "nowhere/model: no such folder"),
        ("config:nowhere.json", "there is no nowhere.json"),
        ("someone/never-made", "no local folder and could not be fetched from the hub"),
    ],
)
def test_a_missing_model_is_named(source, message):
    with pytest.raises(Mistake, match=message):
        folder(source)


def test_a_folder_without_config_or_with_a_damaged_one_is_named(tmp_path):
    with pytest.raises(Mistake, match=r"has no config.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_config(str(tmp_path))


def test_a_damaged_generation_config_is_named(tiny_model, tmp_path):
    (tmp_path / "generation_config.json").write_text("{eos")
    with pytest.raises(ValueError, match=r"generation_config.json is not JSON: .*; fetch it again"):
        terminators(str(tmp_path), load_tokenizer(str(tiny_model)))


@pytest.mark.parametrize("value", ["2", [2, [3]], {"a": 1}, 2.0, True, [None]])
def test_ends_that_are_no_tokens_are_named_with_file_and_key(tiny_model, tmp_path, value):
    tokenizer = load_tokenizer(str(tiny_model))
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(Mistake, match=f"{name}: 'eos_token_id' is .*; it must be the number of a token") as raised:
            terminators(str(tmp_path), tokenizer)
        assert "\n" not in str(raised.value)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"model": 3}', b"\xff\xfe", None])
def test_a_damaged_tokenizer_is_named_in_one_line(tiny_model, tmp_path, content):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name.partition(".")[0]
        shutil.copytree(tiny_model, path)
        (path / name).unlink()
        if content is None:
            os.mkfifo(path / name)
        else:
            (path / name).write_bytes(content)
        if (name, content) == ("tokenizer_config.json", b'{"model": 3}'):
            load_tokenizer(str(path))  # a key that says nothing
            continue
        with pytest.raises(Mistake) as raised:
            load_tokenizer(str(path))
        assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_a_full_folder_is_not_written_over(llama):
    path, config, params = llama
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        save_pretrained(path, params, config, LLAMA)


def test_random_weights_come_from_a_config_file(llama, tmp_path):
    path, config, _ = llama
    assert read_config(f"config:{path / 'config.json'}") == config
    assert len(tensor_maps(config)) == 12


@pytest.mark.parametrize("name", ["stories260K", "babyllama-char361"])
def test_real_models_agree_with_their_golden_log_probabilities(name, shared_data):
    path = str(shared_data / "models" / name)
    config = read_config(path)
    graphdef, _ = make_decoder(config)
    params = load_params(path, config)
    cases = json.loads((shared_data / "models" / name / "golden.json").read_text())["cases"]

    @jax.jit
    def logps_of(params, tokens):
        model = nnx.merge(graphdef, params)
        return jax.nn.log_softmax(model(tokens) @ model.unembed().weight.T)

    for case in cases:
        ids = np.array(case["greedy_ids"])
        padded = np.zeros((1, 256), np.int32)
        padded[0, : len(ids)] = ids
        actual = np.asarray(logps_of(params, padded))[0]
        np.testing.assert_allclose(actual[np.arange(len(ids) - 1), ids[1:]], case["next_token_logprobs"], atol=1e-4)
    assert terminators(path, load_tokenizer(path)) == (1, 2)
