"""DPO, KTO and reward modelling of a 26M-parameter Llama on a CPU: jaxalign beside TRL and Tunix, in one run.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python experiments/benchmarks/preferences_vs_peers.py --rounds 3

The model: hidden 384, 8 layers, 6 heads, MLP 1,600, vocabulary 8,192, untied; fp32, AdamW, 2 threads. A batch is 4
pairs for DPO and reward models, 8 rated responses for KTO; prompt and response have at most 256 tokens together.
`full`: 160 and 96 tokens. `ragged`: log-normal lengths as in hh-rlhf (harmless-base, test; four characters a token),
with median 67 and sigma 1.1 for prompts, 28 and 1.0 for responses, cut to 160 and 96.

The reference is a second model that runs in every step; with `--precompute-reference` the same forward pass would run
once before training, so one epoch costs the same. Tokens are those of all sequences without padding: a pair's prompt
counts twice, also where it is computed once for both responses, and KTO's mismatched responses do not count.
Contenders, speed, memory and the time to the first step are measured as in sft_vs_peers.py. jaxalign's speed is
measured in a second pass over the batches, after it has compiled for their few shapes. TRL runs with its defaults
(gradient checkpointing, no packing). Tunix has DPO only.

Observed (30cd14b, two CPU cores; --rounds 1 --steps 5, jaxalign with remat dots): tokens/s, peak GiB, first step s.

    DPO, full       jaxalign 889, 1.94, 14.4    TRL 757, 1.80, 3.7    Tunix 655, 3.21, 10.7
    KTO, full       jaxalign 666, 1.99, 13.0    TRL 588, 1.82, 4.6
    reward, full    jaxalign 1,292, 1.74, 10.8    TRL 1,337, 1.36, 2.2
    DPO, ragged     jaxalign 624, 1.99, 11.0    shared prompt 810, 1.88, 11.8    TRL 431, 1.77, 2.7
                    Tunix 295, 3.26, 10.5
    KTO, ragged     jaxalign 522, 1.94, 12.1    TRL 296, 1.80, 4.6
    reward, ragged  jaxalign 850, 1.84, 10.6    TRL 675, 1.39, 1.9

So jaxalign has 1.17 (DPO), 1.13 (KTO) and 0.97 (reward) times TRL's speed on full rows; on ragged rows 1.45 (DPO; 1.88
with a shared prompt), 1.76 (KTO) and 1.26 (reward). It has 1.36 times Tunix's speed on full rows and 2.1 times on
ragged ones (2.7 with a shared prompt). Four pairs of some 120 tokens leave little to pack: their 965 tokens take 1,370
places in jaxalign's rows, 1,660 in TRL's, and 960 with shared prompts. Not measured: full rows with a shared prompt.
"""

from __future__ import annotations

import functools
import tempfile

from side_by_side import (
    LEARNING_RATE,
    LENGTH,
    VOCABULARY,
    hf_config,
    in_turns,
    tunix_config,
    word_tokenizer,
)

PAIRS, RATED, PROMPT = 4, 8, 160
END = 2


def rows_of(kind: str, steps: int) -> list[dict[str, list[int]]]:
    """Ids of prompts and of two responses to each, terminators included; the same for every contender."""
    import numpy as np

    rng = np.random.default_rng(0)
    # KTO takes the chosen of one row and the rejected of the next
    count = steps * (RATED if "KTO" in kind else PAIRS) * (2 if "ragged" in kind else 1)

    def ids(median: int, sigma: float, most: int) -> list[int]:
        length = np.clip(np.exp(rng.normal(np.log(median), sigma)), 4, most) if "ragged" in kind else most
        return rng.integers(4, VOCABULARY, int(length)).tolist()

    return [
        {"prompt": ids(67, 1.1, PROMPT)}
        | {side: [*ids(28, 1.0, LENGTH - PROMPT - 1), END] for side in ("chosen", "rejected")}
        for _ in range(count)
    ]


