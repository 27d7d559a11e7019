"""Adapters that leave JAX: PEFT reads what we write and gives the same logits, and we read what PEFT writes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora, join, linear_layers, resolve_targets, split
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.files.huggingface import read_config
from jaxalign.models.files.load import load_params
from jaxalign.models.files.peft import load_adapter, save_adapter
from tests.models.tiny import TINY, save_random

# PEFT asks transformers for an attribute that it has renamed.
RENAMED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GOLDEN = Path(__file__).parent / "golden_peft"
TOKENS = np.random.default_rng(0).integers(3, 29, (2, 12))
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt-neox": "GPTNeoXForCausalLM",
}
HF = {name: {"architectures": [kind], **TINY[name]} for name, kind in ARCHITECTURES.items()}
VARIANTS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def trained(config, lora):
    """An adapter as it may be after training: A and B random, magnitudes about 1."""
    _, abstract = split(make_decoder(config, lora=lora)[1])
    draw = np.random.default_rng(0).standard_normal

    def around(x):
        return 0.1 * draw(x.shape) + (x.ndim == 2)

    return jax.tree.map(lambda x: jnp.asarray(around(x), x.dtype), abstract)


def logits_of(config, params, lora):
    graphdef, _ = make_decoder(config, lora=lora)

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        return model(TOKENS) @ model.unembed().weight.T

    return np.asarray(forward(params))


def bits(tree):
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", HF)
def test_an_adapter_comes_back_bit_for_bit(name, variant, tmp_path):
    config = model_config(HF[name])
    lora = Lora(4, 6.0, resolve_targets("all-linear", config), **VARIANTS[variant])
    adapter = trained(config, lora)
    save_adapter(tmp_path / "a", adapter, lora, config)
    actual, again = load_adapter(tmp_path / "a", config)
    assert actual == lora and bits(again) == bits(adapter)
    save_adapter(tmp_path / "b", again, actual, config)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("targets", ["query,value,down", "key"])
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_a_part_of_a_fused_kernel_comes_back_as_that_part(name, targets, tmp_path):
    config = model_config(HF[name])
    lora = Lora(3, 6.0, resolve_targets(targets, config))
    adapter = trained(config, lora)
    save_adapter(tmp_path / "a", adapter, lora, config)
    actual, again = load_adapter(tmp_path / "a", config)
    assert actual == lora and bits(again) == bits(adapter)


def test_names_shapes_and_settings_are_those_of_peft(tmp_path):
    config = model_config(HF["llama"])
    lora = Lora(4, 6.0, ("attention/query", "mlp/down"), rslora=True, dora=True)
    save_adapter(tmp_path / "a", trained(config, lora), lora, config, base_model="some/base")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.2"
    assert len(tensors) == 2 * 3 * 3
    assert tensors[f"{layer}.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{layer}.mlp.down_proj.lora_A.weight"].shape == (4, 48)
    assert tensors[f"{layer}.mlp.down_proj.lora_B.weight"].shape == (32, 4)
    assert tensors[f"{layer}.mlp.down_proj.lora_magnitude_vector"].shape == (32,)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "q_proj"] and settings["base_model_name_or_path"] == "some/base"
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"], settings["use_dora"]) == (4, 6, True, True)
    with pytest.raises(ValueError, match="is not empty"):
        save_adapter(tmp_path / "a", {}, lora, config)


@pytest.fixture(scope="module")
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


def theirs(base_folder, adapter_folder):
    """PEFT's logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter_folder).eval()(torch.tensor(TOKENS)).logits.numpy()


@RENAMED
@pytest.mark.parametrize(
    "name, variant",
    [
        (name, variant)
        for name in HF
        for variant in VARIANTS
        if name == "llama" or variant == "dora" or (name, variant) == ("phi3", "rslora")
    ],
)
def test_peft_computes_the_same_logits_of_our_adapters(name, variant, bases, tmp_path):
    folder, config, params = bases(name)
    lora = Lora(4, 6.0, resolve_targets("all-linear", config), **VARIANTS[variant])
    adapter = trained(config, lora)
    save_adapter(tmp_path / "a", adapter, lora, config)
    ours = logits_of(config, join(adapter, params), lora)
    np.testing.assert_allclose(theirs(folder, tmp_path / "a"), ours, atol=1e-4)
    assert np.abs(ours - logits_of(config, params, None)).max() > 0.1


