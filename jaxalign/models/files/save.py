"""Parameters to a Hugging Face folder that transformers and vLLM load: safetensors, config, tokenizer, model card."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import hosts
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files.families import TensorMap, tensor_maps
from jaxalign.models.files.tensors import write_file
from jaxalign.outside import writing
from jaxalign.types import PyTree, leaf_names


def save_pretrained(
    directory: str | Path,
    params: PyTree,
    config: ModelConfig,
    hf_config: dict[str, Any],
    *,
    tokenizer: Any = None,
    generation_config: dict[str, Any] | None = None,
    model_card: str = "",
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = None,
    extra: dict[str, Any] | None = None,
    head: np.ndarray | None = None,
    besides: Callable[[Path], None] | None = None,
) -> None:
    """Writes the folder, whole or not at all. Every process calls it; the first one writes.

    A checkpoint that was loaded in its own dtype comes out bit for bit, tensor by tensor.

    Args:
      directory: the new folder; it must not exist, or be empty.
      params: the trained tree, on any mesh; one tensor at a time is gathered.
      config: the config of the decoder.
      hf_config: content of config.json; its dtype and ties become those of the tensors.
      tokenizer: a transformers tokenizer, written with its chat template.
      generation_config: content of generation_config.json.
      model_card: text of README.md.
      max_shard_bytes: largest size of a file, unless a single tensor is larger.
      dtype: dtype of the tensors; by default the parameters' own.
      extra: content of further JSON files, by name.
      head: [1 D], or [1 D + 1] with a bias, written as score.weight and score.bias: with them a trunk without an output
        matrix is a sequence classifier.
      besides: called by every process to write further files into the folder, before the folder gets its name.
    """
    dtype = np.dtype(dtype or jax.tree.leaves(params)[0].dtype)
    with complete_folder(Path(directory)) as partial:
        _save_tensors(partial, params, config, dtype, max_shard_bytes, head)
        if besides is not None:
            besides(partial)
        if jax.process_index() != 0:
            return
        tied = {} if config.tied else {"tie_word_embeddings": False}  # else the head that is written would not be read
        _write_json(partial / "config.json", _without_dtype(hf_config) | tied | {"dtype": dtype.name})
        if generation_config:
            _write_json(partial / "generation_config.json", generation_config)
        for name, value in (extra or {}).items():
            _write_json(partial / name, value)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if model_card:
            (partial / "README.md").write_text(model_card)


@contextlib.contextmanager
def complete_folder(directory: Path) -> Iterator[Path]:
    """A folder for the first of several hosts to fill, which gets its name once it is whole. Every host calls it.

    Raises:
      Mistake: the folder is not empty, or it cannot be written, on every host; then nothing of it is left.
    """
    partial = directory.with_name(directory.name + ".partial")
    error: Exception | None = None

    def begin() -> bool:
        if directory.exists() and not directory.is_dir():
            raise Mistake(f"{directory} is a file; name a new folder")
        if directory.is_dir() and any(directory.iterdir()):
            raise Mistake(f"{directory} is not empty; name a new folder")
        with writing(directory):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return True

    def finish() -> bool:
        with writing(directory):
            if error is not None:
                raise error
            if directory.is_dir():
                directory.rmdir()
            os.replace(partial, directory)
        return True

    hosts.first_decides(begin)
    try:
        try:
            yield partial
        except Exception as raised:
            error = raised
        hosts.first_decides(finish)
        if error is not None:
            raise error
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _without_dtype(hf_config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hf_config.items() if name not in ("torch_dtype", "dtype")}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _save_tensors(
    directory: Path,
    params: PyTree,
    config: ModelConfig,
    dtype: np.dtype,
    max_shard_bytes: int,
    head: np.ndarray | None = None,
) -> None:
    """Writes the weights, tensor by tensor. Where the first host cannot write, it gathers on, as the others do."""
    leaves = dict(zip(jax.tree.leaves(leaf_names(params)), jax.tree.leaves(params), strict=True))
    shards = _shards(config, leaves, dtype, max_shard_bytes)
    score = {} if head is None else _score(head, config.hidden_size)
    weight_map, error = {}, None
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shapes = {name: tensor.to_hf(_nothing(tensor, layer, leaves)).shape for name, tensor, layer in shard}
        gathered = _gathered(shard, leaves)
        tensors = (_cast(name, tensor, dtype) for name, tensor in gathered)
        if number == len(shards):
            shapes |= {name: x.shape for name, x in score.items()}
            tensors = itertools.chain(tensors, (_cast(name, x, dtype) for name, x in score.items()))
        weight_map |= dict.fromkeys(shapes, file)
        try:
            if error is None and jax.process_index() == 0:
                write_file(directory / file, shapes, dtype, tensors)
        except Exception as raised:
            error = raised
        for _ in gathered:
            pass
    if error is not None:
        raise error
    if jax.process_index() == 0 and len(shards) > 1:
        total = sum(leaf.size for leaf in leaves.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _gathered(shard: list[tuple], leaves: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of the tensors of a file, each made as it is asked for, on every host."""
    for name, tensor, layer in shard:
        yield name, tensor.to_hf(tuple(hosts.gather(_layer_of(leaves[leaf], layer)) for leaf in tensor.leaves))


def _nothing(tensor: TensorMap, layer: int | None, leaves: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """Arrays of the shapes of a tensor's leaves that take no memory."""
    shapes = (leaves[leaf].shape for leaf in tensor.leaves)
    return tuple(np.broadcast_to(np.int8(0), shape if layer is None else shape[1:]) for shape in shapes)


def _score(head: np.ndarray, width: int) -> dict[str, np.ndarray]:
    return {"score.weight": head[:, :width]} | ({"score.bias": head[:, width]} if head.shape[1] > width else {})


def _cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tensor in a dtype. Raises Mistake where finite numbers are beyond its range, as float16's is small."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor.astype(dtype, copy=False))
    if dtype == np.float16 and (np.isinf(cast) & np.isfinite(tensor)).any():
        largest = np.abs(tensor[np.isfinite(tensor)]).max()
        raise Mistake(
            f"tensor {name} holds {largest:g}, and float16 ends at {np.finfo(np.float16).max:g}; give `export_dtype` "
            "bfloat16 or float32"
        )
    return cast


def _tensors(config: ModelConfig) -> Iterator[tuple[str, TensorMap, int | None]]:
    for tensor in tensor_maps(config):
        if "{layer}" not in tensor.name:
            yield tensor.name, tensor, None
    for layer in range(config.num_layers):
        for tensor in tensor_maps(config):
            if "{layer}" in tensor.name:
                yield tensor.name.format(layer=layer), tensor, layer


def _shards(config: ModelConfig, leaves: dict[str, Any], dtype: np.dtype, max_shard_bytes: int) -> list[list[tuple]]:
    shards: list[list[tuple]] = [[]]
    filled = 0  # bytes of the last shard
    for name, tensor, layer in _tensors(config):
        sizes = (leaves[leaf].size // (1 if layer is None else config.num_layers) for leaf in tensor.leaves)
        size = sum(sizes) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor, layer))
        filled += size
    return shards


def _layer_of(leaf: jax.Array, layer: int | None) -> jax.Array:
    return leaf if layer is None else leaf[layer]
