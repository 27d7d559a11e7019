"""Safetensors to sharded arrays, tensor by tensor: the host holds one being read and one on its way to the devices.

Everything that can be wrong with the files is raised from their headers, before an array is made.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxalign.mistake import Mistake
from jaxalign.models.adapters.quantise import Quantised, quantise_kernel
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import TensorMap, ignored_tensors, tensor_maps
from jaxalign.models.files.huggingface import folder
from jaxalign.types import PyTree, leaf_names

INDEX = "model.safetensors.index.json"


def load_params(
    source: str,
    config: ModelConfig,
    *,
    param_dtype: Any = jnp.float32,
    shardings: PyTree | None = None,
    quantise: str = "none",
    besides: tuple[str, ...] = (),
) -> PyTree:
    """The parameters of a Hugging Face folder or hub name.

    Args:
      source: local folder or hub name with *.safetensors.
      config: the source's config, from `read_config`.
      param_dtype: dtype of the parameters; tensors are cast one by one.
      shardings: a tree like params; by default everything is on the first device.
      quantise: "int8" or "nf4" for the blocks' kernels, quantised layer by layer: one at a time is there as floats.
      besides: patterns of tensors in the files that this function leaves to others, such as a score head.

    Raises:
      Mistake: no safetensors, or a listed file is absent.
      Mistake: a tensor is missing, too many or of the wrong shape, or a file is truncated; the message names it.
    """
    path = folder(source)
    _, plain = make_decoder(config, param_dtype=param_dtype)
    _, abstract = make_decoder(config, param_dtype=param_dtype, quantise=quantise)
    if shardings is None:
        first = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: first, abstract)
    with contextlib.ExitStack() as stack:
        files = _open(path, stack)
        plan = _plan(path, files, config, plain, besides)
        filled = _fill(plan, dict(_leaves(abstract)), dict(_leaves(shardings)), quantise)
    return jax.tree.map(lambda name: filled[name], leaf_names(abstract))


def check_files(source: str, config: ModelConfig, *, besides: tuple[str, ...] = ()) -> None:
    """Raises the errors of `load_params` from the files' headers alone; no array is made."""
    path = folder(source)
    _, abstract = make_decoder(config)
    with contextlib.ExitStack() as stack:
        _plan(path, _open(path, stack), config, abstract, besides)


