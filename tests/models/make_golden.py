"""Writes tests/models/golden/: tiny checkpoints of every family with the logits that transformers gives for them.

    python tests/models/make_golden.py        # needs torch

test_families.py compares with them where torch is absent. One file per family: `config` (config.json as text), the
tensors under `tensor:<name>` in float16 (their exact values), and `logits` of `tokens` in float32.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from tiny import TINY, save_random
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 29}


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, values in TINY.items():
        small = {"n_embd": 16, "vocab_size": 29} if values["model_type"] == "gpt2" else SMALL
        with tempfile.TemporaryDirectory() as folder:
            save_random(name, folder, dtype="float16", **small)
            config = json.loads((Path(folder) / "config.json").read_text())
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            tokens = np.random.default_rng(0).integers(3, 29, (2, 12))
            with torch.no_grad():
                logits = model(torch.tensor(tokens)).logits.numpy()
            tensors = {f"tensor:{k}": v for k, v in load_file(Path(folder) / "model.safetensors").items()}
        np.savez_compressed(GOLDEN / f"{name}.npz", config=json.dumps(config), tokens=tokens, logits=logits, **tensors)


if __name__ == "__main__":
    main()