@RENAMED
@pytest.mark.parametrize("name", HF)
def test_we_compute_the_same_logits_of_adapters_that_peft_made(name, bases, tmp_path):
    folder, config, params = bases(name)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modules = sorted({name.rpartition(".")[2] for name in linear_layers(config).values()})
    torch.manual_seed(0)
    settings = LoraConfig(r=3, lora_alpha=7, target_modules=modules, lora_dropout=0.1, use_dora=True, use_rslora=True)
    settings.fan_in_fan_out = config.architecture == "GPT2LMHeadModel"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), settings)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.add_(0.1 * torch.randn_like(x))
    model.save_pretrained(tmp_path / "a")
    lora, adapter = load_adapter(tmp_path / "a", config)
    assert lora == Lora(3, 7.0, tuple(linear_layers(config)), rslora=True, dora=True)
    ours = logits_of(config, join(jax.tree.map(jnp.asarray, adapter), params), lora)
    np.testing.assert_allclose(ours, theirs(folder, tmp_path / "a"), atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_pefts_golden_ones_without_torch(variant, tmp_path):
    golden = np.load(GOLDEN / f"{variant}.npz")
    base = {k.removeprefix("base:"): golden[k] for k in golden.files if k.startswith("base:")}
    save_file(base, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    (tmp_path / "adapter").mkdir()
    save_file(
        {k.removeprefix("adapter:"): golden[k] for k in golden.files if k.startswith("adapter:")},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(str(golden["adapter_config"]))
    config = read_config(str(tmp_path))
    lora, adapter = load_adapter(tmp_path / "adapter", config)
    assert (lora.rslora, lora.dora) == (variant == "rslora", variant == "dora")
    params = join(jax.tree.map(jnp.asarray, adapter), load_params(str(tmp_path), config))
    np.testing.assert_allclose(logits_of(config, params, lora), golden["logits"], atol=1e-4)


def spoiled(path, settings=None, tensors=None):
    config = model_config(HF["phi3"])
    lora = Lora(2, 4.0, resolve_targets("all-linear", config))
    save_adapter(path, trained(config, lora), lora, config)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (settings or {})))
    content = load_file(path / "adapter_model.safetensors")
    if tensors:
        tensors(content)
    save_file(content, path / "adapter_model.safetensors")
    return load_adapter(path, config)


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def ones(name, *shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


DOWN = "base_model.model.model.layers.1.mlp.down_proj"
QKV = "base_model.model.model.layers.1.self_attn.qkv_proj"


@pytest.mark.parametrize(
    "settings, tensors, message",
    [
        ({"peft_type": "LOHA"}, None, "peft_type 'LOHA' is not supported; only LORA is"),
        ({"modules_to_save": ["lm_head"]}, None, r"modules_to_save=\['lm_head'\] is not supported"),
        (
            {"alpha_pattern": {"qkv_proj": 12, "gate_up_proj": 8, "down_proj": 9}},
            None,
            r"down_proj is scaled by 4.5 and \S+ by 2",
        ),
        ({}, without(f"{DOWN}.lora_A.weight"), f"{DOWN} has lora_B without lora_A"),
        ({}, without(f"{DOWN}.lora_A.weight", f"{DOWN}.lora_B.weight"), f"lacks {DOWN[17:]}, which 'target_modules'"),
        ({}, ones(f"{DOWN}.lora_B.weight", 9, 2), r"lora_B \[9, 2\], not \[32, 2\]"),
        ({}, ones(f"{DOWN}.lora_A.weight", 2, 9), r"lora_A \[2, 9\], not \[2, 48\]"),
        ({}, ones(f"{QKV}.lora_B.weight", 64, 6), "has rank 6 over fused kernels"),
        ({}, ones("embed.lora_embedding_A", 3), "has no place for embed.lora_embedding_A"),
    ],
)
def test_what_an_adapter_cannot_be_here_is_named(settings, tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        spoiled(tmp_path / "a", settings, tensors)


def test_ranks_that_differ_are_refused(tmp_path):
    def widen_first(t):
        widen(t, layers=1)

    def widen(t, layers=3):
        for i in range(layers):
            for x, axis in (("A", 0), ("B", 1)):
                name = f"base_model.model.model.layers.{i}.mlp.down_proj.lora_{x}.weight"
                t[name] = np.ascontiguousarray(np.concatenate([t[name]] * 2, axis=axis))

    with pytest.raises(Mistake, match=r"down_proj has rank 4; .* give it 2"):
        spoiled(tmp_path / "a", tensors=widen)
    with pytest.raises(Mistake, match=r"ranks differ .*'mlp/down': 4"):
        patterns = {"rank_pattern": {"qkv_proj": 6, "gate_up_proj": 4, "down_proj": 4}}
        patterns["alpha_pattern"] = {"qkv_proj": 12, "gate_up_proj": 8, "down_proj": 8}
        spoiled(tmp_path / "b", patterns, widen)
    with pytest.raises(Mistake, match=r"mlp/down has the ranks \[4, 2, 2\] in its layers"):
        patterns["rank_pattern"] = patterns["rank_pattern"] | {"down_proj": 2, r"layers\.0\.mlp\.down_proj": 4}
        patterns["rank_pattern"] = dict(reversed(patterns["rank_pattern"].items()))
        spoiled(tmp_path / "c", patterns, widen_first)


def test_magnitudes_of_half_a_fused_kernel_are_refused_and_a_folder_without_files_is_named(tmp_path):
    config = model_config(HF["phi3"])
    lora = Lora(2, 4.0, ("attention/query",), dora=True)
    with pytest.raises(ValueError, match=r"target attention/key, attention/value as well"):
        save_adapter(tmp_path / "a", {}, lora, config)
    with pytest.raises(Mistake, match=r"has no adapter_config.json"):
        load_adapter(tmp_path, config)


# Every key of adapter_config.json, with values that change the function where there are any. The adapter is of rank 4
# and alpha 6 on q_proj, v_proj and down_proj of a Llama of three layers.
KEY_VALUES = {
    "init_lora_weights": [
        *(False, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq"),
        *("lora_ga", "surprise", 3),
    ],
    "r": [2, 0, "3", None],
    "lora_alpha": [5.5, 16, "5", None],
    "use_rslora": [True, "true"],
    "use_dora": [True],
    "alpha_pattern": [
        {"q_proj": 9, "v_proj": 9, "down_proj": 9},
        {".*_proj": 7},
        {"down_proj": 9},
        {"layers.1.mlp.down_proj": 6},
        {"elsewhere": 6},
        [],
        {"(a+)+": 6},
    ],
    "rank_pattern": [{"down_proj": 2}, {"down_proj": 4}, {"down_proj": "4"}],
    "target_modules": [
        *(["q_proj"], ["q_proj", "v_proj", "down_proj", "absent"], ["q_proj", "v_proj", "down_proj", "up_proj"]),
        *(r".*\.(q_proj|v_proj|down_proj)", r".*\.layers\.[01]\..*_proj", "all-linear", None, [], "(", "(a*)*b", [3]),
    ],
    "exclude_modules": [["down_proj"], ["o_proj"], r".*\.2\..*", r".*k_proj"],
    "layers_to_transform": [[0, 1], [0, 1, 2], 1],
    "layers_pattern": ["layers"],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["lm_head"]],
    "layer_replication": [[[0, 2], [1, 3]]],
    "trainable_token_indices": [[1], {"embed_tokens": [1]}],
    "target_parameters": [["mlp.down_proj.weight"]],
    "lora_bias": [True],
    "use_qalora": [True],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"], "nblocks": 1}],
    "alora_invocation_tokens": [[1, 2]],
    "arrow_config": [{}, {"top_k": 2}],
    "kasa_config": [{"beta": 1e-4}],
    "monteclora_config": [{"num_samples": 2}],
    "velora_config": [{"rank": 1}],
    "megatron_config": [{"a": 1}],
    "peft_type": ["LOHA", None, 3],
    "surprise": [1, True, "x", [1]],
    # keys that must change nothing
    "auto_mapping": [{"base_model_class": "X", "parent_library": "y"}],
    "base_model_name_or_path": ["elsewhere"],
    "corda_config": [{"corda_method": "kpm"}],
    "ensure_weight_tying": [True],
    "eva_config": [{"rho": 2.0}],
    "fan_in_fan_out": [True],
    "inference_mode": [False],
    "loftq_config": [{"loftq_bits": 4}],
    "lora_dropout": [0.5],
    "lora_ga_config": [{"direction": "ArBr"}],
    "megatron_core": ["elsewhere"],
    "peft_version": ["99.0"],
    "qalora_group_size": [8],
    "revision": ["main"],
    "task_type": ["FEATURE_EXTRACTION", None],
}


@pytest.fixture(scope="module")
def peft_adapter(bases, tmp_path_factory):
    """(adapter_config.json, the bytes of adapter_model.safetensors, forward of ours by Lora) of an adapter by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, config, params = bases("llama")
    path = tmp_path_factory.mktemp("adapter") / "a"
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), settings)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.add_(0.1 * torch.randn_like(x))
    model.save_pretrained(path)
    cache = {}

    def ours(directory):
        lora, adapter = load_adapter(directory, config)
        if lora not in cache:
            cache[lora] = logits_of(config, join(jax.tree.map(jnp.asarray, adapter), params), lora)
        return cache[lora]

    return json.loads((path / "adapter_config.json").read_text()), path, ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", KEY_VALUES)
def test_each_key_of_an_adapter_config_means_what_it_means_to_peft_or_is_refused_by_name(
    key, bases, peft_adapter, tmp_path
):
    import shutil

    settings, original, ours = peft_adapter
    assert set(settings) <= set(KEY_VALUES), "a key that PEFT writes and nobody tries"
    for number, value in enumerate(KEY_VALUES[key]):
        path = tmp_path / str(number)
        shutil.copytree(original, path)
        (path / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
        try:
            logits = ours(path)
        except Mistake as mistake:
            text = str(mistake)
            assert repr(key) in text or f"{key}=" in text or f" {key} " in text, (value, text)
            assert "\n" not in text and "adapter_config.json" in text
            continue
        np.testing.assert_allclose(logits, theirs(bases("llama")[0], path), atol=1e-4, err_msg=f"{key}={value}")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("adapter_config.json", b"[1]", "adapter_config.json holds .1., not an object"),
        ("adapter_config.json", b"null", "adapter_config.json holds None, not an object"),
        ("adapter_config.json", b"{", "adapter_config.json is not JSON"),
        ("adapter_config.json", b"\xff", "adapter_config.json is not UTF-8"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "'r' is absent; it must hold a whole number"),
        ("adapter_model.safetensors", b"", r"adapter_model.safetensors \(0 bytes\) is truncated or damaged"),
        ("adapter_model.safetensors", b"\xff" * 40, r"adapter_model.safetensors \(40 bytes\) is truncated or damaged"),
    ],
)
def test_a_damaged_adapter_is_named_in_one_line(name, content, message, tmp_path):
    spoiled(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(Mistake, match=message) as raised:
        load_adapter(tmp_path / "a", model_config(HF["phi3"]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value, message", [(np.nan, "holds NaN or infinity"), (1, "is of dtype I64; weights must be")])
def test_an_adapter_of_nan_or_of_integers_is_refused_by_tensor(value, message, tmp_path):
    def spoil(tensors):
        tensors[f"{DOWN}.lora_A.weight"] = np.full((2, 48), value)

    with pytest.raises(Mistake, match=f"{DOWN}.lora_A.weight' {message}"):
        spoiled(tmp_path / "a", tensors=spoil)
