"""Runs of the code at the commit OLD: the present code continues them, and repeats them, bit for bit.

Both codes run as a user runs them, in a process of their own, on one device. A run of each kind holds what that kind
alone keeps between steps: adapters, a reference that moves, heads, a critic, the KL controller, running means.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.cli.main import parse

ROOT = Path(__file__).resolve().parents[1]
OLD = "8765338819490dc47988389c1587d0d9671053dd"

SHARED = ["--steps=4", "--batch-size=4", "--max-length=16", "--remat=none", "--checkpoint.every=2"]
SHARED += ["--checkpoint.keep=10", "--optimizer.learning-rate=5e-3", "--optimizer.weight-decay=0.1"]
ON_POLICY = ["--n=4", "--max-new-tokens=8", "--slots=8", "--samples=2", "--eval-every=2"]
DOGS = '--reward=regex(pattern="dog")'
PPO = ["--algorithm.pretraining-coef=0.02", "--algorithm.normalise-scores", "--algorithm.kl-target=1"]
PPO += ["--algorithm.epochs=2", "--algorithm.minibatches=2"]
RUNS = {  # kind -> the command, the name of its data, its flags
    "sft": ("sft", "rows", ["--packing", "--loss=cross_entropy(z_loss=1e-3)", "--microbatches=2", "--eval-every=2"]),
    "dpo": ("dpo", "pairs", ["--lora.rank=2", "--precompute-reference", "--algorithm.loss=dpo(beta=0.2) + 0.1*sft"]),
    "kto": ("kto", "rated", ["--ref-update.every=1", "--ref-update.alpha=0.5"]),
    "reward": ("reward", "pairs", ["--members=2", "--lora.rank=2", "--combine=min"]),
    "ppo": ("ppo", "prompts", [*ON_POLICY, f"{DOGS} + 0.1*length(target=3)", "--pretraining-data=TEXT", *PPO]),
    "grpo": ("grpo", "prompts", [*ON_POLICY, DOGS, "--dynamic-sampling=2", "--top-p=0.9", "--algorithm.kl-coef=0.1"]),
}

# The mean std of a prompt's scores, which divides by n - 1 now, as advantages always did; nothing is computed from it.
REDEFINED = {"score_std"}
CLOCKED = {"step_seconds", "tokens_per_second", "training_seconds", "trained_tokens_per_second"}
CLOCKED |= {"generation_seconds", "generated_tokens_per_second", "reward_seconds"}

DRIVER = """
import contextlib, io, json, sys
import jaxalign
from jaxalign.cli.main import main
tree, commands = json.load(sys.stdin)
assert jaxalign.__file__.startswith(tree + "/"), jaxalign.__file__
failures = {}
for run, arguments in commands.items():
    with contextlib.redirect_stderr(io.StringIO()) as log:
        if main(arguments):
            failures[run] = log.getvalue()[-2000:]
print(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_data, tmp_path_factory):
    """(folder, log of each run that failed), where KIND is in folder/SIDE/KIND.

    The sides are `old`, by the old code; `continued`, the same from step 2 on by the present code; and `repeated`, by
    the present code from the start.
    """
    folder = tmp_path_factory.mktemp("old_runs")
    unpack_old_code(folder / "tree")
    data = written_data(folder, tiny_data)
    commands = {
        side: {f"{side}/{kind}": command(kind, folder / side / kind, tiny_model, data) for kind in RUNS}
        for side in ("old", "continued", "repeated")
    }
    (folder / "commands.json").write_text(json.dumps(commands["old"]))
    failures = run_all(commands["old"], folder / "tree", folder / "cache")
    assert not failures, "\n".join(failures.values())
    shutil.copytree(folder / "old", folder / "continued")
    for kind in RUNS:
        cut_back_to_step_2(folder / "continued" / kind)
    return folder, run_all(commands["continued"] | commands["repeated"], ROOT, folder / "cache")


