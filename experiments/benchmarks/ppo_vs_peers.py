"""Whole PPO updates of a 26M-parameter Llama on a CPU: jaxalign beside TRL and Tunix, in one run.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python -m venv trl112 && trl112/bin/pip install torch==2.13.0 numpy && trl112/bin/pip install trl==1.12.0
    python experiments/benchmarks/ppo_vs_peers.py --rounds 3 --steps 6 --trl-python trl112/bin/python

The model: hidden 384, 8 layers, 6 heads, MLP 1,600, vocabulary 8,192, untied; fp32, AdamW, 2 threads. The reference,
the reward model and the critic are separate models of the same size. A step is a whole PPO iteration: the policy draws
64 tokens at temperature 1 for each of 8 prompts of 64 tokens, the four models process them, and 4 epochs of one
optimizer update each train policy and critic. No response ends early: TRL generates past terminators by default, Tunix
has a terminator that no token equals, jaxalign has none. A step counts 1,024 tokens, those of prompts and responses,
once. Contenders, speed, memory and the time to the first step are measured as in sft_vs_peers.py.

jaxalign runs all of `jaxalign ppo` except metrics, checkpoints and export; as there, the reward model reads text, and
the critic starts from it. TRL 1.12 is the last version with PPO. Tunix 0.1.7's PPO needs models that accept segment
ids, and its Llama does not: a subclass here accepts and ignores them, which is right without packing.

Observed (23f6c7c, 2 cores, --rounds 1 --steps 4; a smoke figure, not a median of several):

                                      tokens/s   peak GiB
    jaxalign                               120       2.06
    jaxalign, remat dots                   131       2.23
    jaxalign, remat none                   111       2.99
    TRL 1.12                               118       2.33
    Tunix 0.1.7                             78       3.81

So jaxalign has 1.02 times TRL's speed and 1.54 times Tunix's with remat blocks, 1.11 and 1.68 times with remat dots, in
less memory than either. A step is about 28 forward passes over its tokens, and 8 more with remat blocks. Its matrix
products alone take about 5 of the 8 seconds, so two cores cannot reach three times TRL in fp32 without doing less work.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from side_by_side import (
    HIDDEN,
    LEARNING_RATE,
    VOCABULARY,
    hf_config,
    in_turns,
    tunix_config,
    word_tokenizer,
)

ROWS, PROMPT, NEW, EPOCHS = 8, 64, 64, 4
TOKENS = ROWS * (PROMPT + NEW)


def rows_of(kind: str, steps: int) -> list[list[list[int]]]:
    """Ids of the prompts of each step, the same for every contender."""
    import numpy as np

    return np.random.default_rng(0).integers(4, VOCABULARY, (steps, ROWS, PROMPT)).tolist()


def words(ids: list[int]) -> str:
    """The text that the word tokenizer encodes as these ids."""
    return " ".join(f"w{i}" for i in ids)


def jaxalign(passes: list, mark, *, remat: str) -> None:
    import dataclasses

    from jaxalign.commands import on_policy, ppo
    from jaxalign.config.on_policy import PPOAlgorithm, PPOConfig
    from jaxalign.config.shared import MeshConfig, OptimizerConfig
    from jaxalign.run.run import Run
    from jaxalign.training.compiled import CompiledStep
    from jaxalign.training.program import compile_step, load_frozen, new_state
    from jaxalign.training.sharding import put_batch

    mark("imported", 0)
    with tempfile.TemporaryDirectory() as folder:
        policy, reward_model, prompts = (Path(folder) / name for name in ("policy", "reward", "prompts.jsonl"))
        write_models(policy, reward_model)
        prompts.write_text("".join(json.dumps({"prompt": words(ids)}) + "\n" for rows in passes for ids in rows))
        config = PPOConfig(
            model=str(policy),
            data=str(prompts),
            output=Path(folder) / "run",
            reward=f"reward_model(path={str(reward_model)!r})",
            steps=len(passes),
            batch_size=ROWS,
            max_length=PROMPT + NEW,
            max_new_tokens=NEW,
            shuffle=False,
            remat=remat,
            mesh=MeshConfig(data=1, fsdp=1),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant"),
            algorithm=PPOAlgorithm(epochs=EPOCHS),
        )
        config.output.mkdir()
        run = Run.read(config, "ppo", exists=False)
        run = dataclasses.replace(run, vocabulary=run.vocabulary._replace(terminators=()))
        recipe = ppo.recipe(config, run.model, run.mesh)
        prompting = on_policy.load_prompts(config, run, recipe)
        to_batch = functools.partial(ppo.to_batch, None, on_policy.count_rows(config, run.mesh, responses=config.n))
        responses = on_policy.rollouts(config, run, prompting, to_batch)
        program = compile_step(config, recipe, run.mesh, steps=len(passes))
        frozen = load_frozen(program)
        state = new_state(config, program, frozen)
        step = CompiledStep(program.step)
        for number in range(len(passes)):
            batch, _ = responses(state.params["policy"], number)
            state, metrics = step(state, frozen, put_batch(batch, run.mesh))
            assert int(metrics["tokens"]) == TOKENS  # waits for the device
            mark("step", TOKENS)


def write_models(policy: Path, reward_model: Path) -> None:
    """Writes the folders of a random policy and a random reward model."""
    import jax
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from jaxalign.models import heads
    from jaxalign.models.decoder.decoder import init_params
    from jaxalign.models.files.families import model_config
    from jaxalign.models.files.save import save_pretrained

    described = hf_config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    model, tokenizer = model_config(described), word_tokenizer(PreTrainedTokenizerFast)
    save_pretrained(policy, init_params(model, jax.random.key(0)), model, described, tokenizer=tokenizer)
    trunk = heads.trunk_config(model)
    one_label = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    head = np.asarray(heads.init_head(jax.random.key(2), 1, HIDDEN))
    params = init_params(trunk, jax.random.key(1))
    save_pretrained(reward_model, params, trunk, described | one_label, tokenizer=tokenizer, head=head)


def trl(passes: list, mark) -> None:
    import torch
    from datasets import Dataset
    from transformers import (
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(2)
    mark("imported", 0)

    class Policy(LlamaForCausalLM):
        def generate(self, **options):
            output = super().generate(**options)
            assert output.sequences.shape == (ROWS, PROMPT + NEW)
            return output

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            mark("step", TOKENS)

    scoring = hf_config()
    scoring.num_labels = 1
    reward_model, critic = (LlamaForSequenceClassification(scoring) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            num_train_epochs=1,
            num_ppo_epochs=EPOCHS,
            response_length=NEW,
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        PPOTrainer(
            args,
            word_tokenizer(PreTrainedTokenizerFast),
            model=Policy(hf_config()),
            ref_model=None,  # a copy
            reward_model=reward_model,
            value_model=critic,
            train_dataset=Dataset.from_list([{"input_ids": ids} for rows in passes for ids in rows]),
            callbacks=[Mark()],
        ).train()


def tunix(passes: list, mark) -> None:
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from transformers import PreTrainedTokenizerFast
    from tunix.models.llama3.model import Llama3
    from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig
    from tunix.rl.utils import create_critic_model

    mark("imported", 0)

    class Llama(Llama3):
        def __call__(self, input_tokens, positions, cache, attention_mask, segment_ids=None):
            return super().__call__(input_tokens, positions, cache, attention_mask)

    class Marked(PPOLearner):
        def _run_global_step(self, *args):
            super()._run_global_step(*args)
            for trainer in (self.rl_cluster.actor_trainer, self.rl_cluster.critic_trainer):
                jax.block_until_ready(nnx.state(trainer.model))
                assert trainer.train_steps == EPOCHS * self.rl_cluster.global_steps + EPOCHS
            mark("step", TOKENS)

        def _generate_and_compute_advantage(self, *args):
            example = super()._generate_and_compute_advantage(*args)
            assert example.prompt_ids.shape[1] == PROMPT and example.completion_ids.shape == (ROWS, NEW)
            return example

    def adamw():
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0))

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        policy, reference = (Llama(tunix_config(), rngs=nnx.Rngs(0)) for _ in range(2))
        critic, reward_model = (create_critic_model(policy, seed) for seed in (1, 2))
        cluster = RLCluster(
            actor=policy,
            critic=critic,
            reference=reference,
            reward=reward_model,
            tokenizer=word_tokenizer(PreTrainedTokenizerFast),
            cluster_config=ClusterConfig(
                role_to_mesh=dict.fromkeys(Role, mesh),
                training_config=RLTrainingConfig(
                    actor_optimizer=adamw(),
                    critic_optimizer=adamw(),
                    eval_every_n_steps=10**9,
                    max_steps=len(passes) * EPOCHS,
                    mini_batch_size=ROWS,
                ),
                rollout_config=RolloutConfig(
                    max_tokens_to_generate=NEW,
                    max_prompt_length=PROMPT,
                    kv_cache_size=PROMPT + NEW,
                    temperature=1.0,
                    eos_tokens=[VOCABULARY],  # no token
                ),
            ),
        )
        data = [{"prompts": np.array([words(ids[1:]) for ids in rows])} for rows in passes]  # it adds a first token
        Marked(cluster, PPOConfig(num_iterations=EPOCHS)).train(data)


CONTENDERS = {
    "PPO": {
        "jaxalign": functools.partial(jaxalign, remat="blocks"),
        "jaxalign, remat dots": functools.partial(jaxalign, remat="dots"),
        "jaxalign, remat none": functools.partial(jaxalign, remat="none"),
        "TRL": trl,
        "Tunix": tunix,
    }
}


if __name__ == "__main__":
    in_turns(__doc__, CONTENDERS, rows_of)
