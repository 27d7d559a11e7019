"""Adapters in PEFT's format, out and in: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as [r, in] and B as [out, r] for every layer. Where a family fuses n kernels that we keep apart (Phi-3's
qkv_proj, GPT-2's c_attn, GPT-NeoX's query_key_value), their adapters of rank r become one of rank n r, which computes
the same: the A's above each other, the B's on a block diagonal, zeros for a kernel without an adapter. `rank_pattern`
and `alpha_pattern` say so, and the way back tells the blocks apart again. An adapter of rank r that PEFT itself has
made on a fused kernel becomes n of ours that begin with the same A.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora, linear_layers
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import TensorMap, tensor_maps
from jaxalign.models.files.save import gather
from jaxalign.types import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
CONV1D = ("GPT2LMHeadModel",)  # kernels lie as [in, out] there; elsewhere they are torch's Linear, [out, in]
# What an adapter_config.json may ask for and `Lora` cannot say, with the values that ask for nothing.
UNSUPPORTED = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
}

Parts = dict[str, np.ndarray]  # "a", "b" and maybe "magnitude" of one layer


def save_adapter(
    directory: str | Path,
    adapter: PyTree,
    lora: Lora,
    config: ModelConfig,
    *,
    base_model: str = "",
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, folder)` loads. Every process calls it; one writes.

    Args:
      directory: made anew; it must not exist, or be empty.
      adapter: the trained tree.
      lora: what it was made for.
      config: of the base.
      base_model: the base's folder or hub name, which PEFT then finds by itself.
      extra: more JSON files, by name.

    Raises:
      Mistake: DoRA, where some but not all of the kernels that the family fuses have an adapter.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise Mistake(f"{directory} is not empty; name a new folder")
    check_exportable(lora, config)
    held = {name: jax.tree.map(gather, _at(adapter, name)) for name in lora.targets}
    if jax.process_index() != 0:
        return
    tensors: dict[str, np.ndarray] = {}
    for tensor in _targeted(lora, config):
        for layer in range(config.num_layers):
            found = [{k: x[layer] for k, x in held[n].items()} if n in held else None for n in _names(tensor)]
            module = PREFIX + _module(tensor).format(layer=layer)
            fused = _fuse(tensor, found, config)
            tensors |= {module + SUFFIXES[k]: np.ascontiguousarray(x) for k, x in fused.items()}
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    for name, value in {CONFIG: _peft_config(lora, config, base_model), **(extra or {})}.items():
        (partial / name).write_text(json.dumps(value, indent=2) + "\n")
    if directory.is_dir():
        directory.rmdir()
    os.replace(partial, directory)


def load_adapter(directory: str | Path, config: ModelConfig) -> tuple[Lora, PyTree]:
    """(what it is for, the adapter as numpy arrays) of a folder in PEFT's format.

    Dropout is not applied: a policy and its reference must agree.

    Raises:
      Mistake: one of the two files is absent.
      Mistake: it holds what `Lora` cannot say, such as ranks that differ, or does not fit the model; it is named.
    """
    from safetensors.numpy import load_file

    path = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise Mistake(f"{path} has no {name}; is it an adapter in PEFT's format?")
    settings = json.loads((path / CONFIG).read_text())
    _check_supported(path, settings)
    tensors = load_file(path / WEIGHTS)
    layers: dict[str, list[Parts]] = {}
    for tensor in _kernels(config):
        for layer in range(config.num_layers):
            module = PREFIX + _module(tensor).format(layer=layer)
            found = {k: tensors.pop(module + end) for k, end in SUFFIXES.items() if module + end in tensors}
            if found:
                parts = _unfuse(path, module, tensor, found, settings["r"], config)
                for name, part in zip(_names(tensor), parts, strict=True):
                    layers.setdefault(name, []).extend([] if part is None else [part])
    if tensors or not layers:
        names = ", ".join(sorted(tensors)[:5]) or "an adapter without tensors"
        raise Mistake(f"{path}: {config.architecture} has no place for {names}")
    held = {name: _stack(path, name, parts, config) for name, parts in layers.items() if parts}
    return _lora(path, settings, held, config), _nested(held)


def check_exportable(lora: Lora, config: ModelConfig) -> None:
    """Raises Mistake where DoRA would need magnitudes of kernels that have no adapter."""
    for tensor in _targeted(lora, config) if lora.dora else ():
        absent = [name for name in _names(tensor) if name not in lora.targets]
        if absent:
            raise Mistake(
                f"{_module(tensor)} of {config.architecture} is one kernel, and PEFT has DoRA's magnitudes for all of "
                f"it or none: target {', '.join(absent)} as well"
            )


def _kernels(config: ModelConfig) -> Iterator[TensorMap]:
    return (t for t in tensor_maps(config) if "{layer}" in t.name and t.leaves[0].endswith("/kernel"))


def _targeted(lora: Lora, config: ModelConfig) -> list[TensorMap]:
    return [tensor for tensor in _kernels(config) if set(_names(tensor)) & set(lora.targets)]


def _names(tensor: TensorMap) -> list[str]:
    return [leaf.removeprefix("blocks/").removesuffix("/kernel") for leaf in tensor.leaves]


def _module(tensor: TensorMap) -> str:
    return tensor.name.removesuffix(".weight")


def _at(adapter: PyTree, name: str) -> PyTree:
    node = adapter["blocks"]
    for part in (*name.split("/"), "adapter"):
        node = node[part]
    return node


def _nested(held: dict[str, Parts]) -> PyTree:
    tree: dict[str, Any] = {}
    for name, parts in held.items():
        node = tree
        for part in ("blocks", *name.split("/")):
            node = node.setdefault(part, {})
        node["adapter"] = parts
    return tree


@functools.lru_cache
def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer of a block."""
    blocks = make_decoder(config)[1]["blocks"]
    layer = lambda name: functools.reduce(lambda node, part: node[part], name.split("/"), blocks)  # noqa: E731
    return {name: layer(name)["kernel"].shape[1:] for name in linear_layers(config)}


