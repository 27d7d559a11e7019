"""Writes what TRL's trainers do in five optimizer steps on a tiny Llama: the facts that test_trl.py compares with.

    python tests/algorithms/make_trl_golden.py [FILE]        # needs trl

FILE, by default tests/algorithms/golden/trl.npz, has `config` (config.json as text); the tensors that training starts
from under `policy:<name>` and `reference:<name>`, and `head`, a reward model's, in float16 (their exact values); what
the collators gave the trainers, `<part>:input_ids`, `:attention_mask` and `:completion_mask` [steps rows width] with
part `pairs` (the chosen, then the rejected), `rated`, `mismatched` or `scored` (pairs, without a completion_mask),
`labels` and `margins`; and for every run `<run>:<metric>` [steps], as TRL logs it, and `<run>:final:<name>`, some
entries of each tensor after the last step.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "golden" / "trl.npz"
STEPS, PAIRS, ROWS = 5, 4, 8  # PAIRS a batch of DPO, ROWS a batch of KTO
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
    """Token i is the word "w<i>", apart from the special ones; pad is eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, TINY["vocab_size"]))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def draw_rows(count: int, *, columns: tuple[str, ...], seed: int) -> list[dict]:
    """Prompts of 2 to 5 words, each with a response of 1 to 9 in every column."""
    rng = np.random.default_rng(seed)
    text = lambda low, high: " ".join(f"w{i}" for i in rng.integers(3, TINY["vocab_size"], rng.integers(low, high)))  # noqa: E731
    return [{"prompt": text(2, 6)} | {column: " " + text(1, 10) for column in columns} for _ in range(count)]


def draw_weights(config) -> dict[str, np.ndarray]:
    """A random policy, and a reference some way from it, so that no log-ratio is 0."""
    from transformers import LlamaForCausalLM

    rng, drawn = np.random.default_rng(0), {}
    for name, value in LlamaForCausalLM(config).state_dict().items():
        start = rng.normal(float("norm" in name), 0.15, value.shape).astype(np.float16)
        drawn[f"policy:{name}"] = start
        drawn[f"reference:{name}"] = (start + rng.normal(0, 0.03, value.shape)).astype(np.float16)
    head = np.random.default_rng(6).normal(0, 0.15, (1, config.hidden_size))
    return drawn | {"head": head.astype(np.float16)}


def load(config, weights: dict[str, np.ndarray], kind: str):
    """A float32 model of these weights."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(weights[f"{kind}:{name}"]).float() for name in model.state_dict()})
    return model


def load_reward_model(config, weights: dict[str, np.ndarray]):
    """The policy's trunk in float32 with the head."""
    import torch
    from transformers import LlamaForSequenceClassification

    config.num_labels, config.pad_token_id = 1, 0  # torch gives the embedding of a config's pad token no gradient
    model = LlamaForSequenceClassification(config)
    held = {name: weights.get(f"policy:{name}", weights["head"]) for name in model.state_dict()}
    model.load_state_dict({name: torch.tensor(value).float() for name, value in held.items()})
    return model


KEPT = {"loss", "grad_norm", "kl"} | {
    f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")
}
KEPT |= {"rewards/margins", "rewards/accuracies", "accuracy", "margin", "mean_reward"}


def make_trainer(name: str, policy, reference, folder: str):
    """DPO's, KTO's or the reward model's, over just the rows of its steps."""
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
            args=RewardConfig(
                folder, pad_token="<unk>", disable_dropout=True, **options
            ),  # it reads ids: pad is no eos
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
    """Five steps: the batches, logs and final parameters."""
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
    found = {f"{name}:{key}": np.array([entry[key] for entry in logs]) for key in logs[0] if key in KEPT}
    final = {f"{name}:final:{key}": some(value.numpy()) for key, value in trainer.model.state_dict().items()}
    return found | final | batches_of(batches, "scored" if name.startswith("reward") else None)


def batches_of(batches: list[dict], whole: str | None) -> dict[str, np.ndarray]:
    """One array [steps rows width] of every tensor that the collator made, padded with 0."""
    found = {}
    for name in batches[0]:
        part, key = ("mismatched", name[3:]) if name.startswith("KL_") else ("rated", name)
        part = whole or ("pairs" if "label" not in batches[0] else part)
        values = [batch[name].numpy() for batch in batches]
        if name in ("label", "margin"):
            found[name + "s"] = np.stack(values)
            continue
        width = max(value.shape[1] for value in values)
        padded = [np.pad(value, ((0, 0), (0, width - value.shape[1]))) for value in values]
        found[f"{part}:{key}"] = np.stack(padded).astype(np.int16)
    return found


def main(file: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import LlamaConfig

    torch.set_num_threads(1)
    make_config = lambda: LlamaConfig(**TINY)  # noqa: E731  trainers write into theirs
    found = {"config": make_config().to_json_string(use_diff=False), **draw_weights(make_config())}
    for name in RUNS:
        if name.startswith("reward"):
            models = load_reward_model(make_config(), found), None
        else:
            models = tuple(load(make_config(), found, kind) for kind in ("policy", "reference"))
        found |= run(name, *models)
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
