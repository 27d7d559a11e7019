"""Absent devices, for compilers that need none: TPU slices, and a single H100 or H200.

A test skips if the compiler of its device is not installed (libtpu; the CUDA plugin of the same version as jax, and
ptxas). Compilation proves that a program is legal and shows the memory it needs, not its speed.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
from typing import Any

import jax
import pytest
from jax.sharding import SingleDeviceSharding

# XLA's text form of GpuTargetConfigProto, from NVIDIA's data sheets of the SXM modules and the CUDA programming guide's
# table for compute capability 9.0: 132 multiprocessors with 228 KiB each, of which a block can have 227.
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  name: "{name}"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": HOPPER.format(name="NVIDIA H100 80GB HBM3", bandwidth=3_352_000_000_000, memory=80 * 2**30),
    "h200": HOPPER.format(name="NVIDIA H200", bandwidth=4_800_000_000_000, memory=141 * 10**9),
}


def tpu_devices(topology: str) -> list[Any]:
    """Chips of a slice, such as "v5p:2x2x2"."""
    pytest.importorskip("libtpu")
    return _tpu_devices(topology)


@functools.cache
def _tpu_devices(topology: str) -> list[Any]:
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def gpu_device(name: str) -> Any:
    """The GPU of a key of `GPUS`."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("no CUDA plugin: pip install jax-cuda13-plugin jax-cuda13-pjrt")
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas on the PATH: it is in the CUDA toolkit")
    return _gpu_device(name)


@functools.cache
def _gpu_device(name: str) -> Any:
    from jax.experimental import topologies

    description = {"target_config": GPUS[name], "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name=name, **description).devices[0]


def device(name: str) -> Any:
    """The GPU of a key of `GPUS`, or the first chip of a TPU slice."""
    return gpu_device(name) if name in GPUS else tpu_devices(name)[0]


def like(device: Any, *shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and device of an array, for `jax.jit(f).lower`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def bytes_of(tree: Any) -> int:
    """Bytes of arrays on one of their devices; the tree has ShapeDtypeStructs with shardings. Without random keys."""
    arrays = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


# jaxlib cannot print a program in which libtpu runs a gather on the SparseCores, so tests that read it turn that off.
READABLE_ON_TPU = {"xla_tpu_offload_gather_to_sparsecore": "false"}
