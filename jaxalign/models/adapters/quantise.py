"""Kernels of a frozen base in 8 or 4 bits, made floats again as they are used (QLoRA).

Why not a library: the kernels are leaves of a scanned stack, sliced by layer and cut by a mesh, and their floats must
not outlive one matrix product. Qwix 0.1.8 looks NF4 codes up by a gather over the flattened kernel: for one
[4096, 14336] kernel and 1,024 tokens, compiled for a TPU v5e, that is 840 MiB of temporaries and 3.7 GB moved; the
choices below need 112 MiB, the kernel in bfloat16, and 0.34 GB. Its codes are uint4 arrays, whose layout JAX 0.10.2
mistakes when a program is compiled ahead of its call; here a byte holds two codes.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxalign.mistake import Mistake
from jaxalign.ops.product import product
from jaxalign.types import PyTree

BLOCK = 64  # inputs that share a scale
KINDS = ("int8", "nf4")

# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1], with an exact 0.
# Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Quantised(NamedTuple):
    """A kernel [..., in, out] in few bits: 8.25 a weight as int8, 4.25 as nf4."""

    # int8: Int8[... in out]. nf4: UInt8[... in/2 out], where the first half of a block's inputs are the low four bits
    # and the second half the high ones, so that a block is unpacked without moving rows.
    codes: jax.Array
    scales: jax.Array  # BFloat16[... in/block out]


def quantise_kernel(kernel: jax.Array, kind: str) -> Quantised:
    """The nearest code of each weight in units of its block's scale, which follows from the block's largest weight.

    int8: weight ≈ scale · code, with scale = max |weight| / 127; off by half a scale at most.
    nf4: weight ≈ scale · NF4[code], with scale = max |weight|; off by half the gap between two values at most.

    Args:
      kernel: [..., in, out]; a block is `BLOCK` inputs of one output, or gcd(in, BLOCK) if BLOCK does not divide in.
      kind: "int8" or "nf4".

    Raises:
      Mistake: nf4 of an odd number of inputs.
    """
    inputs, outputs = kernel.shape[-2:]
    block = math.gcd(inputs, BLOCK)
    if kind == "nf4" and block % 2:
        raise Mistake(f"nf4 keeps two inputs in a byte, and a kernel {list(kernel.shape)} has {inputs}; take int8")
    blocks = kernel.astype(jnp.float32).reshape(*kernel.shape[:-2], inputs // block, block, outputs)
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    scales = (largest / 127 if kind == "int8" else largest).astype(jnp.bfloat16)
    # Codes are chosen for the scale as it is stored, so its rounding costs nothing except at the largest weight.
    unit = blocks / jnp.where(scales == 0, 1.0, scales.astype(jnp.float32))
    if kind == "int8":
        codes = jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8)
    else:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
        low, high = jnp.split(sum((unit > middle).astype(jnp.uint8) for middle in middles), 2, axis=-2)
        codes = low | high << 4
    return Quantised(codes.reshape(*kernel.shape[:-2], -1, outputs), jnp.squeeze(scales, -2))


def dequantise(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Float32[..., in, out] from codes and scales; int8 codes are int8, nf4 codes uint8."""
    *stack, blocks, outputs = scales.shape
    blocked = codes.astype(jnp.int32).reshape(*stack, blocks, 1, -1, outputs)
    if codes.dtype == jnp.uint8:
        shifts = jnp.array([0, 4]).reshape((1,) * (len(stack) + 1) + (2, 1, 1))
        values = _nf4(blocked >> shifts & 15)
    else:
        values = blocked.astype(jnp.float32)
    return (values * scales.astype(jnp.float32)[..., None, None, :]).reshape(*stack, -1, outputs)


def _nf4(codes: jax.Array) -> jax.Array:
    """NF4[codes] as four rounds of choices, one a bit: elementwise, so that XLA fuses it, unlike a gather."""
    values: list = list(NF4)
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class QuantisedKernel(nnx.Module):
    """The quantised kernel of a Linear: `kernel[...]` is Float32[in, out], and `kernel.product(x)` is x W."""

    def __init__(self, codes: jax.Array, scales: jax.Array):
        self.codes, self.scales = nnx.Param(codes), nnx.Param(scales)

    def __getitem__(self, everything: object) -> jax.Array:
        return dequantise(self.codes[...], self.scales[...])

    def product(self, x: jax.Array) -> jax.Array:
        """x W in the dtype of x. The backward pass makes W again: all layers' floats would be as large as a base."""

        def multiply(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
            return product(x, dequantise(codes, scales).astype(x.dtype))

        return jax.checkpoint(multiply, prevent_cse=False)(x, self.codes[...], self.scales[...])


def quantise_layers(blocks: nnx.Module, kind: str) -> None:
    """Replaces all kernels of abstract, stacked blocks by quantised ones."""
    for _, module in list(nnx.iter_modules(blocks)):
        if isinstance(getattr(module, "kernel", None), nnx.Param):
            shape = jax.eval_shape(lambda x: quantise_kernel(x, kind), module.kernel.get_value())
            module.kernel = QuantisedKernel(*shape)


def quantise_kernels(params: PyTree, kind: str) -> PyTree:
    """The tree with every `kernel` as {"codes", "scales"}; embeddings, norms and biases as they are."""
    if not isinstance(params, dict):
        return params
    return {
        name: quantise_kernel(x, kind)._asdict() if name == "kernel" else quantise_kernels(x, kind)
        for name, x in params.items()
    }


def plain_kernel(kernel: PyTree) -> jax.Array:
    """A kernel's leaves as one float array: itself, or the dequantised {"codes", "scales"}."""
    return dequantise(**kernel) if isinstance(kernel, dict) else kernel


def kernel_shape(kernel: PyTree) -> tuple[int, ...]:
    """[..., in, out] of a kernel's leaves, quantised or not."""
    if not isinstance(kernel, dict):
        return kernel.shape
    *stack, inputs, outputs = kernel["codes"].shape
    return (*stack, inputs * (2 if kernel["codes"].dtype == jnp.uint8 else 1), outputs)
