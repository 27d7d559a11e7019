"""The KL and GAE kernels, compiled by the real compilers for devices that are not there: legality and memory.

TPUs by libtpu (Mosaic), GPUs by XLA, Triton and ptxas. What a device computes, and how fast, this does not say.

    KL_GAE=all pytest -s tests/kernels/test_compiled.py      every combination, as a table
"""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.kernels import gae, kl
from jaxalign.kernels.runtime import target_of
from jaxalign.ops.kl import token_kl
from jaxalign.types import Unembedding
from tests import absent

EVERYTHING = os.environ.get("KL_GAE") == "all"
DEVICES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100", "h200"]


def compiled(function, *arguments):
    lowered = jax.jit(function).lower(*arguments)
    # the kernel, and not its definition
    assert any(name in lowered.as_text() for name in ("tpu_custom_call", "triton"))
    return lowered.compile().memory_analysis()


MODELS = {  # tokens, width, vocabulary, soft-cap
    "Llama 3 8B": (8192, 4096, 128_256, None),
    "Qwen3 0.6B": (16384, 1024, 151_936, None),
    "Gemma 2 2B": (8192, 2304, 256_000, 30.0),
    "unaligned": (333, 300, 1001, None),
}


@pytest.mark.parametrize("backward", [False, True] if EVERYTHING else [True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32] if EVERYTHING else [jnp.bfloat16])
@pytest.mark.parametrize("model", MODELS if EVERYTHING else ["Llama 3 8B"])
@pytest.mark.parametrize("device", DEVICES if EVERYTHING else ["v5p:2x2x1", "h100"])
def test_kl_compiles_without_logits_in_memory(device, model, dtype, backward):
    n, d, v, softcap = MODELS[model]
    chip = absent.device(device)
    target = target_of([chip])

    def total(hidden, weight, ref_hidden, ref_weight, count):
        ref = Unembedding(ref_weight, None, softcap)
        return kl.kl(hidden, Unembedding(weight, None, softcap), ref_hidden, ref, count, target=target).sum()

    function = jax.value_and_grad(total, argnums=(0, 1)) if backward else total
    hidden, weight = absent.like(chip, n, d, dtype=dtype), absent.like(chip, v, d, dtype=dtype)
    memory = compiled(function, hidden, weight, hidden, weight, absent.like(chip, dtype=jnp.int32))
    mib, logits = memory.temp_size_in_bytes / 2**20, n * v * dtype.dtype.itemsize / 2**20
    print(
        f"kl | {device} | {model} | {dtype.__name__} | {backward=} | temporary {mib:,.0f} MiB, [N V] {logits:,.0f} MiB"
    )
    # the weights' gradient is an output; what is temporary is dz of a slab, and dhidden in float32
    assert model == "unaligned" or mib < logits / 3


@pytest.mark.skipif(not EVERYTHING, reason="half a minute; run with KL_GAE=all")
def test_kl_compiles_for_a_slice_whose_chips_share_rows_and_vocabulary():
    chips = absent.tpu_devices("v5e:2x2")
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=chips)
    n, d, v = 6144, 4096, 128_256  # a chip's 3072 rows are told from D and from the slab

    def mean(hidden, weight, ref_hidden, ref_weight, mask):
        options = {"mask": mask, "implementation": "pallas", "mesh": mesh}
        return token_kl(hidden, Unembedding(weight), ref_hidden, Unembedding(ref_weight), **options).mean()

    def place(dtype, sizes, *axes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*axes)))

    hidden = place(jnp.bfloat16, (8, n // 8, d), ("data", "fsdp"))
    weight, mask = place(jnp.bfloat16, (v, d), "tensor", "fsdp"), place(jnp.bool_, (8, n // 8), ("data", "fsdp"))
    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1))).lower(hidden, weight, hidden, weight, mask).compile()
    # a chip's arrays: its half of V of a weight, gathered to the whole D, but never its rows times its half of V
    assert f"bf16[{v // 2},{d}]" in step.as_text()
    assert f"[{n // 2},{v // 2}]" not in step.as_text() and f"[{v // 2},{n // 2}]" not in step.as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("device", DEVICES if EVERYTHING else ["v6e:2x2", "h200"])
def test_kl_of_logits_compiles(device, dtype):
    chip = absent.device(device)
    target = target_of([chip])
    logits = absent.like(chip, 1000, 151_936, dtype=dtype)

    def total(z, y):
        return kl.kl_of_logits(z, y, target=target).sum()

    memory = compiled(jax.value_and_grad(total), logits, logits)
    print(f"kl of logits | {device} | {dtype.__name__} | temporary {memory.temp_size_in_bytes / 2**20:,.0f} MiB")
    assert memory.temp_size_in_bytes < 2**20 + 1000 * 128 * 4 * 16  # a few numbers a row, and a TPU's padding to 128


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32] if EVERYTHING else [jnp.float32])
@pytest.mark.parametrize("b, t", [(64, 1024), (512, 2048), (7, 333)])
@pytest.mark.parametrize("device", DEVICES if EVERYTHING else ["v5e:2x2", "h100"])
def test_gae_compiles(device, b, t, dtype):
    chip = absent.device(device)
    target = target_of([chip])
    row, mask = absent.like(chip, b, t, dtype=dtype), absent.like(chip, b, t, dtype=jnp.bool_)
    options = {"gamma": 1.0, "gae_lambda": 0.95, "target": target}

    def loss(r, v, m):
        return (gae.gae(r, v, m, **options) ** 2).sum()

    memory = compiled(jax.value_and_grad(loss, argnums=(0, 1)), row, row, mask)
    print(f"gae | {device} | {b}x{t} | {dtype.__name__} | temporary {memory.temp_size_in_bytes / 2**20:,.1f} MiB")
    padded = -(-b // 128) * 128 * (-(-t // 8) * 8)  # a TPU's float32 arrays are whole registers of 8 x 128
    assert memory.temp_size_in_bytes <= 6 * 4 * padded + 2**16
