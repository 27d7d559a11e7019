"""Adapters that have no place here, or are damaged: each is refused in one line that names the tensor or key."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora, resolve_targets
from jaxalign.models.files.families import model_config
from jaxalign.models.files.peft import load_adapter, save_adapter
from tests.models.adapters import HF, trained


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