def _fuse(tensor: TensorMap, parts: list[Parts | None], config: ModelConfig) -> Parts:
    """PEFT's A [n r, in], B [out, n r] and magnitude [out] of one layer, from ours of n kernels."""
    rank = next(part["a"].shape[1] for part in parts if part)
    filled = [part or _zeros(name, rank, config) for name, part in zip(_names(tensor), parts, strict=True)]
    rows = [
        np.pad(part["b"], ((i * rank, (len(parts) - 1 - i) * rank), (0, 0)))  # its block of the diagonal
        for i, part in enumerate(filled)
    ]
    b = tensor.to_hf(tuple(rows))
    fused = {
        "a": np.concatenate([part["a"] for part in filled], axis=1).T,
        "b": b.T if config.architecture in CONV1D else b,
    }
    if "magnitude" in filled[0]:
        fused["magnitude"] = tensor.to_hf(tuple(part["magnitude"] for part in filled))
    return fused


def _zeros(name: str, rank: int, config: ModelConfig) -> Parts:
    inputs, outputs = _sizes(config)[name]
    return {"a": np.zeros((inputs, rank), np.float32), "b": np.zeros((rank, outputs), np.float32)}


def _unfuse(
    path: Path, module: str, tensor: TensorMap, found: Parts, rank: int, config: ModelConfig
) -> list[Parts | None]:
    """The inverse of `_fuse`; None for a kernel without an adapter. One A for all kernels, where PEFT made it so."""
    _check_shapes(path, module, tensor, found, config)
    count, a = len(tensor.leaves), found["a"].T
    b = tensor.to_ours(found["b"].T if config.architecture in CONV1D else found["b"])
    magnitudes = tensor.to_ours(found["magnitude"]) if "magnitude" in found else ()
    parts: list[Parts | None] = []
    for i in range(count):
        part = {"a": a, "b": b[i]}
        if count > 1 and a.shape[1] == count * rank:
            block = slice(i * rank, (i + 1) * rank)
            if np.delete(b[i], np.r_[block], axis=0).any():
                raise Mistake(f"{path}: {module} has rank {a.shape[1]} over fused kernels, and elsewhere {rank}")
            part = {"a": a[:, block], "b": b[i][block]}
        if magnitudes:
            part["magnitude"] = magnitudes[i]
        parts.append(part if part["a"].any() or part["b"].any() else None)
    return parts


