"""SFT of a 26M-parameter Llama on a CPU: jaxalign beside TRL, Tunix and a hand-written torch loop, in one run.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python experiments/benchmarks/sft_vs_peers.py --rounds 3

The model: hidden 384, 8 layers, 6 heads, MLP 1,600, vocabulary 8,192, untied. Rows of at most 256 tokens,
8 per batch, fp32, AdamW, 2 threads. `full`: every row has 256 tokens. `ragged`: lengths are log-normal (median 85, 90th
percentile 230, cut at 256), like instructions with responses; tokens are counted without padding, and TRL runs with its
defaults (no packing).

Each contender runs in its own process, in turns, so that noise of the machine hits all alike. Tokens/s is the median
over rounds of tokens / seconds after two warm-up steps. Peak memory is the process's largest resident set, imports
included. Time to the first step is from the end of the imports to the end of the first step, without compilation cache.

Observed (625e148, two CPU cores; --rounds 2 --steps 6, ragged --steps 5): tokens/s, peak GiB, first step s.

    full    jaxalign 1,000, 1.45, 11.6    remat dots 1,071, 1.71, 11.7    without remat 948, 2.55, 12.3
            TRL 1,009, 1.78, 2.7    without checkpointing 1,220, 2.33, 2.4    torch loop 1,579, 2.07, 1.7
            Tunix 822, 3.11, 8.3
    ragged  jaxalign, packed 1,007, 1.46, 11.6    remat dots 1,086, 1.71, 11.7
            TRL 523, 1.75, 2.4    without checkpointing 625, 2.37, 2.1    Tunix 379, 3.16, 8.1

So on full rows jaxalign has 0.99 times the speed of TRL (1.06 with remat dots), 0.63 (0.68) of the torch loop and 1.22
(1.30) of Tunix; on ragged rows 1.93 (2.08) of TRL and 2.66 (2.87) of Tunix. It needs 0.82 (0.96) of TRL's memory and
0.47 (0.55) of Tunix's.

The step's matrix products in JAX, timed one by one, would allow 1,364 tokens/s with recomputation; jaxalign reaches 73%
of that. By the profile of one step of 2.05 s, products of projections and MLP take 1.2 s, the output matrix with its
log-sum-exp 0.2, attention 0.43 (its products run at a third of the others' rate; the rest is softmax, masks and copies
between layouts), and SiLU, norms and AdamW the remainder. The peak is 0.2 GiB of imports, 0.5 of state, 0.35 that the
compiler does not free, and 0.33 of gradients and activations.
"""

from __future__ import annotations

import tempfile

from side_by_side import LEARNING_RATE, LENGTH, VOCABULARY, hf_config, in_turns, pad, tunix_config, word_tokenizer

BATCH = 8


