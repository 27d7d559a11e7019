"""Safetensors to sharded arrays, tensor by tensor: the host holds one being read and one on its way to the devices.

Everything that can be wrong with the files is raised from their headers, before an array is made.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxalign import hosts
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.quantise import Quantised, quantise_kernel
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import TensorMap, ignored_tensors, tensor_maps
from jaxalign.models.files.families.base import note_once
from jaxalign.models.files.huggingface import folder
from jaxalign.models.files.tensors import Tensor, names_of, open_folder
from jaxalign.types import PyTree, leaf_names

SMALL = 1 << 20  # numbers of a tensor whose shape is worked out whatever the file holds


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
      param_dtype: dtype of the parameters, or a tree like params of theirs; tensors are cast one by one.
      shardings: a tree like params; by default everything is on the first device.
      quantise: "int8" or "nf4" for the blocks' kernels, quantised layer by layer: one at a time is there as floats.
      besides: patterns of tensors in the files that this function leaves to others, such as a score head.

    Raises:
      Mistake: no safetensors, or a listed file is absent.
      Mistake: a tensor is missing, too many, of the wrong shape or dtype, or holds NaN, or a file is truncated; the
        message names it.
    """
    path = folder(source)
    tree = isinstance(param_dtype, dict)
    _, plain = make_decoder(config)
    _, abstract = make_decoder(config, param_dtype=jnp.float32 if tree else param_dtype, quantise=quantise)
    if tree:
        abstract = jax.tree.map(lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype), abstract, param_dtype)
    if shardings is None:
        first = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: first, abstract)
    with contextlib.ExitStack() as stack:
        files = open_folder(path, stack)
        plan = _plan(path, files, config, plain, besides)
        filled = _fill(plan, dict(_leaves(abstract)), dict(_leaves(shardings)), quantise)
    return jax.tree.map(lambda name: filled[name], leaf_names(abstract))


def check_files(source: str, config: ModelConfig, *, besides: tuple[str, ...] = ()) -> None:
    """Raises the errors of `load_params` from the files' headers alone; no array is made."""
    path = folder(source)
    _, abstract = make_decoder(config)
    with contextlib.ExitStack() as stack:
        _plan(path, open_folder(path, stack), config, abstract, besides)


def read_tensor(source: str, name: str, *, absent: np.ndarray | None = None) -> np.ndarray:
    """The tensor of this name in the files; `absent`, or else a Mistake, when there is none."""
    path = folder(source)
    with contextlib.ExitStack() as stack:
        tensors = open_folder(path, stack)
        if name not in tensors:
            if absent is not None:
                return absent
            raise Mistake(f"{path} has no tensor {name}")
        return tensors[name].read()


def _plan(
    path: Path, files: dict[str, Tensor], config: ModelConfig, abstract: PyTree, besides: tuple[str, ...] = ()
) -> list[tuple[Tensor, TensorMap, int | None]]:
    """(tensor, its map, its layer) of all that are read; raises Mistake on one that does not fit, logs those unread."""
    shapes = {name: leaf.shape for name, leaf in _leaves(abstract)}
    plan, used = [], set()
    for tensor in tensor_maps(config):
        for layer in _layers(tensor, config):
            name = _name_in(files, _named(tensor, layer))
            if name is None:
                raise Mistake(f"{path}: tensor {_named(tensor, layer)} of {config.architecture} is missing")
            files[name].check_dtype()
            _check_shape(files[name], tensor, layer, shapes)
            plan.append((files[name], tensor, layer))
            used.add(name)
    unread = {n for n in files if n not in used and not any(re.search(p, n) for p in besides)}
    extra = [n for n in unread if not any(re.search(p, n) for p in ignored_tensors(config))]
    if extra:
        raise Mistake(f"{path}: {config.architecture} has no place for {names_of(extra)}")
    if unread:
        note_once(f"{path}: not read, since the config or another tensor says the same: {names_of(unread)}")
    return plan


def _name_in(files: dict[str, Tensor], name: str) -> str | None:
    """The tensor's name in the files: some, the hub's gpt2 among them, leave out the base model's prefix."""
    return next((n for n in (name, name.partition(".")[2]) if n in files), None)


def _layers(tensor: TensorMap, config: ModelConfig) -> list[int | None]:
    return list(range(config.num_layers)) if "{layer}" in tensor.name else [None]


def _named(tensor: TensorMap, layer: int | None) -> str:
    return tensor.name if layer is None else tensor.name.format(layer=layer)


