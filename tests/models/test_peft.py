"""Adapters that leave JAX: PEFT reads what we write and gives the same logits, and we read what PEFT writes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.models.adapters.lora import Lora, join, linear_layers, resolve_targets
from jaxalign.models.files.families import model_config
from jaxalign.models.files.huggingface import read_config
from jaxalign.models.files.load import load_params
from jaxalign.models.files.peft import load_adapter, save_adapter
from tests.models.adapters import HF, logits_of, theirs, trained

# PEFT asks transformers for an attribute that it has renamed.
RENAMED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GOLDEN = Path(__file__).parent / "golden_peft"
VARIANTS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


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
