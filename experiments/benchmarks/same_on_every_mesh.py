"""Training on several hosts and meshes beside one device: are the tokens the same, and the weights?

    python experiments/benchmarks/same_on_every_mesh.py

Each layout is a job of its own: that many processes with that many devices each (fake ones, on the CPU), joined over
gloo as the hosts of a pod are. Every job runs six commands by the command line, two steps of 8 rows in 2 microbatches
each: a random Llama of 2 layers (hidden 32, 4 heads, 2 of keys, vocabulary 8,192), float32, AdamW at 1e-3. The table
has, beside one process with one device and the same seed, the tokens trained on (equal, or not) and the largest
difference of a weight of the final model. AdamW divides a gradient by its size, so rounding of a gradient near zero
moves its weight by up to the learning rate.

Observed:  (one layout so far, with a vocabulary of 64, and a learning rate of 1e-2, which makes differences larger)

                            sft        dpo        kto        reward     ppo        grpo
    2 hosts, tensor=4       5.4e-07    5.8e-07    4.3e-05    7.5e-06    8.5e-06    6.0e-07    (tokens equal in all)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from beside_commit import MODEL
from side_by_side import VOCABULARY, word_tokenizer

STEPS = 2
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
SIZES |= {"tie_word_embeddings": True, "initializer_range": 0.1}
RESPONSES = ["--max-new-tokens=8", "--reward=length(target=5)", "--slots=8", "--samples=0"]
COMMANDS = {  # command -> (its data, flags of its own)
    "sft": ("sft", ["--batch-size=8", "--eval-share=0", "--samples=0"]),
    "dpo": ("pairs", ["--batch-size=8", "--eval-share=0", "--samples=0"]),
    "kto": ("pairs", ["--batch-size=8", "--eval-share=0", "--samples=0"]),
    "reward": ("pairs", ["--batch-size=8", "--eval-share=0"]),
    "ppo": ("prompts", ["--batch-size=8", *RESPONSES]),
    "grpo": ("prompts", ["--batch-size=4", "--n=4", *RESPONSES]),
}
LAYOUTS = {  # (hosts, devices of each) and the mesh; the axes named cross hosts
    "2 hosts, tensor=4": (2, 2, {"tensor": 4}),
    "2 hosts, fsdp=4": (2, 2, {"fsdp": 4}),
    "4 hosts, fsdp=4": (4, 1, {"fsdp": 4}),
    "4 hosts, fsdp=2 tensor=2": (4, 1, {"fsdp": 2, "tensor": 2}),
    "4 hosts, data=2 fsdp=2 tensor=2": (4, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
}
JOB = """
import json, sys
from jaxalign.cli.main import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=list(COMMANDS), help="only these commands")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), help="only these layouts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        expected = trained(folder, args.only, hosts=1, devices=1, axes={})
        print(f"{'':34}" + "".join(f"{command:>16}" for command in args.only), flush=True)
        for name in args.layouts:
            hosts, devices, axes = LAYOUTS[name]
            actual = trained(folder, args.only, hosts=hosts, devices=devices, axes=axes)
            cells = []
            for command in args.only:
                same, difference = compared(expected[command], actual[command])
                cells.append(f"{'equal' if same else 'OTHER'} {difference:8.1e}")
            print(f"{name:34}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def write_inputs(folder: Path) -> None:
    """Three data files, and the model: random weights, written by a step at learning rate 0."""
    from transformers import PreTrainedTokenizerFast

    word_tokenizer(PreTrainedTokenizerFast).save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(MODEL | SIZES))
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(4, VOCABULARY)}" for _ in range(draw.randint(least, most)))

    rows = {
        "sft": [{"prompt": text(2, 6), "completion": " " + text(1, 8)} for _ in range(32)],
        "pairs": [{"prompt": text(2, 6), "chosen": " " + text(1, 8), "rejected": " " + text(1, 8)} for _ in range(32)],
        "prompts": [{"prompt": text(2, 6)} for _ in range(16)],
    }
    for name, table in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    flags = [f"--model=config:{folder / 'config.json'}", f"--tokenizer={folder / 'tokenizer'}", "--steps=1"]
    flags += [f"--data={folder / 'sft.jsonl'}", f"--output={folder / 'model'}", "--eval-share=0", "--samples=0"]
    run_on_hosts(json.dumps([["sft", *flags, "--optimizer.learning-rate=0"]]), hosts=1, devices=1)


def trained(
    folder: Path, commands: list[str], *, hosts: int, devices: int, axes: dict[str, int]
) -> dict[str, tuple[list, dict[str, np.ndarray]]]:
    """(rows of metrics, weights of the final model) of each command, trained by one job."""
    from safetensors.numpy import load_file

    outputs = {command: Path(tempfile.mkdtemp(dir=folder)) / command for command in commands}
    jobs = []
    for command in commands:
        data, flags = COMMANDS[command]
        flags = [f"--model={folder / 'model' / 'final'}", *flags]
        flags += [f"--data={folder / data}.jsonl", f"--output={outputs[command]}", f"--steps={STEPS}"]
        flags += ["--microbatches=2", "--max-length=16", "--remat=none"]
        flags += ["--optimizer.learning-rate=1e-3", "--optimizer.schedule=constant"]
        flags += [f"--mesh.{axis}={axes.get(axis, 1)}" for axis in ("data", "fsdp", "tensor")]
        jobs.append([command, *flags, *(["--distributed"] if hosts > 1 else [])])
    run_on_hosts(json.dumps(jobs), hosts, devices)
    results = {}
    for command, output in outputs.items():
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        results[command] = rows, load_file(output / "final" / "model.safetensors")
    return results


def run_on_hosts(jobs: str, hosts: int, devices: int) -> None:
    """Runs the jobs in `hosts` processes that are joined; ends the program with their errors if one fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"}
    if hosts > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(hosts)}
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(hosts)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", JOB, jobs], env=environment | {"JAX_PROCESS_ID": str(i)}, stdout=log, stderr=log
            )
            for i, log in enumerate(logs)
        ]
        statuses = [process.wait() for process in processes]
        for host, (status, log) in enumerate(zip(statuses, logs, strict=True)):
            log.seek(0)
            if status:
                sys.exit(f"host {host} of {hosts} ended with {status}:\n{log.read()[-3000:]}")


def compared(expected: tuple[list, dict], actual: tuple[list, dict]) -> tuple[bool, float]:
    """(the same tokens were trained on, the largest difference of a weight)"""
    tokens = [[row.get("num_tokens") for row in rows] for rows, _ in (expected, actual)]
    assert expected[1].keys() == actual[1].keys()
    return tokens[0] == tokens[1], max(float(np.abs(actual[1][name] - x).max()) for name, x in expected[1].items())


if __name__ == "__main__":
    main()
