"""Kernels of the hot paths beside plain XLA, beside peers and beside the machine's limits, in one run and one table.

    python experiments/benchmarks/kernel_speed.py               all; on a GPU or TPU in bfloat16, with shapes of models
    python experiments/benchmarks/kernel_speed.py --only gae    one of logps, kl, gae
    pip install tokamax            adds its linear cross-entropy (GPU, TPU)
    pip install liger-kernel       with torch for CUDA adds its linear cross-entropy and linear JSD (NVIDIA GPU)

Measured: `logps` is log p of one token per row, `kl` is KL(π‖π_ref), both from hidden states [N D] and unembeddings
[V D]; forward alone, and forward + backward (to the policy's hidden states and weight). `gae` is [B T] in float32, with
a tenth of the mask False. Seconds are the median of --repeats calls after one warm-up, each waited for. Memory is XLA's
figure for the compiled program's temporaries, without arguments and results; for torch, the allocator's peak minus what
was allocated before. `floor` is the larger of two times: the least arithmetic (matrix products: logps 1 forward and 3
both ways, kl 2 and 4; keeping no logits costs 1 and 2 more) at the rate of this machine's matrix product in this run,
and reading arguments and writing results once at the rate of its copy. x floor: seconds / floor.

On a CPU the shapes are small and float32, and "pallas" is left out, because it would run in the interpreter.

Expected: on a GPU or TPU with a vocabulary of 128k, chunked and pallas need at most a fifth of the memory of
"reference". Forward, pallas is within 2x of the floor; where it does not beat chunked it is not the default. A "scan"
of T dependent steps is bound by launches, and "associative", "matmul" and "pallas" are 10 times as fast or more.

Observed: not measured on GPU or TPU. On 2 shared cores of a CPU (0.11 TFLOP/s, 2.4 GB/s; one run, --repeats 3, other
work beside it); ms forward / both ways, and MiB both ways:
    logps 512 x 512 x 32000   reference 331 / 845, 125 MiB      chunked 234 / 857, 33 MiB
    kl    512 x 512 x 32000   reference 704 / 1,184, 188 MiB    chunked 686 / 1,532, 64 MiB
    gae   64 x 1024           scan 0.36 / 0.84    associative 2.2 / 2.9    matmul 1.7 / 3.4
So on a CPU the scan is the fastest GAE, by 3.5x and more: its steps are a loop inside one program, and the others do
more work. Both ways, chunked KL takes 30% more time and a third of the memory: the reference keeps its logits for the
backward pass.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.advantages import gae
from jaxalign.ops.kl import token_kl
from jaxalign.ops.logprobs import token_logps
from jaxalign.types import Unembedding

CPU = jax.default_backend() == "cpu"
DTYPE = jnp.float32 if CPU else jnp.bfloat16
SHAPES = (  # N, D, V
    [(512, 256, 8_192), (512, 512, 32_000)]
    if CPU
    else [
        (4_096, 1_024, 151_936),  # Qwen3 0.6B
        (8_192, 2_048, 32_000),  # TinyLlama 1.1B
        (8_192, 2_048, 128_256),  # Llama 3.2 1B
        (8_192, 2_304, 256_000),  # Gemma 2 2B, without its soft-cap, which peers lack
        (8_192, 4_096, 128_256),  # Llama 3.1 8B
        (32_768, 4_096, 128_256),
    ]
)
ROWS = [(64, 1024)] if CPU else [(64, 1024), (512, 2048), (1024, 8192)]  # B, T
IMPLEMENTATIONS = ("reference", "chunked") if CPU else ("reference", "chunked", "pallas")
GAE_IMPLEMENTATIONS = ("scan", "associative", "matmul") if CPU else ("scan", "associative", "matmul", "pallas")


class Measured(NamedTuple):
    seconds: float
    bytes: float  # temporaries: without arguments and results


class Machine(NamedTuple):
    flops: float  # per second, in a matrix product in DTYPE
    bandwidth: float  # bytes per second, read and written, in a copy

    def floor(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.bandwidth)


def median_seconds(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    wait(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(function: Callable, arguments: tuple, repeats: int) -> Measured:
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Measured(median_seconds(lambda: compiled(*arguments), jax.block_until_ready, repeats), memory)


def machine(repeats: int) -> Machine:
    n = 1024 if CPU else 8192
    square = jax.random.normal(jax.random.key(0), (n, n)).astype(DTYPE)
    product = measure(lambda a, b: a @ b, (square, square), repeats).seconds
    # larger than any cache
    long = jnp.ones(2**26 if CPU else 2**29, jnp.uint8)
    copy = measure(lambda x: x + jnp.uint8(1), (long,), repeats).seconds
    return Machine(2 * n**3 / product, 2 * long.size / copy)


def inputs(n: int, d: int, v: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(1), 5)
    shapes = {"hidden": (n, d), "weight": (v, d), "ref_hidden": (n, d), "ref_weight": (v, d)}
    sides = {
        name: (jax.random.normal(key, shape) / d**0.25).astype(DTYPE)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return {**sides, "targets": jax.random.randint(keys[4], (n,), 0, v)}


def vocabulary_cases(what: str, arrays: dict) -> Iterator[tuple[str, str, Callable, tuple]]:
    """(implementation, direction, function, arguments) of every case: ours, and Tokamax if it is installed."""
    frozen = (arrays["targets"],) if what == "logps" else (arrays["ref_hidden"], arrays["ref_weight"])
    arguments = (arrays["hidden"], arrays["weight"], *frozen)

    def logps(hidden, weight, targets, *, implementation):
        return token_logps(hidden, Unembedding(weight), targets, implementation=implementation).logps.sum()

    def kl(hidden, weight, ref_hidden, ref_weight, *, implementation):
        sides = hidden, Unembedding(weight), ref_hidden, Unembedding(ref_weight)
        return token_kl(*sides, implementation=implementation).sum()

    for implementation in IMPLEMENTATIONS:
        function = functools.partial(logps if what == "logps" else kl, implementation=implementation)
        yield implementation, "forward", function, arguments
        yield implementation, "both", jax.value_and_grad(function, argnums=(0, 1)), arguments
    loss = getattr(importable("tokamax"), "linear_softmax_cross_entropy_loss", None)  # not every release exports it
    if what == "logps" and loss is not None:

        def tokamax(hidden, weight, targets):
            return loss(hidden, targets, weight.T)

        yield "tokamax", "forward", tokamax, arguments
        yield "tokamax", "both", jax.value_and_grad(tokamax, argnums=(0, 1)), arguments


def importable(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def liger(what: str, n: int, d: int, v: int, repeats: int) -> Measured | None:
    """Forward and backward of Liger's equivalent in torch, which has no forward alone; None without CUDA or Liger."""
    torch, kernels = importable("torch"), importable("liger_kernel.transformers")
    if torch is None or kernels is None or not torch.cuda.is_available():
        return None

    def draw(*shape, grad):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)

    hidden, weight = draw(n, d, grad=True), draw(v, d, grad=True)
    if what == "logps":
        loss, targets = kernels.LigerFusedLinearCrossEntropyLoss(), torch.randint(v, (n,), device="cuda")
        forward = functools.partial(loss, weight, hidden, targets)
    else:
        ref_hidden, ref_weight = draw(n, d, grad=False), draw(v, d, grad=False)
        loss = kernels.LigerFusedLinearJSD(jsd_beta=1.0)  # 1: KL(student‖teacher)
        forward = functools.partial(loss, hidden, weight, ref_hidden, ref_weight, None)

    def step():
        hidden.grad = weight.grad = None
        forward().backward()

    before = torch.cuda.memory_allocated()
    seconds = median_seconds(step, lambda _: torch.cuda.synchronize(), repeats)
    results = 2 * (hidden.numel() + weight.numel())
    return Measured(seconds, torch.cuda.max_memory_allocated() - before - results)


