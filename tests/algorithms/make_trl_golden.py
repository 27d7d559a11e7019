"""Writes five optimizer steps of TRL's trainers on a tiny Llama, with which test_trl.py compares ours.

    python tests/algorithms/make_trl_golden.py [FILE]        # needs trl

Arrays of FILE, by default tests/algorithms/golden/trl.npz:
  config: config.json as text.
  policy:<name>, reference:<name>, head: initial tensors, and a reward model's head, in float16 (their exact values).
  <part>:input_ids, :attention_mask, :completion_mask [steps rows width], labels, margins: the collators' batches. Parts
    are `pairs` (the chosen, then the rejected), `rated`, `mismatched` and `scored` (pairs without completion_mask).
  <run>:<metric> [steps]: metrics as TRL logs them.
  <run>:final:<name>: some entries of each tensor after the last step.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "golden" / "trl.npz"
STEPS, PAIRS, ROWS = 5, 4, 8  # batches have PAIRS pairs for DPO, ROWS responses for KTO
RUNS = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "apo_zero": {"loss_type": "apo_zero"},
    "kto": {"loss_type": "kto", "desirable_weight": 0.75, "undesirable_weight": 1.5},
    "reward": {},
    "reward_graded": {"center_rewards_coefficient": 0.01},
}
SHARED = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0, "lr_scheduler_type": "linear"}
ON_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "train_sampling_strategy": "sequential"}
QUIET = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def some(tensor: np.ndarray) -> np.ndarray:
    """About 60 entries, spread over the tensor."""
    flat = np.ravel(tensor)
    return flat[:: max(len(flat) // 60, 1)]


def words_tokenizer():
    """Tokenizer whose token i is the word "w<i>", except tokens 0 to 2; pad is eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, TINY["vocab_size"]))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def draw_rows(count: int, *, columns: tuple[str, ...], seed: int) -> list[dict]:
    """Prompts of 2 to 5 words, each with a response of 1 to 9 words in every column."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, TINY["vocab_size"], rng.integers(low, high)))

    return [{"prompt": text(2, 6)} | {column: " " + text(1, 10) for column in columns} for _ in range(count)]


def draw_weights(config) -> dict[str, np.ndarray]:
    """A random policy, a reference at some distance, so that no log-ratio is 0, and a reward model's head."""
    from transformers import LlamaForCausalLM

    rng, drawn = np.random.default_rng(0), {}
    for name, value in LlamaForCausalLM(config).state_dict().items():
        start = rng.normal(float("norm" in name), 0.15, value.shape).astype(np.float16)
        drawn[f"policy:{name}"] = start
        drawn[f"reference:{name}"] = (start + rng.normal(0, 0.03, value.shape)).astype(np.float16)
    head = np.random.default_rng(6).normal(0, 0.15, (1, config.hidden_size))
    return drawn | {"head": head.astype(np.float16)}


def load(config, weights: dict[str, np.ndarray], kind: str):
    """The policy or the reference (`kind`) as a float32 model."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(weights[f"{kind}:{name}"]).float() for name in model.state_dict()})
    return model


def load_reward_model(config, weights: dict[str, np.ndarray]):
    """A float32 reward model: the policy's trunk with the head."""
    import torch
    from transformers import LlamaForSequenceClassification

    config.num_labels, config.pad_token_id = 1, 0  # torch gives the embedding of a config's pad token no gradient
    model = LlamaForSequenceClassification(config)
    tensors = {name: weights.get(f"policy:{name}", weights["head"]) for name in model.state_dict()}
    model.load_state_dict({name: torch.tensor(value).float() for name, value in tensors.items()})
    return model


METRICS = {"loss", "grad_norm", "kl"} | {
    f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")
}
METRICS |= {"rewards/margins", "rewards/accuracies", "accuracy", "margin", "mean_reward"}


def make_trainer(name: str, policy, reference, folder: str):
    """Trainer of DPO, KTO or a reward model, with exactly the rows of its steps as data."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

    if name.startswith("reward"):
        rows = draw_rows(STEPS * PAIRS, columns=("chosen", "rejected"), seed=4)
        margins = np.random.default_rng(5).integers(0, 4, len(rows)) / 3
        if name == "reward_graded":
            rows = [row | {"margin": float(margin)} for row, margin in zip(rows, margins, strict=True)]
        options = {**RUNS[name], **SHARED, **ON_CPU, **QUIET, "per_device_train_batch_size": PAIRS, "max_steps": STEPS}
        return RewardTrainer(
            policy,
            # padding is found by comparing ids, so pad must not be eos
            args=RewardConfig(folder, pad_token="<unk>", disable_dropout=True, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=words_tokenizer(),
        )
    if name == "kto":
        config, trainer, size = KTOConfig, KTOTrainer, ROWS
        rows = draw_rows(STEPS * ROWS, columns=("completion",), seed=1)
        labels = np.random.default_rng(2).random(len(rows)) < 0.5
        rows = [row | {"label": bool(label)} for row, label in zip(rows, labels, strict=True)]
    else:
        config, trainer, size = DPOConfig, DPOTrainer, PAIRS
        rows = draw_rows(STEPS * PAIRS, columns=("chosen", "rejected"), seed=3)
    options = {**RUNS[name], **SHARED, **ON_CPU, **QUIET, "per_device_train_batch_size": size, "max_steps": STEPS}
    options["beta"] = 0.1
    return trainer(
        policy,
        reference,
        args=config(folder, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=words_tokenizer(),
    )


def run(name: str, policy, reference) -> dict[str, np.ndarray]:
    """Runs five steps; returns the batches, the logged metrics and the final parameters."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, policy, reference, folder)
        batches, collate = [], trainer.data_collator

        def recorded(examples: list) -> dict:
            batches.append(collate(examples))
            return batches[-1]

        trainer.data_collator = recorded
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(batches) == STEPS, f"{len(logs)} logs of {len(batches)} batches"
    metrics = {f"{name}:{key}": np.array([entry[key] for entry in logs]) for key in logs[0] if key in METRICS}
    final = {f"{name}:final:{key}": some(value.numpy()) for key, value in trainer.model.state_dict().items()}
    return metrics | final | batches_of(batches, "scored" if name.startswith("reward") else None)


def batches_of(batches: list[dict], whole: str | None) -> dict[str, np.ndarray]:
    """Array [steps rows width] of each tensor that the collator made, padded with 0."""
    arrays = {}
    for name in batches[0]:
        part, key = ("mismatched", name[3:]) if name.startswith("KL_") else ("rated", name)
        part = whole or ("pairs" if "label" not in batches[0] else part)
        values = [batch[name].numpy() for batch in batches]
        if name in ("label", "margin"):
            arrays[name + "s"] = np.stack(values)
            continue
        width = max(value.shape[1] for value in values)
        padded = [np.pad(value, ((0, 0), (0, width - value.shape[1]))) for value in values]
        arrays[f"{part}:{key}"] = np.stack(padded).astype(np.int16)
    return arrays


def main(file: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import LlamaConfig

    torch.set_num_threads(1)

    def make_config() -> LlamaConfig:  # trainers write into theirs, so each has its own
        return LlamaConfig(**TINY)

    arrays = {"config": make_config().to_json_string(use_diff=False), **draw_weights(make_config())}
    for name in RUNS:
        if name.startswith("reward"):
            models = load_reward_model(make_config(), arrays), None
        else:
            models = tuple(load(make_config(), arrays, kind) for kind in ("policy", "reference"))
        arrays |= run(name, *models)
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
