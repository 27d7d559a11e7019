"""Safetensors to sharded arrays, tensor by tensor: the host holds one tensor, its cast, and the one on its way before.

Everything that can be wrong with the files is found from their headers, before an array is made.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models.config import ModelConfig
from jaxalign.models.decoder import make_decoder
from jaxalign.models.families import TensorMap, ignored_tensors, tensor_maps
from jaxalign.models.huggingface import folder
from jaxalign.models.tensor_files import DTYPES, Stored, open_tensors
from jaxalign.types import PyTree, leaf_names

_ROWS_COMPARED = 4096  # of two embeddings at a time


class _Read(NamedTuple):
    """One tensor of the file and where its numbers go; layer is None for what lies outside the blocks."""

    stored: Stored
    tensor: TensorMap
    layer: int | None


def load_params(
    source: str,
    config: ModelConfig,
    *,
    param_dtype: Any = jnp.float32,
    shardings: PyTree | None = None,
    revision: str | None = None,
) -> PyTree:
    """The parameters of a Hugging Face folder or hub name.

    Args:
      source: local folder or hub name with *.safetensors.
      config: what `read_config` says of it.
      param_dtype: tensors are cast to it, one by one.
      shardings: a tree like params; by default everything is on the first device.
      revision: of a hub name: branch, tag or commit.

    Raises:
      FileNotFoundError: no safetensors, or a listed file is absent.
      ValueError: a tensor is missing, too many, quantised or of the wrong shape, or a file is truncated; the message
        names it.
    """
    path = folder(source, revision=revision)
    _, abstract = make_decoder(config, param_dtype=param_dtype)
    if shardings is None:
        one = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, abstract)
    with contextlib.ExitStack() as stack:
        found = open_tensors(path, stack)
        plan = _plan(path, found, config, abstract)
        if config.tied:
            _check_tied(path, found, config)
        filled = _fill(plan, dict(_leaves(abstract)), dict(_leaves(shardings)))
    return jax.tree.map(lambda name: filled[name], leaf_names(abstract))


def _plan(path: Path, found: dict[str, Stored], config: ModelConfig, abstract: PyTree) -> list[_Read]:
    """What to read, in order; raises on what does not fit."""
    leaves = dict(_leaves(abstract))
    plan, used = [], set()
    for tensor in tensor_maps(config):
        expected = file_shape(tensor, leaves)
        for layer in range(config.num_layers) if "{layer}" in tensor.name else [None]:
            wanted = tensor.name if layer is None else tensor.name.format(layer=layer)
            stored = _found_as(wanted, found)
            if stored is None:
                files = _some(sorted({tensor.file.name for tensor in found.values()}))
                raise ValueError(f"{path}: tensor {wanted} of {config.architecture} is missing from {files}")
            _check(stored, expected)
            plan.append(_Read(stored, tensor, layer))
            used.add(stored.name)
    ignored = ignored_tensors(config)
    extra = sorted(n for n in found if n not in used and not any(re.search(p, n) for p in ignored))
    if extra:
        raise ValueError(f"{path}: {config.architecture} has no place for {_some(extra)}")
    return plan


def _found_as(name: str, found: dict[str, Stored]) -> Stored | None:
    """Some checkpoints, the hub's gpt2 among them, leave out the base model's prefix."""
    return found.get(name) or found.get(name.partition(".")[2])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def file_shape(tensor: TensorMap, leaves: dict[str, Any]) -> tuple[int, ...]:
    """The shape in the file, from our leaves (arrays or ShapeDtypeStructs by name); nothing is computed."""
    stacked = 1 if "{layer}" in tensor.name else 0
    parts = (np.broadcast_to(np.int8(0), leaves[leaf].shape[stacked:]) for leaf in tensor.leaves)
    return tensor.to_hf(tuple(parts)).shape


def _check(stored: Stored, expected: tuple[int, ...]) -> None:
    if stored.dtype not in DTYPES.values():
        raise ValueError(
            f"{stored.file}: tensor {stored.name} holds {stored.dtype}, known are {', '.join(DTYPES.values())}; "
            "the checkpoint is quantised, name the one that it was made from"
        )
    if stored.shape != expected:
        raise ValueError(
            f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, config.json implies {list(expected)}"
        )


def _check_tied(path: Path, found: dict[str, Stored], config: ModelConfig) -> None:
    """A tied checkpoint may hold its embedding twice, but not two different ones: one would be lost without a word."""
    table = next(tensor.name for tensor in tensor_maps(config) if tensor.leaves == ("embed/embedding",))
    embedding = _found_as(table, found)
    for copy in (found[name] for name in ("lm_head.weight", "embed_out.weight") if name in found):
        ours, theirs = embedding.rows(), copy.rows()
        parts = (slice(at, at + _ROWS_COMPARED) for at in range(0, embedding.shape[0], _ROWS_COMPARED))
        if copy.shape != embedding.shape or not all(np.array_equal(ours[part], theirs[part]) for part in parts):
            raise ValueError(
                f"{path}: config.json ties the unembedding to the embedding, but {copy.name} and {embedding.name} "
                'differ; set "tie_word_embeddings": false in config.json to load both'
            )


def _fill(plan: list[_Read], abstract: dict[str, Any], shardings: dict[str, Any]) -> dict[str, jax.Array]:
    filled: dict[str, jax.Array] = {}
    on_the_way: list[jax.Array] = []
    for stored, tensor, layer in plan:
        parts = tensor.to_ours(stored.read())
        # Devices copy while the next tensor is read; without this wait, host copies pile up behind slow devices.
        jax.block_until_ready(on_the_way)
        on_the_way = []
        for leaf, part in zip(tensor.leaves, parts, strict=True):
            like, sharding = abstract[leaf], shardings[leaf]
            one = _put(part, like.dtype, sharding if layer is None else _without_layer_axis(sharding))
            on_the_way.append(one)
            if layer is None:
                filled[leaf] = one
                continue
            if leaf not in filled:
                filled[leaf] = _zeros(like.shape, like.dtype, sharding)
            filled[leaf] = _write_layer(sharding)(filled[leaf], one, layer)
        del parts, part  # before the next tensor is read, not after
    return filled


def _put(x: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
    shards: dict[str, np.ndarray] = {}  # devices with the same shard share one copy

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in shards:
            shards[str(index)] = np.asarray(x[index], dtype, order="C")
        return shards[str(index)]

    return jax.make_array_from_callback(x.shape, sharding, shard)


def _without_layer_axis(sharding: Any) -> Any:
    return NamedSharding(sharding.mesh, P(*sharding.spec[1:])) if isinstance(sharding, NamedSharding) else sharding


@functools.lru_cache
def _zeros_maker(sharding: Any) -> Any:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    return _zeros_maker(sharding)(shape, dtype)


@functools.lru_cache
def _write_layer(sharding: Any) -> Any:
    def write(stack: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, one, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    return zip(jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree), strict=True)