def attempt(function: Callable, *arguments: Any) -> Measured | str:
    try:
        return function(*arguments)
    except jax.errors.JaxRuntimeError as error:  # out of memory is a result too
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "out of memory"


def show(cells: tuple[str, ...], result: Measured | str, floor: float) -> None:
    if isinstance(result, str):
        print("| " + " | ".join((*cells, result, "", "", "")) + " |", flush=True)
        return
    times = f"{1e3 * result.seconds:,.2f}", f"{1e3 * floor:,.2f}", f"{result.seconds / floor:.1f}"
    print("| " + " | ".join((*cells, *times, f"{result.bytes / 2**20:,.1f}")) + " |", flush=True)


def vocabulary_table(what: str, rate: Machine, repeats: int) -> None:
    for n, d, v in SHAPES:
        cells = what, f"{n} x {d} x {v}"
        arrays = inputs(n, d, v)
        sides = 1 if what == "logps" else 2
        read = sides * (n + v) * d * jnp.dtype(DTYPE).itemsize
        floors = {
            "forward": rate.floor(sides * 2 * n * d * v, read),
            "both": rate.floor((sides + 2) * 2 * n * d * v, read + (n + v) * d * jnp.dtype(DTYPE).itemsize),
        }
        for implementation, direction, function, arguments in vocabulary_cases(what, arrays):
            result = attempt(measure, function, arguments, repeats)
            show((*cells, implementation, direction), result, floors[direction])
        del arrays
        result = liger(what, n, d, v, repeats)
        if result is not None:
            show((*cells, "liger", "both"), result, floors["both"])


def gae_table(rate: Machine, repeats: int) -> None:
    for b, t in ROWS:
        keys = jax.random.split(jax.random.key(2), 3)
        rewards, values = jax.random.normal(keys[0], (b, t)), jax.random.normal(keys[1], (b, t))
        mask = jax.random.bernoulli(keys[2], 0.9, (b, t))
        floors = {"forward": rate.floor(0, b * t * (3 * 4 + 1)), "both": rate.floor(0, b * t * (4 * 4 + 1))}
        for implementation in GAE_IMPLEMENTATIONS:
            function = functools.partial(gae, gamma=1.0, gae_lambda=0.95, implementation=implementation)
            loss = functools.partial(_sum_of_squares, function)
            directions = {"forward": function, "both": jax.grad(loss, argnums=(0, 1))}
            for direction, run in directions.items():
                result = attempt(measure, run, (rewards, values, mask), repeats)
                show(("gae", f"{b} x {t}", implementation, direction), result, floors[direction])


def _sum_of_squares(function: Callable, *arguments: jax.Array) -> jax.Array:
    return jnp.sum(function(*arguments) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("logps", "kl", "gae"), default=None)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device, rate = jax.devices()[0], machine(args.repeats)
    print(f"{device.device_kind}, jax {jax.__version__}, {jnp.dtype(DTYPE).name}: ", end="")
    print(f"{rate.flops / 1e12:,.3f} TFLOP/s in a matrix product, {rate.bandwidth / 1e9:,.1f} GB/s in a copy")
    if CPU:
        print("A CPU: small shapes, and no pallas, which would be interpreted.")
    print("| what | N x D x V or B x T | implementation | direction | ms | floor ms | x floor | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for what in ("logps", "kl"):
        if args.only in (None, what):
            vocabulary_table(what, rate, args.repeats)
    if args.only in (None, "gae"):
        gae_table(rate, args.repeats)


if __name__ == "__main__":
    main()