def tokens_of(rows: list[dict], *, rated: bool) -> list[int]:
    """Number of tokens of each row: of both sequences, or of the one that KTO reads."""
    sides = [(side_of(n),) if rated else ("chosen", "rejected") for n in range(len(rows))]
    return [sum(len(row["prompt"]) + len(row[side]) for side in sides[n]) for n, row in enumerate(rows)]


def side_of(number: int) -> str:
    return "rejected" if number % 2 else "chosen"


def jaxalign_preferences(
    rows: list[dict], mark, *, method: str, remat: str, packing: bool, share_prompt: bool = False
) -> None:
    from pathlib import Path

    import numpy as np

    from jaxalign.commands import dpo, kto, reward
    from jaxalign.config.offline import DPOConfig, KTOConfig, RewardConfig
    from jaxalign.config.shared import OptimizerConfig
    from jaxalign.data.batches.groups import GroupBatches, Responses, UnpairedBatches
    from jaxalign.data.batches.plan import Mixture, Plan, iterate
    from jaxalign.data.read.tokens import Examples
    from jaxalign.data.sets.preferences import mismatched
    from jaxalign.models import places
    from jaxalign.models.files.families import model_config
    from jaxalign.training import sharding
    from jaxalign.training.program import compile_step, load_frozen, new_state

    mark("imported", 0)
    rated = method == "kto"
    size = RATED if rated else PAIRS
    kinds = {"dpo": (DPOConfig, dpo), "kto": (KTOConfig, kto), "reward": (RewardConfig, reward)}
    kind, command = kinds[method]
    config = kind(
        model="config:random",  # no file is read
        data="",
        output=Path(),
        batch_size=size,
        # the width of the longest pair; the last token of its prompt is repeated before each response
        max_length=2 * LENGTH - PROMPT + 1 if share_prompt else LENGTH,
        shuffle=False,
        packing=packing or share_prompt,
        remat=remat,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"),
        **({"share_prompt": True} if share_prompt else {}),
    )
    mesh, model = places.make_mesh(), model_config(hf_config().to_dict() | {"architectures": ["LlamaForCausalLM"]})
    program = compile_step(config, command.recipe(config, model, mesh), mesh, steps=1)
    frozen = load_frozen(program)
    state = new_state(config, program, frozen)

    def example(row: dict, side: str) -> tuple[np.ndarray, np.ndarray]:
        whole = [*row["prompt"], *row[side]]
        return np.array(whole), np.arange(len(whole)) >= len(row["prompt"])

    sides = [[side_of(n)] if rated else ["chosen", "rejected"] for n in range(len(rows))]
    examples = Examples.of([example(row, side) for row, wanted in zip(rows, sides, strict=True) for side in wanted])
    columns = {"label": np.array([wanted == ["chosen"] for wanted in sides])} if rated else {}
    responses = Responses(examples, np.arange(len(examples)).reshape(len(rows), -1), columns)
    mixture, plan, steps = Mixture.of(responses, [len(rows)], [None]), Plan.of(config), len(rows) // size
    source = (
        UnpairedBatches(mixture, mismatched(responses, seed=0), plan, steps=steps)
        if rated
        else GroupBatches(mixture, plan, steps=steps)
    )
    counts = tokens_of(rows, rated=rated)
    for again in range(2):  # rows have a few shapes: the first pass compiles for them, the second is measured
        for number, batch in enumerate(iterate(source)):
            state, metrics = program.step(state, frozen, sharding.put_batch(batch, mesh))
            float(metrics["loss"])
            if again or number == 0:
                mark("step", sum(counts[number * size : (number + 1) * size]))


def words(ids: list[int]) -> str:
    """The text that the word tokenizer encodes as these ids; TRL adds the end itself."""
    return "".join(f" w{i}" for i in ids if i != END)