def rows_of(kind: str, steps: int) -> list[list[int]]:
    """Token ids of enough rows for `steps` full batches; the same for every contender."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = [LENGTH] * (steps * BATCH)
    if kind == "ragged":  # mean length: 0.4 of a row
        lengths = np.clip(np.exp(rng.normal(4.44, 0.78, 5 * steps * BATCH // 2)), 8, LENGTH).astype(int).tolist()
    return [rng.integers(4, VOCABULARY, length).tolist() for length in lengths]


def jaxalign_sft(rows: list[list[int]], mark, *, remat: str, packing: bool) -> None:
    from pathlib import Path

    import numpy as np

    from jaxalign.commands.sft import recipe
    from jaxalign.config.offline import SFTConfig
    from jaxalign.config.shared import OptimizerConfig
    from jaxalign.data.batches.plan import Mixture, Plan, iterate
    from jaxalign.data.batches.rows import TrainBatches
    from jaxalign.data.read.tokens import Examples
    from jaxalign.models import places
    from jaxalign.models.files.families import model_config
    from jaxalign.training import sharding
    from jaxalign.training.program import compile_step, new_state

    mark("imported", 0)
    config = SFTConfig(
        model="config:random",  # no file is read
        data="",
        output=Path(),
        batch_size=BATCH,
        max_length=LENGTH,
        shuffle=False,
        packing=packing,
        remat=remat,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"),
    )
    mesh = places.make_mesh()
    model = model_config(hf_config().to_dict() | {"architectures": ["LlamaForCausalLM"]})
    program = compile_step(config, recipe(config, model, mesh), mesh, steps=1)
    state = new_state(config, program, None)

    examples = Examples.of([(np.array(row), np.ones(len(row), bool)) for row in rows])
    source = TrainBatches(Mixture.of(examples, [len(examples)], [None]), Plan.of(config))
    source = source.with_steps(int(source.steps_per_epoch))
    previous = None
    for batch in iterate(source):
        state, metrics = program.step(state, None, sharding.put_batch(batch, mesh))
        if previous is not None:
            float(previous[0]["loss"])
            mark("step", previous[1])
        previous = metrics, int(np.sum(batch.segment_ids > 0))
    float(previous[0]["loss"])
    mark("step", previous[1])


def torch_loop(rows: list[list[int]], mark) -> None:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(2)
    mark("imported", 0)
    model = LlamaForCausalLM(hf_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, weight_decay=0.0)
    for start in range(0, len(rows), BATCH):
        ids, attention = pad(rows[start : start + BATCH])
        ids, attention = torch.tensor(ids), torch.tensor(attention)
        labels = ids.masked_fill(attention == 0, -100)
        loss = model(input_ids=ids, attention_mask=attention, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        mark("step", int(attention.sum()))


def trl_sft(rows: list[list[int]], mark, *, checkpointing: bool) -> None:
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(2)
    mark("imported", 0)

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            start = (state.global_step - 1) * BATCH
            mark("step", sum(map(len, rows[start : start + BATCH])))

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_length=LENGTH,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = SFTTrainer(
            model=LlamaForCausalLM(hf_config()),
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            processing_class=word_tokenizer(PreTrainedTokenizerFast),
            callbacks=[Mark()],
        )
        trainer.train()


def tunix_sft(rows: list[list[int]], mark) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    mark("imported", 0)
    config = tunix_config()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def batches():
        for start in range(0, len(rows), BATCH):
            ids, attention = pad(rows[start : start + BATCH], LENGTH)
            yield TrainingInput(input_tokens=np.array(ids), input_mask=np.array(attention))

    def model_input(batch):
        positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], batch.input_tokens.shape)
        causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None] & (batch.input_mask[:, None, :] > 0)
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": positions,
            "attention_mask": causal,
        }

    class Marked(PeftTrainer):
        def _post_process_train_step(self, aux):
            start = self.train_steps * BATCH
            jax.block_until_ready(nnx.state(self.model, nnx.Param))
            mark("step", sum(map(len, rows[start : start + BATCH])))

    with mesh:
        model = Llama3(config, rngs=nnx.Rngs(0))
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))
        trainer = Marked(model, optimizer, TrainingConfig(eval_every_n_steps=10**9, max_steps=len(rows) // BATCH))
        trainer.with_gen_model_input_fn(model_input).train(batches())


CONTENDERS = {
    "full": {
        "jaxalign": lambda rows, mark: jaxalign_sft(rows, mark, remat="blocks", packing=False),
        "jaxalign, remat dots": lambda rows, mark: jaxalign_sft(rows, mark, remat="dots", packing=False),
        "jaxalign, no remat": lambda rows, mark: jaxalign_sft(rows, mark, remat="none", packing=False),
        "TRL": lambda rows, mark: trl_sft(rows, mark, checkpointing=True),
        "TRL, no checkpointing": lambda rows, mark: trl_sft(rows, mark, checkpointing=False),
        "torch loop": torch_loop,
        "Tunix": tunix_sft,
    },
    "ragged": {
        "jaxalign, packed": lambda rows, mark: jaxalign_sft(rows, mark, remat="blocks", packing=True),
        "jaxalign, packed, remat dots": lambda rows, mark: jaxalign_sft(rows, mark, remat="dots", packing=True),
        "TRL": lambda rows, mark: trl_sft(rows, mark, checkpointing=True),
        "TRL, no checkpointing": lambda rows, mark: trl_sft(rows, mark, checkpointing=False),
        "Tunix": tunix_sft,
    },
}


if __name__ == "__main__":
    in_turns(__doc__, CONTENDERS, rows_of)
