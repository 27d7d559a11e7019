"""Adapters in PEFT's format, written and read: adapter_config.json and adapter_model.safetensors.

PEFT stores A as [r, in] and B as [out, r] for every layer. If a family fuses n kernels that we keep apart (Phi-3's
qkv_proj, GPT-2's c_attn, GPT-NeoX's query_key_value), their adapters of rank r become one of rank n r, which computes
the same: the A's above each other, the B's on a block diagonal, zeros for a kernel without an adapter. `rank_pattern`
and `alpha_pattern` record it, and reading takes the blocks apart again. An adapter of rank r that PEFT itself has made
on a fused kernel becomes n of ours that begin with the same A.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import hosts
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora, linear_layers
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import TensorMap, tensor_maps
from jaxalign.models.files.peft_config import CONFIG, PeftConfig, matches
from jaxalign.models.files.save import complete_folder
from jaxalign.models.files.tensors import names_of, read_file
from jaxalign.outside import brief, read_object
from jaxalign.types import PyTree

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
CONV1D = ("GPT2LMHeadModel",)  # kernels [in, out]; those of other families are torch's Linear, [out, in]
Parts = dict[str, np.ndarray]  # "a", "b" and maybe "magnitude" of one layer


def save_adapter(
    directory: str | Path,
    adapter: PyTree,
    lora: Lora,
    config: ModelConfig,
    *,
    base_model: str = "",
    extra: dict[str, Any] | None = None,
    besides: Callable[[Path], None] | None = None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, folder)` loads. Every process calls it; one writes.

    Args:
      directory: the new folder; it must not exist, or be empty.
      adapter: the trained tree.
      lora: the adapted layers, rank and scale.
      config: config of the base.
      base_model: the base's folder or hub name, from which PEFT loads it.
      extra: content of further JSON files, by name.
      besides: writes further files into the folder, before the folder gets its name.

    Raises:
      Mistake: DoRA with adapters on some but not all of the kernels that the family fuses.
    """
    from safetensors.numpy import save_file

    check_exportable(lora, config)
    with complete_folder(Path(directory)) as partial:
        stacks = {name: jax.tree.map(hosts.gather, _at(adapter, name)) for name in lora.targets}
        if jax.process_index() != 0:
            return
        save_file(_tensors(stacks, lora, config), partial / WEIGHTS, metadata={"format": "pt"})
        for name, value in {CONFIG: _peft_config(lora, config, base_model), **(extra or {})}.items():
            (partial / name).write_text(json.dumps(value, indent=2) + "\n")
        if besides is not None:
            besides(partial)


def _tensors(stacks: dict[str, Any], lora: Lora, config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of the file by name, of the adapters of all layers."""
    tensors: dict[str, np.ndarray] = {}
    for tensor in _targeted(lora, config):
        for layer in range(config.num_layers):
            parts = [{k: x[layer] for k, x in stacks[n].items()} if n in stacks else None for n in _names(tensor)]
            module = PREFIX + _module(tensor).format(layer=layer)
            fused = _fuse(tensor, parts, config)
            tensors |= {module + SUFFIXES[k]: np.ascontiguousarray(x) for k, x in fused.items()}
    return tensors


def load_adapter(directory: str | Path, config: ModelConfig) -> tuple[Lora, PyTree]:
    """(layers, rank and scale; the adapter as numpy arrays) of a folder in PEFT's format.

    Dropout is not applied, because a policy and its reference must agree.

    Raises:
      Mistake: one of the two files is absent or damaged.
      Mistake: a key that is not known or that `Lora` does not have, such as ranks that differ, or a tensor that fits
        neither the model nor the config.
    """
    path = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise Mistake(f"{path} has no {name}; is it an adapter in PEFT's format?")
    settings = PeftConfig.of(read_object(path / CONFIG))
    tensors = read_file(path / WEIGHTS)
    layers: dict[str, list[Parts]] = {}
    scales: dict[str, float] = {}
    for tensor in _kernels(config):
        for layer in range(config.num_layers):
            module = _module(tensor).format(layer=layer)
            ends = {k: PREFIX + module + end for k, end in SUFFIXES.items()}
            fused = {k: tensors.pop(end) for k, end in ends.items() if end in tensors}
            _check_targeted(path, settings, module, fused)
            if fused:
                parts = _unfuse(path, PREFIX + module, tensor, fused, settings.rank, config)
                scales[module] = settings.scale_of(path, module, len(fused["a"]))
                for name, part in zip(_names(tensor), parts, strict=True):
                    layers.setdefault(name, []).extend([] if part is None else [part])
    if tensors or not layers:
        names = names_of(tensors) or "an adapter without tensors"
        raise Mistake(f"{path}: {config.architecture} has no place for {names}")
    stacks = {name: _stack(path, name, parts, config) for name, parts in layers.items() if parts}
    return _lora(path, settings, scales, stacks, config), _nested(stacks)


def _check_targeted(path: Path, settings: PeftConfig, module: str, fused: Parts) -> None:
    """Raises Mistake where the tensors are not those that the config announces: PEFT would leave them out."""
    if fused and not settings.targeted(module):
        key = "target_modules" if not matches(settings.targets, module) else "exclude_modules"
        raise Mistake(f"{path}: {WEIGHTS} has {module}, which {key!r} of {CONFIG} leaves out")
    if settings.targeted(module) and not fused:
        raise Mistake(f"{path}: {WEIGHTS} lacks {module}, which 'target_modules' of {CONFIG} names")
    if fused and settings.dora != ("magnitude" in fused):
        has = "lora_magnitude_vector" if "magnitude" in fused else "no lora_magnitude_vector"
        raise Mistake(f"{path}: {module} has {has}, and 'use_dora' of {CONFIG} is {str(settings.dora).lower()}")


def check_exportable(lora: Lora, config: ModelConfig) -> None:
    """Raises Mistake if DoRA would need magnitudes of kernels that have no adapter."""
    for tensor in _targeted(lora, config) if lora.dora else ():
        absent = [name for name in _names(tensor) if name not in lora.targets]
        if absent:
            raise Mistake(
                f"{_module(tensor)} of {config.architecture} is one kernel, and PEFT stores DoRA's magnitudes for all "
                f"of it or none: target {', '.join(absent)} as well"
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


def _nested(stacks: dict[str, Parts]) -> PyTree:
    tree: dict[str, Any] = {}
    for name, parts in stacks.items():
        node = tree
        for part in ("blocks", *name.split("/")):
            node = node.setdefault(part, {})
        node["adapter"] = parts
    return tree


@functools.lru_cache
def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer of a block."""
    sizes, blocks = {}, make_decoder(config)[1]["blocks"]
    for name in linear_layers(config):
        kernel = functools.reduce(lambda node, part: node[part], (*name.split("/"), "kernel"), blocks)
        sizes[name] = kernel.shape[1:]
    return sizes


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
    path: Path, module: str, tensor: TensorMap, fused: Parts, rank: int, config: ModelConfig
) -> list[Parts | None]:
    """The inverse of `_fuse`; None for a kernel without an adapter. Kernels that PEFT adapted as one share their A."""
    _check_shapes(path, module, tensor, fused, config)
    count, a = len(tensor.leaves), fused["a"].T
    b = tensor.to_ours(fused["b"].T if config.architecture in CONV1D else fused["b"])
    magnitudes = tensor.to_ours(fused["magnitude"]) if "magnitude" in fused else ()
    parts: list[Parts | None] = []
    for i in range(count):
        part = {"a": a, "b": b[i]}
        if count > 1 and a.shape[1] == count * rank:
            block = slice(i * rank, (i + 1) * rank)
            if np.delete(b[i], np.r_[block], axis=0).any():
                raise Mistake(
                    f"{path}: {module} has rank {a.shape[1]} over fused kernels, not {rank} for each of them; all "
                    "layers must have one rank"
                )
            part = {"a": a[:, block], "b": b[i][block]}
        if magnitudes:
            part["magnitude"] = magnitudes[i]
        parts.append(part if part["a"].any() or part["b"].any() else None)
    return parts


