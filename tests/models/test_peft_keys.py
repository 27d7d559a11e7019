"""Every key of PEFT's adapter_config.json means here what it means to PEFT, or is refused by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import join
from jaxalign.models.files.peft import load_adapter
from tests.models.adapters import logits_of, theirs

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
