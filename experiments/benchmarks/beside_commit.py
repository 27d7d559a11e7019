"""The working tree beside an earlier commit, in one run: does a change of the code cost time or memory?

    python experiments/benchmarks/beside_commit.py 8765338 --rounds 3

Each command runs as a user runs it, in a process of its own, on the code of either side, in turns (A B, A B, ...), so
that a noisy machine treats both alike. The model: a random Llama of 4.9M parameters (hidden 192, 4 layers, 4 heads,
MLP 512, vocabulary 8,192, untied), fp32, 2 threads, no compilation cache. The data are random words.

    sft       8 packed rows of 256 tokens a step
    dpo       8 pairs of 24 + 40 tokens a step, with the reference beside the policy
    ppo       8 prompts of 24 tokens answered with at most 40; 4 epochs of policy and critic
    generate  256 responses of at most 128 tokens, 32 at once; start and compilation included

Seconds a step are the median over the steps of a run after three warm ones: of ppo, without generation, which has a
line of its own. Seconds to the first row run from the start of the process until step 1 is in metrics.jsonl. Memory is
the largest resident set. `--help` is CPU time beyond that of `python -c pass`. Each figure is the median over rounds;
ratios are this tree over the commit, one for each round, and their median. Only flags that both sides know are used.

Observed:  (b03e029 beside 8765338, two CPU cores, two rounds)

                                     8765338   this tree   ratio   of each round
    sft, s a step                      0.477       0.489    1.03   1.02 1.03
    sft, s to first row               11.668      11.982    1.03   0.93 1.14
    sft, peak GiB                      1.126       1.137    1.01   0.97 1.05
    dpo, s a step                      0.282       0.296    1.05   1.08 1.01
    dpo, s to first row               10.014      10.434    1.04   1.07 1.01
    dpo, peak GiB                      1.076       1.085    1.01   1.04 0.98
    ppo, s a step                      0.749       0.722    0.96   0.97 0.96
    ppo, generation s a step           0.081       0.072    0.88   0.88 0.88
    ppo, s to first row               16.721      17.618    1.06   1.25 0.88
    ppo, peak GiB                      1.323       1.326    1.00   1.02 0.98
    generate, whole command s         15.297      15.166    0.99   0.94 1.05
    generate, peak GiB                 0.826       0.820    0.99   1.00 0.99
    --help, CPU s                      0.053       0.076    1.43   1.25 1.61
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from side_by_side import VOCABULARY, word_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM = 15, 3
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RESPONSES = ["--max-new-tokens=40", "--reward=length(target=20)"]
TRAINING = {  # command -> its flags
    "sft": ["--batch-size=8", "--max-length=256", "--eval-share=0"],
    "dpo": ["--batch-size=8", "--max-length=80", "--eval-share=0"],
    "ppo": ["--batch-size=8", "--max-length=80", *RESPONSES],
}

Figures = dict[str, float]  # quantity -> its value in one round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[*TRAINING, "generate", "help"], help="only these commands")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        unpack(args.commit, folder / "commit")
        write_data(folder)
        write_model(folder)
        rounds = []
        for number in range(args.rounds):
            before, after = {}, {}
            for name in args.only or [*TRAINING, "generate", "help"]:
                for figures, tree in ((before, folder / "commit"), (after, ROOT)):
                    figures |= measured(name, tree, folder)
            rounds.append((before, after))
            print(f"\nafter round {number + 1} of {args.rounds}:\n{table(args.commit, rounds)}", flush=True)


def unpack(commit: str, tree: Path) -> None:
    archive = subprocess.run(["git", "archive", commit, "jaxalign"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="data")


def write_data(folder: Path) -> None:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(4, VOCABULARY)}" for _ in range(count))

    rows = {
        "sft": [{"prompt": words(24), "completion": " " + words(draw.randint(20, 200))} for _ in range(400)],
        "dpo": [{"prompt": words(24), "chosen": " " + words(40), "rejected": " " + words(40)} for _ in range(200)],
        "ppo": [{"prompt": words(24)} for _ in range(64)],
    }
    for name, table_rows in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table_rows))


def write_model(folder: Path) -> None:
    """The random model as a Hugging Face folder, folder/model/final, by a step at learning rate 0."""
    from transformers import PreTrainedTokenizerFast

    word_tokenizer(PreTrainedTokenizerFast).save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(MODEL))
    flags = [f"--model=config:{folder / 'config.json'}", f"--tokenizer={folder / 'tokenizer'}"]
    flags += [f"--data={folder / 'sft.jsonl'}", f"--output={folder / 'model'}", "--steps=1", "--eval-share=0"]
    run(ROOT, ["-m", "jaxalign", "sft", *flags, "--optimizer.learning-rate=0"])


def measured(name: str, tree: Path, folder: Path) -> Figures:
    """One process of a command on the code in `tree`, and what it took."""
    if name == "help":
        seconds = [
            [run(tree, code)["cpu"] for code in (["-m", "jaxalign", "--help"], ["-c", "pass"])] for _ in range(5)
        ]
        return {"--help, CPU s": statistics.median(helped - bare for helped, bare in seconds)}
    model = folder / "model" / "final"
    if name == "generate":
        responses = folder / "responses.jsonl"
        responses.unlink(missing_ok=True)  # generate overwrites nothing
        flags = [f"--model={model}", f"--prompts={folder / 'ppo.jsonl'}", f"--output={responses}"]
        taken = run(tree, ["-m", "jaxalign", name, *flags, "--max-new-tokens=128", "--n=4", "--batch-size=32"])
        return {"generate, whole command s": taken["wall"], "generate, peak GiB": taken["peak_gib"]}
    with tempfile.TemporaryDirectory(dir=folder) as output:
        flags = [f"--model={model}", f"--data={folder / name}.jsonl", f"--output={output}", f"--steps={STEPS}"]
        rows_file = Path(output) / "metrics.jsonl"
        taken = run(tree, ["-m", "jaxalign", name, *flags, "--checkpoint.every=0", *TRAINING[name]], rows_file)
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    figures = {f"{name}, s a step": after_warm(rows, "training_seconds" if name == "ppo" else "step_seconds")}
    if name == "ppo":
        figures["ppo, generation s a step"] = after_warm(rows, "generation_seconds")
    return figures | {f"{name}, s to first row": taken["first_row"], f"{name}, peak GiB": taken["peak_gib"]}


def run(tree: Path, arguments: list[str], rows: Path | None = None) -> Figures:
    """Seconds and memory of `python ARGUMENTS` on the code in `tree`; and when the file `rows` has step 1."""
    environment = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": str(tree)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": "", "HF_HUB_OFFLINE": "1"}
    first_row = float("nan")
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], cwd=tree, env=environment, stdout=log, stderr=log)
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            if rows and first_row != first_row and rows.exists() and '"step": 1,' in rows.read_text():
                first_row = time.perf_counter() - start
            time.sleep(0.02)
        wall, (_, status, usage) = time.perf_counter() - start, ended
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(arguments)} failed on {tree}:\n{log.read().decode()[-3000:]}")
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    return {"wall": wall, "cpu": cpu, "peak_gib": peak, "first_row": first_row}


def after_warm(rows: list[dict], field: str) -> float:
    """The median of a field over the steps after the warm ones."""
    return statistics.median(row[field] for row in rows if row["step"] > WARM)


def ratios(rounds: list[tuple[Figures, Figures]], quantity: str) -> list[float]:
    """This tree over the commit, in each round."""
    return [after[quantity] / before[quantity] for before, after in rounds]


def table(commit: str, rounds: list[tuple[Figures, Figures]]) -> str:
    lines = [f"{'':28}{commit[:12]:>12}{'this tree':>12}{'ratio':>8}   of each round"]
    for quantity in rounds[0][0]:
        before, after = (statistics.median(figures[quantity] for figures in side) for side in zip(*rounds, strict=True))
        each = ratios(rounds, quantity)
        line = f"{quantity:28}{before:>12.3f}{after:>12.3f}{statistics.median(each):>8.2f}   "
        lines.append(line + " ".join(f"{ratio:.2f}" for ratio in each))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