def _check_shape(file: Tensor, tensor: TensorMap, layer: int | None, shapes: dict[str, tuple]) -> None:
    of_leaves = [shapes[leaf] if layer is None else shapes[leaf][1:] for leaf in tensor.leaves]
    expected: tuple[int, ...] | str = f"{sum(map(math.prod, of_leaves)):,} numbers"
    # The map is tried on bytes, as many as the file's header has numbers: a file cannot be smaller than its tensors.
    if sum(map(math.prod, of_leaves)) <= max(math.prod(file.shape), SMALL):
        expected = tensor.to_hf(tuple(np.broadcast_to(np.int8(0), of_leaf) for of_leaf in of_leaves)).shape
    if file.shape != expected:
        implied = expected if isinstance(expected, str) else list(expected)
        raise Mistake(f"{file.file}: tensor {file.name} has shape {list(file.shape)}, config.json implies {implied}")


def _fill(
    plan: list[tuple], abstract: dict[str, Any], shardings: dict[str, Any], quantise: str
) -> dict[str, jax.Array]:
    """{leaf's name: its array}. A tensor is read while the one before travels, and sent once that one has arrived."""
    filled: dict[str, jax.Array] = {}
    travelling: list[jax.Array] = []
    share = _Share(shardings)

    def send(tensor: TensorMap, layer: int | None, parts: tuple[np.ndarray, ...]) -> list[jax.Array]:
        sent = {}
        for leaf, part in zip(tensor.leaves, parts, strict=True):
            put = functools.partial(share.put, part)
            if layer is None:
                filled[leaf] = sent[leaf] = _moved(put(abstract[leaf].dtype, shardings[leaf]), shardings[leaf])
                continue
            for name, x in _layer_parts(leaf, put, abstract, shardings, quantise).items():
                like, sharding = abstract[name], shardings[name]
                if name not in filled:
                    filled[name] = _zeros(like.shape, like.dtype, sharding)
                filled[name] = sent[name] = _write_layer(sharding)(filled[name], x, layer)
        return list(sent.values())

    for file, tensor, layer in plan:
        parts = tensor.to_ours(share.read(file))
        jax.block_until_ready(travelling)
        travelling = send(tensor, layer, parts)
        del parts
    share.agree()
    return filled


class _Share:
    """The reader of one host's share of a model's files.

    One host reads tensors whole. Of several each reads as many rows of a tensor, as its file has them, as its share of
    the devices is, and the devices exchange them: so all hosts together read the files once, whatever the mesh.
    """

    def __init__(self, shardings: dict[str, Any]) -> None:
        self._several = not any(sharding.is_fully_addressable for sharding in shardings.values())
        self._error: Mistake | None = None

    def read(self, file: Tensor) -> np.ndarray:
        """The tensor, or of several hosts a view of its file, of which `put` reads parts."""
        if not self._several:
            return file.read()
        self._file, self._whole = file, file.mapped()
        return self._whole

    def put(self, x: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
        """A part of what was read last on the devices of a sharding; of several hosts cut along rows of the file."""
        if not self._several:
            return _put(x, dtype, sharding)

        def part(index: Any) -> np.ndarray:
            try:
                return self._file.part(self._whole, x[index]).astype(dtype, order="C", copy=False)
            except Mistake as mistake:  # the other hosts wait for these rows, so they get some
                self._error = self._error or mistake
                return np.zeros(x[index].shape, dtype)

        return jax.make_array_from_callback(x.shape, _by_rows(x, sharding), part)

    def agree(self) -> None:
        """Raises Mistake on every host if one has read numbers that are not finite."""

        if self._several:
            errors = hosts.exchange(None if self._error is None else str(self._error))
            if error := next(filter(None, errors), None):
                raise Mistake(error)


def _by_rows(x: np.ndarray, sharding: Any) -> Any:
    """All devices of a sharding along the axis whose steps in the file are widest, and which they can cut."""
    if isinstance(sharding, NamedSharding):
        for axis in sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])):
            if x.shape[axis] % sharding.mesh.size == 0:
                return NamedSharding(sharding.mesh, P(*[None] * axis, sharding.mesh.axis_names))
    return sharding


def _layer_parts(
    leaf: str, put: Callable[..., jax.Array], abstract: dict[str, Any], shardings: dict[str, Any], quantise: str
) -> dict[str, jax.Array]:
    """One layer on the devices: the leaf itself, or its codes and scales."""
    if leaf in abstract:
        return {leaf: put(abstract[leaf].dtype, _without_layer_axis(shardings[leaf]))}
    places = Quantised(*(_without_layer_axis(shardings[f"{leaf}/{name}"]) for name in Quantised._fields))
    quantised = _quantiser(quantise, places)(put(np.float32, places.codes))  # a kernel is cut as its codes are
    return {f"{leaf}/{name}": x for name, x in quantised._asdict().items()}


@functools.lru_cache
def _quantiser(kind: str, places: Quantised) -> Any:
    return jax.jit(lambda kernel: quantise_kernel(kernel, kind), out_shardings=places)


def _put(x: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index], dtype, order="C"))


def _moved(x: jax.Array, sharding: Any) -> jax.Array:
    """The array in other places."""
    return x if x.sharding == sharding else _mover(sharding)(x)


@functools.lru_cache
def _mover(sharding: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


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
