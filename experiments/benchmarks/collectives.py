"""Bytes that a chip receives from others in one train step of Llama-3.1-8B with two layers, on slices that are absent.

    python experiments/benchmarks/collectives.py [--steps sft ...] [--slices v5e:2x4 ...] [--meshes fsdp ...]

Needs libtpu. Nothing is downloaded, and no array made. A row is one optimisation of the program by the TPU compiler,
20 to 40 seconds of a core: its last text is read, and the generation of machine code, five times as long, is not
waited for.

Counted as a ring moves them, per chip, n in a group: all-gather (n-1)/n of the result, reduce-scatter (n-1)/n of the
operand, all-reduce twice that, all-to-all (n-1)/n, permutation the operand; a loop's body as often as it runs, of the
branches of a conditional the largest. One microbatch of one row of 1,536 tokens on a chip, bfloat16 compute, float32
parameters, remat blocks; so a layer's weights are needed twice, forward and backward.

Observed (libtpu of jax 0.10.2; GB received / the closed form of `least`, for activations a bound):

    step slice    mesh         weights    gradients  unembedding  its gradient  activations
    sft  v5e:2x4  fsdp         1.53/1.53  1.96/1.53  0.92/0.92    1.84/1.84     0.02/0.05
    sft  v5e:2x4  fsdp-tensor  0.65/0.65  0.66/0.65  0.39/0.39    0.79/0.79     0.18/0.20
    dpo  v5p:4x4x4  all        1.23/1.23  0.90/0.87  0.99/0.99    1.12/1.12     0.25/0.31
    ppo  v6e:8x8  fsdp-tensor  2.54/2.54  1.73/1.69  1.02/1.02    1.02/1.02     0.48/0.63

Nothing has logits, and nothing of the vocabulary is in a loop. Over 8 chips of fsdp alone XLA scatters gradients in
windows beside their products, which move 9 shares where 7 would do. The unembedding's gradient cannot be less: it is
summed in float32, and a chip receives n-1 shares of its [V / tensor, D / n].
"""

import argparse
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
LENGTH = 1536  # of a row, unlike any width of the model
VOCABULARY, LAYERS = 128_256, 2
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
LAYER_WEIGHTS = 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 14_336
STEPS = ("sft", "dpo", "ppo")
SLICES = ("v5e:2x4", "v5e:4x4", "v5e:8x8", "v5p:4x4x4", "v6e:2x4", "v6e:8x8")
MESHES = {"fsdp": {}, "fsdp-tensor": {"tensor": 2}, "all": {"data": 2, "tensor": 2}}  # fsdp: the other chips
DUMPED = "*after_optimizations_after_buffer_assignment.txt"


class Optimised(NamedTuple):
    """A program that the TPU compiler has optimised, without machine code."""

    text: str
    bytes: int  # of a chip: arguments, results that are no arguments, temporaries


def optimised(*arguments: str, seconds: float = 900) -> Optimised:
    """The program that `python <arguments>` compiles, from the compiler's dump, which ends that process."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        places = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        environment = os.environ | places | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            start = time.monotonic()
            # the second of the two texts: when it is there, the first is whole
            while not list(Path(folder).glob(DUMPED)):
                if process.poll() is not None or time.monotonic() - start > seconds:
                    errors.seek(0)
                    raise RuntimeError(f"no optimised program of {arguments}: {errors.read()[-2000:]}")
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        text = next(Path(folder).glob("*after_optimizations.txt")).read_text()
        report = next(Path(folder).glob("*after_optimizations-memory-usage-report.txt")).read_text()
    size = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", report)
    assert size
    return Optimised(text, int(size[1]))


def sizes_of(topology: str, mesh: str) -> dict[str, int]:
    """Sizes of the mesh's axes on a slice."""
    sizes = {"data": 1, "tensor": 1, **MESHES[mesh]}
    chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    return sizes | {"fsdp": chips // sizes["data"] // sizes["tensor"]}


def step_for(step: str, topology: str, sizes: dict[str, int], **changes: Any) -> Optimised:
    """The optimised train step of a command."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import collectives; "
    return optimised("-c", code + f"collectives.lower({step!r}, {topology!r}, {sizes!r}, **{changes!r}).compile()")


def lower(step: str, topology: str, sizes: dict[str, int], **changes: Any) -> Any:
    """The train step of a command, lowered for a slice."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding

    from jaxalign.commands import dpo, ppo, sft
    from jaxalign.config.offline import DPOConfig, SFTConfig
    from jaxalign.config.on_policy import PPOConfig
    from jaxalign.config.shared import MeshConfig
    from jaxalign.models import places
    from jaxalign.models.files.families import model_config
    from jaxalign.training import sharding
    from jaxalign.training.program import compile_step
    from jaxalign.types import ResponseBatch, RolloutBatch, TokenBatch

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = places.make_mesh(**sizes, devices=list(devices))
    rows = math.prod(mesh.shape[axis] for axis in ("data", "fsdp")) * changes.get("microbatches", 1)
    settings = {
        "model": "config:Llama-3.1-8B",  # no file is read
        "data": "data.jsonl",
        "output": Path("runs/none"),
        "batch_size": rows,
        "max_length": LENGTH,
        "precision": "bfloat16",
        "remat": "blocks",
        "attention": "splash",
        "mesh": MeshConfig(**{axis: mesh.shape[axis] for axis in places.AXES}),
        **changes,
    }

    def column(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=NamedSharding(mesh, sharding.ROWS))

    def tokens(*shape: int) -> TokenBatch:
        return TokenBatch(*(column(dtype, *shape) for dtype in (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)))

    if step == "sft":
        command, config, batch = sft, SFTConfig(**settings), tokens(LENGTH)
    elif step == "dpo":
        settings["max_length"] = LENGTH // 2
        batch = ResponseBatch(tokens(2, LENGTH // 2), column(jnp.int32, 8, 2), {}, stride=17)
        command, config = dpo, DPOConfig(**settings)
    else:
        settings |= {"reward": "length(target=256)", "max_new_tokens": 512}
        columns = {"old_logps": column(jnp.float32, LENGTH), "scores": column(jnp.float32), "ended": column(jnp.bool_)}
        config = PPOConfig(**settings)
        config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, epochs=1))
        command, batch = ppo, RolloutBatch(tokens(LENGTH), columns)
    program = compile_step(config, command.recipe(config, model_config(MODEL), mesh), mesh, steps=1000)
    return program.step.lower(program.like, program.frozen, batch)


class Moved(NamedTuple):
    """One array of a collective of a program."""

    kind: str
    dtype: str
    dims: tuple[int, ...]  # of the result
    bytes: float  # that a chip receives in a step
    times: int  # a step
    loops: int  # around it


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
WIDTHS = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1, "s64": 8, "u64": 8}


