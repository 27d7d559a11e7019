"""Merging: adapters added to their kernels and codes made floats give the params of an ordinary decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.adapters.lora import Lora, merged_norms
from jaxalign.models.adapters.quantise import kernel_shape, plain_kernel
from jaxalign.types import PyTree


def merge(params: PyTree, lora: Lora | None) -> PyTree:
    """The params of an ordinary decoder that computes the same.

    W + scale · A B, with DoRA m (W + scale · A B) / ‖W + scale · A B‖, is computed in float32 and rounded once, to the
    dtype of the kernel, or of the embedding if the kernel is quantised. The W of a quantised kernel is the dequantised
    one, on which the update was trained, and not the weights that were quantised.
    """
    return _plain(params, lora, params["embed"]["embedding"].dtype, lambda kernel: kernel[...])


def merge_by_layer(params: PyTree, lora: Lora | None) -> PyTree:
    """`merge` for `save_pretrained`, one layer at a time: beside a base that fills its device no second one fits."""
    return _plain(params, lora, params["embed"]["embedding"].dtype, lambda kernel: kernel)


class MergedKernel:
    """A stacked kernel [L in out], merged when it is indexed: `kernel[layer]` is one layer, `kernel[...]` all."""

    def __init__(self, kernel: PyTree, adapter: PyTree | None, scale: float, dtype: Any):
        self._parts, self._scale, self.dtype = (kernel, adapter), scale, jnp.dtype(dtype)
        self.shape = kernel_shape(kernel)
        self.size = math.prod(self.shape)

    def __getitem__(self, layer: Any) -> jax.Array:
        parts = jax.tree.map(lambda x: x[layer], self._parts)
        return _merge_kernel(*parts, scale=self._scale, dtype=self.dtype)


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _merge_kernel(kernel: PyTree, adapter: PyTree | None, *, scale: float, dtype: jnp.dtype) -> jax.Array:
    kernel = plain_kernel(kernel).astype(jnp.float32)
    if adapter is None:
        return kernel.astype(dtype)
    a, b = adapter["a"].astype(jnp.float32), adapter["b"].astype(jnp.float32)
    merged = kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if "magnitude" in adapter:
        norms = jnp.maximum(merged_norms(kernel, a, b, scale=scale), jnp.finfo(jnp.float32).tiny)
        merged *= (adapter["magnitude"] / norms)[..., None, :]
    return merged.astype(dtype)


def _plain(params: PyTree, lora: Lora | None, dtype: Any, finish: Callable) -> PyTree:
    if not isinstance(params, dict):
        return params
    rest = {k: _plain(v, lora, dtype, finish) for k, v in params.items() if k not in ("kernel", "adapter")}
    if "kernel" not in params:
        return rest
    kernel, adapter = params["kernel"], params.get("adapter")
    if adapter is None and not isinstance(kernel, dict):
        return rest | {"kernel": kernel}
    scale = lora.scale if adapter is not None else 0.0
    return rest | {"kernel": finish(MergedKernel(kernel, adapter, scale, getattr(kernel, "dtype", dtype)))}
