"""Shared parts of the comparisons with peers: the model, its tokenizer, and a process for each contender, in turns."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

VOCABULARY, HIDDEN, LAYERS, HEADS, MLP, LENGTH = 8192, 384, 8, 6, 1600, 256
LEARNING_RATE, WARM = 3e-4, 2

# A contender trains on rows and calls mark("imported", 0) after its imports, mark("step", tokens) after every step.
Contender = Callable[[list, Callable[[str, int], None]], None]


def hf_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def tunix_config():
    """The same model as a config of Tunix."""
    from tunix.models.llama3.model import ModelConfig

    return ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=HIDDEN,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        num_kv_heads=HEADS,
        rope_theta=10_000,
        norm_eps=1e-6,
    )


def word_tokenizer(kind):
    """Tokenizer whose token i is the word "w<i>"; tokens 0 to 3 are pad, start, end and unknown."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    names = [*special, *(f"w{i}" for i in range(len(special), VOCABULARY))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return kind(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pad(rows: list[list[int]], width: int | None = None) -> tuple[list[list[int]], list[list[int]]]:
    width = width or max(map(len, rows))
    ids = [row + [0] * (width - len(row)) for row in rows]
    return ids, [[1] * len(row) + [0] * (width - len(row)) for row in rows]


def in_turns(description: str | None, contenders: dict[str, dict[str, Contender]], rows_of: Callable) -> None:
    """Command line of a comparison: runs every kind's contenders --rounds times, and prints one table per kind."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of each contender; the first two are warm-up")
    parser.add_argument("--kind", choices=contenders, help="print the table of this kind only")
    parser.add_argument("--only", nargs="*", help="run these contenders only")
    parser.add_argument("--trl-python", default=sys.executable, help="Python of the environment that has TRL")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        return _run_one(contenders[args.kind][args.contender], rows_of(args.kind, args.steps))
    for kind in [args.kind] if args.kind else contenders:
        names = [name for name in contenders[kind] if not args.only or name in args.only]
        python = {name: args.trl_python if name == "TRL" else sys.executable for name in names}
        rounds = [{name: _measure(python[name], kind, name, args.steps) for name in names} for _ in range(args.rounds)]
        _report(kind, names, rounds)


def _run_one(contender: Contender, rows: list) -> None:
    """Runs a contender in this process, and prints its measurements as one line of JSON."""
    times: list[tuple[float, int]] = []
    imported = 0.0

    def mark(event: str, tokens: int) -> None:
        nonlocal imported
        if event == "imported":
            imported = time.perf_counter()
        else:
            times.append((time.perf_counter(), tokens))

    contender(rows, mark)
    seconds = times[-1][0] - times[WARM - 1][0]
    print(
        json.dumps(
            {
                "tokens_per_second": sum(tokens for _, tokens in times[WARM:]) / seconds,
                "first_step_seconds": times[0][0] - imported,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


def _measure(python: str, kind: str, name: str, steps: int) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [python, sys.argv[0], "--contender", name, "--kind", kind, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith('{"tokens')][-1])


def _report(kind: str, names: list[str], rounds: list[dict]) -> None:
    print(f"\n{kind}: medians of {len(rounds)} rounds (lowest to highest)")
    print(f"{'':36}{'tokens/s':>22}{'ratio to first':>16}{'peak GiB':>10}{'first step s':>14}", flush=True)
    for name in names:
        speeds = [r[name]["tokens_per_second"] for r in rounds]
        ratio = statistics.median(r[name]["tokens_per_second"] / r[names[0]]["tokens_per_second"] for r in rounds)
        speed = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"
        memory = statistics.median(r[name]["peak_gib"] for r in rounds)
        first = statistics.median(r[name]["first_step_seconds"] for r in rounds)
        print(f"{name:36}{speed:>22}{ratio:>16.2f}{memory:>10.2f}{first:>14.1f}", flush=True)