def _check_shapes(path: Path, module: str, tensor: TensorMap, fused: Parts, config: ModelConfig) -> None:
    if not {"a", "b"} <= set(fused):
        have, lack = ("lora_A", "lora_B") if "a" in fused else ("lora_B", "lora_A")
        raise Mistake(f"{path}: {module} has {have} without {lack}")
    inputs, outputs = zip(*(_sizes(config)[name] for name in _names(tensor)), strict=True)
    shapes = {"a": (fused["a"].shape[0] if fused["a"].ndim else 0, inputs[0]), "magnitude": (sum(outputs),)}
    shapes["b"] = (sum(outputs), shapes["a"][0])
    for part, x in fused.items():
        if x.shape != shapes[part]:
            name = SUFFIXES[part].removesuffix(".weight")[1:]
            raise Mistake(f"{path}: {module} has {name} {list(x.shape)}, not {list(shapes[part])}")


def _stack(path: Path, name: str, layers: list[Parts], config: ModelConfig) -> Parts:
    if len(layers) != config.num_layers:
        raise Mistake(
            f"{path}: {name} has an adapter in {len(layers)} of {config.num_layers} layers; it must be all or none"
        )
    ranks = [part["a"].shape[-1] for part in layers]
    if len(set(ranks)) > 1:
        raise Mistake(f"{path}: {name} has the ranks {brief(str(ranks))} in its layers; all layers must have one rank")
    return {k: np.stack([part[k] for part in layers]) for k in layers[0]}


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
    """`q_proj`; with its parent in front if another module of that name is not adapted, as GPT-2 has two `c_proj`."""
    full = _module(tensor).partition("{layer}.")[2]
    short = full.rpartition(".")[2]
    alike = {ours for ours, theirs in linear_layers(config).items() if theirs.rpartition(".")[2] == short}
    return short if alike <= set(lora.targets) or alike <= set(_names(tensor)) else full


def _lora(
    path: Path, settings: PeftConfig, scales: dict[str, float], stacks: dict[str, Parts], config: ModelConfig
) -> Lora:
    """Raises Mistake unless all layers have one rank and one scale."""
    ranks = {name: parts["a"].shape[-1] for name, parts in stacks.items()}
    if len(set(ranks.values())) > 1:
        raise Mistake(f"{path}: ranks differ ({ranks}); all layers must have one rank")
    rank = next(iter(ranks.values()))
    targets = tuple(name for name in linear_layers(config) if name in stacks)
    (first, scale), *others = scales.items()
    for module, other in others:
        if not math.isclose(scale, other):
            raise Mistake(
                f"{path}: {module} is scaled by {other:g} and {first} by {scale:g}, by 'alpha_pattern' and "
                f"'rank_pattern' of {CONFIG}; all must have one scale"
            )
    lora = Lora(rank, settings.alpha, targets, settings.rslora, settings.dora)
    if math.isclose(lora.scale, scale):
        return lora
    return dataclasses.replace(lora, alpha=scale * (rank**0.5 if settings.rslora else rank))