def received(text: str) -> list[Moved]:
    """The arrays that collectives bring to a chip in one run of an optimised program."""
    parts, entry = _computations(text)
    chains = set()  # a collective that runs beside several fusions stands in each of them

    def visit(name: str, times: int, loops: int) -> list[Moved]:
        moved = []
        for line in parts.get(name, ()):
            if match := re.search(rf"= (.*?) ({KINDS})(-start)?\(", line):
                chain = re.search(r'chain_id="\d+"', line)
                if chain and (chain[0] in chains or chains.add(chain[0])):
                    continue
                moved += _arrays(name, line, match, times, loops)
            elif " while(" in line:
                names = {key: _named(line, key) for key in ("body", "condition")}
                count = _trips(parts[names["condition"]], parts[names["body"]])
                moved += visit(names["body"], times * count, loops + 1)
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                choices = [visit(branch.strip().lstrip("%"), times, loops) for branch in branches[1].split(",")]
                moved += max(choices, key=lambda choice: sum(entry.bytes for entry in choice))
            else:
                for called in CALLED.findall(line):
                    moved += visit(called, times, loops)
        return moved

    return visit(entry, 1, 0)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    parts: dict[str, list[str]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith("HloModule"):
            current = parts.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":  # a kernel's metadata may hold lines that begin with a brace
            current = None
        elif current is not None and " = " in line:
            current.append(line)
    return parts, entry


def _named(line: str, key: str) -> str:
    match = re.search(rf"{key}=%?([\w.\-]+)", line)
    assert match, line
    return match[1]


def _trips(condition: list[str], body: list[str]) -> int:
    """Runs of a loop whose counter starts at 0, grows by a constant and is compared with one."""
    limits = _constants(condition)
    assert len(limits) == 1, condition
    (limit,) = limits.values()
    index = next(
        m[1] for line in condition if (m := re.search(r"= [su]32\[\]\S* get-tuple-element\(.*index=(\d+)", line))
    )
    root = next(line for line in body if line.lstrip().startswith("ROOT"))
    after = re.findall(r"%[\w.\-]+", root[root.index(" tuple(") :])[int(index)]
    (sum_,) = (line for line in body if line.lstrip().startswith(f"{after} = "))
    if match := re.search(r" add\(([^)]*)\)", sum_):
        steps = [step for name, step in _constants(body).items() if name in re.findall(r"%[\w.\-]+", match[1])]
    else:
        steps = []
    return -(-limit // (steps[0] if steps else 1))


def _constants(lines: list[str]) -> dict[str, int]:
    pattern = r"\s*(?:ROOT )?(%[\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)"
    return {match[1]: int(match[2]) for line in lines if (match := re.match(pattern, line))}


def _arrays(computation: str, line: str, match: re.Match, times: int, loops: int) -> list[Moved]:
    kind = match[2]
    shapes = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
    ]
    if match[3] and kind in ("all-gather", "collective-permute"):
        shapes = shapes[1:2]  # (operand, result, ...)
    size = _group(line)
    share = {"all-reduce": 2 * (size - 1) / size, "reduce-scatter": size - 1.0, "collective-permute": 1.0}
    factor = share.get(kind, (size - 1) / size)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # each chip slices its part out
        kind, factor = "reduce-scatter", (size - 1) / size
    return [
        Moved(kind, dtype, dims, factor * times * math.prod(dims) * WIDTHS[dtype], times, loops)
        for dtype, dims in shapes
    ]


def _group(line: str) -> int:
    """Chips that take part in a collective with one of them."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2  # a permutation's pairs


class Account(NamedTuple):
    """Gigabytes that a chip receives in a step, by what they are."""

    weights: float  # of layers
    gradients: float  # of layers' weights
    unembedding: float  # and embedding
    its_gradient: float
    activations: float
    rest: float
    logits: int = 0  # arrays with an axis of tokens and one of the vocabulary
    vocabulary_in_loops: int = 0  # arrays with an axis of the vocabulary, within a loop over less than microbatches


def account(moved: list[Moved], *, tensor: int, microbatches: int = 1) -> Account:
    """The kinds of arrays, told apart by their dimensions: a row has as many tokens as no weight has columns."""
    lengths = {LENGTH // part // half for part in (1, tensor) for half in (1, 2)}
    gigabytes, logits, in_loops = Counter(), 0, 0
    for entry in moved:
        of_tokens, of_vocabulary = _has(entry.dims, lengths), _has(entry.dims, {VOCABULARY, VOCABULARY // tensor})
        logits += of_tokens and of_vocabulary
        in_loops += of_vocabulary and entry.loops > (microbatches > 1)
        narrow = entry.kind == "all-gather" or entry.dtype == "bf16"
        if of_vocabulary:
            kind = "unembedding" if narrow else "its_gradient"
        elif of_tokens:
            kind = "activations"
        elif math.prod(entry.dims) >= 2**18:
            kind = "weights" if narrow else "gradients"
        else:
            kind = "rest"
        gigabytes[kind] += entry.bytes / 1e9
    return Account(*(gigabytes[name] for name in Account._fields[:6]), logits, in_loops)


class Passes(NamedTuple):
    """Work of a step in each microbatch."""

    forward: int  # trunks without a gradient
    trained: int  # trunks forward, and backward with the forward again
    unembeddings: int


PASSES = {"sft": Passes(0, 1, 1), "dpo": Passes(1, 1, 2), "ppo": Passes(2, 2, 2)}  # a reference; and a critic


def least(step: str, mesh: dict[str, int], *, microbatches: int = 1) -> Account:
    """`account` where each pass gathers a layer's weights once, and each backward pass scatters its gradient once.

    Activations are a bound: between layers two gathers and two scatters a pass, three and one more in a backward pass,
    and for each trunk two at its ends.
    """
    passes, tensor, fsdp, data = PASSES[step], mesh["tensor"], mesh["fsdp"], mesh["data"]
    cut, replicas = 1 - 1 / fsdp, 2 * (1 - 1 / data) / fsdp
    layers, vocabulary = LAYERS * LAYER_WEIGHTS / tensor, VOCABULARY * 4096 / tensor
    hidden = LENGTH * 4096 * 2 * (1 - 1 / tensor)
    trunks = passes.forward + passes.trained
    edges = LAYERS * (4 * passes.forward + 11 * passes.trained) + 2 * trunks
    ends = LENGTH * 4096 * 8 * trunks if fsdp > 1 else 0  # rows of the embedding, and their gradient
    parts = (
        (passes.forward + 2 * passes.trained) * layers * 2 * cut,
        passes.trained * layers * 4 * (cut + replicas),
        passes.unembeddings * vocabulary * 2 * cut / microbatches,  # before the loop over microbatches
        # of unembedding and embedding; only the replicas add up those of a critic's embedding
        vocabulary * 4 * (cut + (1 + passes.trained) * replicas) / microbatches,  # behind that loop
        edges * hidden + ends,
        0.0,
    )
    return Account(*(microbatches * part / 1e9 for part in parts))


def _has(dims: tuple[int, ...], sizes: set[int]) -> bool:
    return any(size in dims for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--list", action="store_true", help="also print every array of more than a megabyte")
    args = parser.parse_args()
    print(
        "step slice      mesh             weights  gradients  unembedding its-gradient  activations  rest logits loops"
    )
    for step, topology, mesh in itertools.product(args.steps, args.slices, args.meshes):
        sizes = sizes_of(topology, mesh)
        moved = received(step_for(step, topology, sizes).text)
        actual, bound = account(moved, tensor=sizes["tensor"]), least(step, sizes)
        pairs = "  ".join(f"{x:5.2f}/{y:5.2f}" for x, y in zip(actual[:5], bound[:5], strict=True))
        print(f"{step:4} {topology:10} {mesh:12} {pairs} {actual.rest:5.2f} {actual[6]:6} {actual[7]:5}", flush=True)
        for entry in sorted(moved, key=lambda entry: -entry.bytes) if args.list else ():
            if entry.bytes > 1e6:
                print(f"    {entry.bytes / 1e9:9.4f} GB {entry.times:3} x {entry.loops} {entry[:3]}")


if __name__ == "__main__":
    main()