def trl_preferences(rows: list[dict], mark, *, method: str) -> None:
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )

    torch.set_num_threads(2)
    mark("imported", 0)
    rated, size = method == "kto", RATED if method == "kto" else PAIRS
    counts = tokens_of(rows, rated=rated)

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            start = (state.global_step - 1) * size
            mark("step", sum(counts[start : start + size]))

    tokenizer = word_tokenizer(PreTrainedTokenizerFast)
    config = hf_config()
    make = LlamaForCausalLM
    if method == "reward":
        config.num_labels, config.pad_token_id = 1, 0
        make = LlamaForSequenceClassification
    kinds = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "kto": (trl.KTOConfig, trl.KTOTrainer),
        "reward": (trl.RewardConfig, trl.RewardTrainer),
    }
    kind, trainer = kinds[method]

    def text(number: int, row: dict) -> dict:
        if rated:
            response = {"completion": words(row[side_of(number)]), "label": side_of(number) == "chosen"}
            return {"prompt": words(row["prompt"]), **response}
        return {"prompt": words(row["prompt"])} | {side: words(row[side]) for side in ("chosen", "rejected")}

    with tempfile.TemporaryDirectory() as folder:
        args = kind(
            output_dir=folder,
            per_device_train_batch_size=size,
            max_length=LENGTH,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        models = {} if method == "reward" else {"ref_model": LlamaForCausalLM(config)}
        trainer(
            make(config),
            **models,
            args=args,
            train_dataset=Dataset.from_list([text(*numbered) for numbered in enumerate(rows)]),
            processing_class=tokenizer,
            callbacks=[Mark()],
        ).train()


def tunix_dpo(rows: list[dict], mark) -> None:
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    mark("imported", 0)
    config = tunix_config()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    counts = tokens_of(rows, rated=False)

    def padded(sequences: list[list[int]], width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), np.int32)
        for row, sequence in enumerate(sequences):
            place = slice(width - len(sequence), None) if left else slice(0, len(sequence))
            ids[row, place], mask[row, place] = sequence, 1
        return ids, mask

    def batches():
        for start in range(0, len(rows), PAIRS):
            part = rows[start : start + PAIRS]
            inputs = {}
            for name, width, left in (
                ("prompt", PROMPT, True),
                ("chosen", LENGTH - PROMPT, False),
                ("rejected", LENGTH - PROMPT, False),
            ):
                inputs[f"{name}_ids"], inputs[f"{name}_mask"] = padded([row[name] for row in part], width, left=left)
            yield TrainingInput(**inputs)

    class Marked(DPOTrainer):
        def _post_process_train_step(self, aux):
            super()._post_process_train_step(aux)
            start = self.train_steps * PAIRS
            jax.block_until_ready(nnx.state(self.model, nnx.Param))
            mark("step", sum(counts[start : start + PAIRS]))

    with mesh:
        model, reference = Llama3(config, rngs=nnx.Rngs(0)), Llama3(config, rngs=nnx.Rngs(0))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))
        training = DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=len(rows) // PAIRS, beta=0.1)
        Marked(model, reference, optimizer, training).train(batches())


def contenders_of(method: str, *, packing: bool) -> dict:
    ours = functools.partial(jaxalign_preferences, method=method, packing=packing)
    contenders = {
        "jaxalign": functools.partial(ours, remat="blocks"),
        "jaxalign, remat dots": functools.partial(ours, remat="dots"),
        "TRL": functools.partial(trl_preferences, method=method),
    }
    if method == "dpo":
        contenders["jaxalign, remat dots, shared prompt"] = functools.partial(ours, remat="dots", share_prompt=True)
        contenders["Tunix"] = tunix_dpo
    return contenders


CONTENDERS = {
    f"{name}, {kind}": contenders_of(method, packing=kind == "ragged")
    for kind in ("full", "ragged")
    for name, method in (("DPO", "dpo"), ("KTO", "kto"), ("reward", "reward"))
}


if __name__ == "__main__":
    in_turns(__doc__, CONTENDERS, rows_of)