def unpack_old_code(tree):
    archive = subprocess.run(["git", "archive", OLD, "jaxalign"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"commit {OLD[:7]} is not in this copy of the history: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="data")


def written_data(folder, rows):
    """The path of each data file by its name; `rows` is one that exists."""
    draw = np.random.default_rng(0)

    def response(word):
        return " ".join([word, *draw.choice(["the", "a", "red", "blue"], draw.integers(1, 5))])

    prompts = [f"{count} {word} ?" for count in ("one", "two") for word in ("cat", "dog")] * 3
    tables = {
        "pairs": [{"prompt": p, "chosen": response("cat"), "rejected": response("dog")} for p in prompts * 4],
        "rated": [{"prompt": p, "completion": response(p.split()[1]), "label": "cat" in p} for p in prompts * 4],
        "prompts": [{"prompt": p} for p in prompts],
        "text": [{"text": "the cat sees the dog . the dog runs to the cat ."}] * 8,
    }
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return {name: str(folder / f"{name}.jsonl") for name in tables} | {"rows": str(rows)}


def command(kind, output, model, data):
    name, table, flags = RUNS[kind]
    flags = [flag.replace("TEXT", data["text"]) for flag in flags]
    return [name, f"--model={model}", f"--data={data[table]}", f"--output={output}", *SHARED, *flags]


def run_all(commands, tree, cache):
    """Runs the commands by the code in the folder `tree`, in one process; the log of each that failed, by its key."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # one program that both codes compile to is compiled once
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAXALIGN_TRACEBACK": "1",
    }
    job = json.dumps([str(tree), commands])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=job, cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def cut_back_to_step_2(run):
    """Leaves what an interruption between steps 3 and 4 would have left."""
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "adapter", ignore_errors=True)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 4))


def differences(old, new):
    """A line for each metric, sample or tensor of the run `old` that `new` lacks or has with other bits."""
    rows, new_rows = metrics(old), metrics(new)
    if rows.keys() != new_rows.keys():
        yield f"steps {[*rows]} are {[*new_rows]}"
    for step in rows.keys() & new_rows.keys():
        for name, value in rows[step].items():
            if new_rows[step].get(name) != value:
                yield f"step {step}: {name} {value} is {new_rows[step].get(name)}"
    samples = [(run / "samples.jsonl").read_text() for run in (old, new) if (run / "samples.jsonl").exists()]
    if len(set(samples)) > 1:
        yield "samples.jsonl is another"
    tensors, new_tensors = exported(old), exported(new)
    for name in tensors.keys() | new_tensors.keys():
        if tensors.get(name) != new_tensors.get(name):
            yield f"{name} {'has other bits' if name in tensors.keys() & new_tensors.keys() else 'is not in both'}"


def metrics(run):
    """The metrics of each step as they are spelled, without times. `scores/` was `rewards/` before."""
    rows = [json.loads(line, parse_float=str) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {
            n.replace("scores/", "rewards/"): value for n, value in row.items() if n not in CLOCKED | REDEFINED
        }
        for row in rows
    }


def exported(run):
    """The dtype, shape and bytes of each exported tensor, by its file and name; and the scale of a reward's scores."""
    tensors = {
        f"{path.relative_to(run)} {name}": (tensor.dtype, tensor.shape, tensor.tobytes())
        for path in run.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    return tensors | {path.name: path.read_text() for path in run.rglob("reward.json")}


def all_differences(runs, side):
    folder, failures = runs
    for kind in RUNS:
        if (run := f"{side}/{kind}") in failures:
            yield f"{run}: failed\n{failures[run]}"
        else:
            yield from (f"{run}: {line}" for line in differences(folder / "old" / kind, folder / run))


def test_old_runs_are_what_they_are_meant_to_be(runs):
    """The comparisons would say little of runs that learn nothing or lack a part."""
    folder, _ = runs
    rows = {kind: metrics(folder / "old" / kind) for kind in RUNS}
    for kind, steps in rows.items():
        assert {1, 2, 3, 4} <= steps.keys() and steps[3]["loss"] != steps[4]["loss"], kind
        assert all(step["skipped_steps"] == 0 for i, step in steps.items() if i), kind
    assert rows["ppo"][4]["kl_coef"] != rows["ppo"][3]["kl_coef"]
    assert any(step["sampling_rounds"] == 2 for step in rows["grpo"].values())


def test_the_present_code_continues_old_runs_bit_for_bit(runs):
    folder, _ = runs
    for kind in RUNS:  # a run that began anew would have written its checkpoint of step 2 again
        old, continued = (folder / side / kind / "checkpoints" / "2" for side in ("old", "continued"))
        assert old.stat().st_mtime_ns == continued.stat().st_mtime_ns, kind
    lines = list(all_differences(runs, "continued"))
    assert not lines, "\n".join(lines)


def test_the_present_code_repeats_old_runs_bit_for_bit(runs):
    lines = list(all_differences(runs, "repeated"))
    assert not lines, "\n".join(lines)


def test_the_settings_in_an_old_config_file_are_those_of_its_command(runs):
    folder, _ = runs
    for run, arguments in json.loads((folder / "commands.json").read_text()).items():
        assert parse([arguments[0], "--from-config", str(folder / run / "config.json")]) == parse(arguments)
