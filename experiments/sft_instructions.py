"""SFT of a real 260K-parameter story teller on instructions: it learns the form of an assistant's short responses.

Paper:     Taori et al. 2023 (Alpaca), https://crfm.stanford.edu/2023/03/13/alpaca.html: the template and the recipe.
Command:   python experiments/sft_instructions.py FOLDER --output runs
           FOLDER holds models/stories260K (Karpathy's TinyStories Llama, as a Hugging Face folder) and
           llms-from-scratch/instruction-data.jsonl.gz (1,100 short instructions of rasbt/LLMs-from-scratch).
Hardware:  two CPU cores, fp32; any TPU or GPU.
Expected:  the model learns the form, not the facts: held-out loss of the responses falls by more than a nat a token,
           and responses end by themselves.
Observed:  (c9b469a, two CPU cores) held-out loss 4.80 at the start, 2.14 after 50 steps, 1.98 after 101; accuracy of
           the responses' tokens 0.21, 0.51, 0.56. Of the responses to four sample prompts none ends by itself before
           training, three do after it; they have the form of an answer but are nonsense ("2000 meters is 0000000000
           meters."). Ten epochs reach 1.88 at step 100 and overfit from there (1.92 at step 252).
"""

import argparse
from pathlib import Path

from jaxalign.commands import sft
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import BestCheckpointConfig, OptimizerConfig


def instructions(folder: Path, output: Path) -> SFTConfig:
    """Four epochs over a thousand instructions, with a seeded 5 % held out."""
    return SFTConfig(
        model=str(folder / "models" / "stories260K"),
        data=str(folder / "llms-from-scratch" / "instruction-data.jsonl.gz"),
        output=output / "sft-instructions",
        chat_template="alpaca",
        epochs=4,
        batch_size=8,
        max_length=512,
        eval_every=50,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        checkpoint=BestCheckpointConfig(every=200, keep_best=1),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    args = parser.parse_args()
    return sft.main(instructions(args.folder, args.output))


if __name__ == "__main__":
    raise SystemExit(main())