def _check_shapes(path: Path, module: str, tensor: TensorMap, found: Parts, config: ModelConfig) -> None:
    if not {"a", "b"} <= set(found):
        have, lack = ("lora_A", "lora_B") if "a" in found else ("lora_B", "lora_A")
        raise Mistake(f"{path}: {module} has {have} without {lack}")
    inputs, outputs = zip(*(_sizes(config)[name] for name in _names(tensor)), strict=True)
    rank = len(found["a"])
    for name, part, shape in (("lora_A", "a", (rank, inputs[0])), ("lora_B", "b", (sum(outputs), rank))):
        if found[part].shape != shape:
            raise Mistake(f"{path}: {module} has {name} {list(found[part].shape)}, not {list(shape)}")


def _stack(path: Path, name: str, layers: list[Parts], config: ModelConfig) -> Parts:
    if len(layers) != config.num_layers:
        raise Mistake(f"{path}: {name} has an adapter in {len(layers)} of {config.num_layers} layers; all or none can")
    return {k: np.stack([part[k] for part in layers]) for k in layers[0]}


def _check_supported(path: Path, settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise Mistake(f"{path}: peft_type {settings.get('peft_type')!r} is not supported; only LORA is")
    for name, nothing in UNSUPPORTED.items():
        if settings.get(name, nothing[0]) not in nothing:
            raise Mistake(f"{path}: {name}={settings[name]!r} is not supported")


def _peft_config(lora: Lora, config: ModelConfig, base_model: str) -> dict[str, Any]:
    tensors = _targeted(lora, config)
    fused = {_short(t, lora, config): len(t.leaves) for t in tensors if len(t.leaves) > 1}
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": alpha,
        "target_modules": sorted({_short(tensor, lora, config) for tensor in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.architecture in CONV1D,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {n: alpha * (count**0.5 if lora.rslora else count) for n, count in fused.items()},
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _short(tensor: TensorMap, lora: Lora, config: ModelConfig) -> str:
    """`q_proj`; with its parent in front where a module of that name is not adapted, as GPT-2 has two `c_proj`."""
    full = _module(tensor).partition("{layer}.")[2]
    short = full.rpartition(".")[2]
    alike = {ours for ours, theirs in linear_layers(config).items() if theirs.rpartition(".")[2] == short}
    return short if alike <= set(lora.targets) or alike <= set(_names(tensor)) else full


def _lora(path: Path, settings: dict[str, Any], held: dict[str, Parts], config: ModelConfig) -> Lora:
    """Raises Mistake unless one rank and one scale hold for all layers."""
    ranks = {name: parts["a"].shape[-1] for name, parts in held.items()}
    if len(set(ranks.values())) > 1:
        raise Mistake(f"{path}: ranks differ ({ranks}), and one rank must hold for all layers")
    targets = tuple(name for name in linear_layers(config) if name in held)
    lora = Lora(
        next(iter(ranks.values())),
        float(settings["lora_alpha"]),
        targets,
        bool(settings.get("use_rslora")),
        bool(settings.get("use_dora")),
    )
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        rank = (settings.get("rank_pattern") or {}).get(pattern, settings["r"])
        scale = alpha / (rank**0.5 if lora.rslora else rank)
        if not math.isclose(scale, lora.scale):
            raise Mistake(f"{path}: {pattern} is scaled by {scale:g} and others by {lora.scale:g}; one scale must hold")
    return lora
