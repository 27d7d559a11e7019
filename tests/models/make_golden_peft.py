"""Writes tests/models/golden_peft/: a tiny Llama, adapters that PEFT made on it, and the logits that PEFT gives.

    python tests/models/make_golden_peft.py        # needs torch and peft

test_peft.py compares with them where torch is absent. One file per variant: `config` and `adapter_config` as text,
the tensors under `base:<name>` and `adapter:<name>` in float16 (their exact values), and `logits` in float32.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny import save_random
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent / "golden_peft"
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 29}
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for variant, settings in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            base, adapter = Path(folder) / "base", Path(folder) / "adapter"
            save_random("llama", base, dtype="float16", **SMALL)
            _make_adapter(base, adapter, settings)
            model = PeftModel.from_pretrained(_load(base), adapter).eval()
            tokens = np.random.default_rng(0).integers(3, 29, (2, 12))
            with torch.no_grad():
                logits = model(torch.tensor(tokens)).logits.numpy()
            tensors = {f"base:{k}": v for k, v in load_file(base / "model.safetensors").items()}
            tensors |= {f"adapter:{k}": v for k, v in load_file(adapter / "adapter_model.safetensors").items()}
            texts = {"config": (base / "config.json").read_text()}
            texts["adapter_config"] = (adapter / "adapter_config.json").read_text()
            texts = {name: json.dumps(json.loads(text)) for name, text in texts.items()}
        np.savez_compressed(GOLDEN / f"{variant}.npz", **texts, logits=logits, **tensors)


def _load(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def _make_adapter(base: Path, adapter: Path, settings: dict) -> None:
    """Writes an adapter with random parameters that float16 represents exactly."""
    torch.manual_seed(1)
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    model = get_peft_model(_load(base), LoraConfig(r=3, lora_alpha=5, target_modules=modules, **settings))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.add_(0.1 * torch.randn_like(x))
    model.save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = ""
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    file = adapter / "adapter_model.safetensors"
    save_file({name: x.astype(np.float16) for name, x in load_file(file).items()}, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