def _open(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """{tensor's name: the open file that contains it}."""
    import safetensors

    files = {}
    for file in _files(path):
        try:
            handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
        except safetensors.SafetensorError as error:
            size = file.stat().st_size
            raise Mistake(f"{file} ({size:,} bytes) is truncated or damaged: {error}; fetch it again") from None
        files |= dict.fromkeys(handle.keys(), handle)
    return files


def _files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        names = _listed(path / INDEX)
        absent = [name for name in names if not (path / name).exists()]
        if absent:
            raise Mistake(f"{path / INDEX} lists {', '.join(absent)}, which is not there; fetch it again")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    old = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if old:
        raise Mistake(
            f"{path} holds {', '.join(old)} but no *.safetensors. Such files can run code when opened; convert "
            "them once in transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise Mistake(f"{path} has no *.safetensors; start from random weights with config:{path}")


def _listed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{index} is damaged ({type(error).__name__}: {error}); fetch it again") from None


def read_tensor(source: str, name: str, *, absent: np.ndarray | None = None) -> np.ndarray:
    """The tensor of this name in the files; `absent`, or else a Mistake, when there is none."""
    path = folder(source)
    with contextlib.ExitStack() as stack:
        files = _open(path, stack)
        if name not in files:
            if absent is not None:
                return absent
            raise Mistake(f"{path} has no tensor {name}")
        return files[name].get_tensor(name)


def _plan(
    path: Path, files: dict[str, Any], config: ModelConfig, abstract: PyTree, besides: tuple[str, ...] = ()
) -> list[tuple]:
    """(open file, tensor's name, its map, its layer) of all tensors; raises Mistake on one that does not fit."""
    shapes = {name: leaf.shape for name, leaf in _leaves(abstract)}
    plan, used = [], set()
    for tensor in tensor_maps(config):
        for layer in _layers(tensor, config):
            name = _name_in(files, _named(tensor, layer))
            if name is None:
                raise Mistake(f"{path}: tensor {_named(tensor, layer)} of {config.architecture} is missing")
            _check_shape(path, name, files[name].get_slice(name).get_shape(), tensor, layer, shapes)
            plan.append((files[name], name, tensor, layer))
            used.add(name)
    ignored = (*ignored_tensors(config), *besides)
    extra = sorted(n for n in files if n not in used and not any(re.search(p, n) for p in ignored))
    if extra:
        others = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
        raise Mistake(f"{path}: {config.architecture} has no place for {', '.join(extra[:5])}{others}")
    return plan


def _name_in(files: dict[str, Any], name: str) -> str | None:
    """The tensor's name in the files: some, the hub's gpt2 among them, leave out the base model's prefix."""
    return next((n for n in (name, name.partition(".")[2]) if n in files), None)


def _layers(tensor: TensorMap, config: ModelConfig) -> list[int | None]:
    return list(range(config.num_layers)) if "{layer}" in tensor.name else [None]


def _named(tensor: TensorMap, layer: int | None) -> str:
    return tensor.name if layer is None else tensor.name.format(layer=layer)


def _check_shape(
    path: Path, name: str, shape: list[int], tensor: TensorMap, layer: int | None, shapes: dict[str, tuple]
) -> None:
    of_leaves = [shapes[leaf] if layer is None else shapes[leaf][1:] for leaf in tensor.leaves]
    expected = tensor.to_hf(tuple(np.broadcast_to(np.int8(0), of_leaf) for of_leaf in of_leaves)).shape
    if tuple(shape) != expected:
        raise Mistake(f"{path}: tensor {name} has shape {list(shape)}, config.json implies {list(expected)}")


def _fill(
    plan: list[tuple], abstract: dict[str, Any], shardings: dict[str, Any], quantise: str
) -> dict[str, jax.Array]:
    """{leaf's name: its array}. A tensor is read while the one before travels, and sent once that one has arrived."""
    filled: dict[str, jax.Array] = {}
    travelling: list[jax.Array] = []

    def send(tensor: TensorMap, layer: int | None, parts: tuple[np.ndarray, ...]) -> list[jax.Array]:
        sent = {}
        for leaf, part in zip(tensor.leaves, parts, strict=True):
            if layer is None:
                filled[leaf] = sent[leaf] = _put(part, abstract[leaf].dtype, shardings[leaf])
                continue
            for name, x in _layer_parts(leaf, part, abstract, shardings, quantise).items():
                like, sharding = abstract[name], shardings[name]
                if name not in filled:
                    filled[name] = _zeros(like.shape, like.dtype, sharding)
                filled[name] = sent[name] = _write_layer(sharding)(filled[name], x, layer)
        return list(sent.values())

    for handle, name, tensor, layer in plan:
        parts = tensor.to_ours(handle.get_tensor(name))
        jax.block_until_ready(travelling)
        travelling = send(tensor, layer, parts)
        del parts
    return filled


def _layer_parts(
    leaf: str, part: np.ndarray, abstract: dict[str, Any], shardings: dict[str, Any], quantise: str
) -> dict[str, jax.Array]:
    """One layer on the devices: the leaf itself, or its codes and scales."""
    if leaf in abstract:
        return {leaf: _put(part, abstract[leaf].dtype, _without_layer_axis(shardings[leaf]))}
    places = Quantised(*(_without_layer_axis(shardings[f"{leaf}/{name}"]) for name in Quantised._fields))
    quantised = _quantiser(quantise, places)(_put(part, np.float32, places.codes))  # a kernel is cut as its codes are
    return {f"{leaf}/{name}": x for name, x in quantised._asdict().items()}


@functools.lru_cache
def _quantiser(kind: str, places: Quantised) -> Any:
    return jax.jit(lambda kernel: quantise_kernel(kernel, kind), out_shardings=places)


def _put(x: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index], dtype, order="C"))


def _without_layer_axis(sharding: Any) -> Any:
    return NamedSharding(sharding.mesh, P(*sharding.spec[1:])) if isinstance(sharding, NamedSharding) else sharding


@functools.lru_cache
def _zeros_maker(sharding: Any) -> Any:
    return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    return _zeros_maker(sharding)(shape, dtype)


@functools.lru_cache
def _write_layer(sharding: Any) -> Any:
    def write(stack: jax.Array, x: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    return zip(jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree), strict=True)
