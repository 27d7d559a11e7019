"""`jaxalign reward`: a model and compared responses in, a model that scores responses out."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxalign.algorithms.reward import check_loss, response_scores, reward
from jaxalign.data import groups, preferences
from jaxalign.data.groups import GroupBatches, GroupPlan
from jaxalign.losses.inputs import input_names
from jaxalign.losses.mixture import select_loss
from jaxalign.losses.ranking import RANKING_LOSSES
from jaxalign.models import huggingface
from jaxalign.models.decoder import make_decoder
from jaxalign.models.lora import join
from jaxalign.models.merge import merge_by_layer
from jaxalign.models.save import gather, save_pretrained
from jaxalign.runs import finish, train
from jaxalign.runs.config import RewardConfig
from jaxalign.runs.program import Method
from jaxalign.runs.sft import data_options
from jaxalign.training.sharding import put_batch
from jaxalign.training.state import TrainState

PAIRWISE = {"chosen_scores", "rejected_scores"}


def run(config: RewardConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "reward", _gather)


def _gather(config: RewardConfig, starts: bool) -> train.Task:
    loss = select_loss(config.algorithm.loss, RANKING_LOSSES)
    check_loss(loss)
    base = train.load_base(config, starts=starts)
    names = set(input_names(loss))
    data = preferences.load(
        config.data,
        base.vocabulary.tokenizer,
        data_options(config, base.vocabulary.terminators),
        kind=preferences.PAIRS if names & PAIRWISE else preferences.preference_formats.RANKED,
        eval_spec=config.eval_data,
        as_chat=config.as_chat,
    )
    if "margins" in names and "margin" not in data.responses.columns:
        raise ValueError(f"--algorithm.loss {config.algorithm.loss}: the data have no margins; take bradley_terry")
    unit = base.mesh.shape["data"] * base.mesh.shape["fsdp"] * config.microbatches
    plan = GroupPlan(config.batch_size, config.max_length, unit, config.packing, config.shuffle, config.seed)
    batches = GroupBatches(data.train, plan, steps=1, **train.host())
    batches.steps = train.count_steps(config, batches.groups_per_epoch() / config.batch_size)
    held_out = groups.eval_batches(data.held_out, plan, **train.host())
    train.check_held_out(config, held_out)
    return train.Task(
        config,
        base,
        Method(lambda graphdef, _: reward(graphdef, loss=loss), heads=config.members),
        batches,
        held_out,
        shapes=batches.layout.shapes,
        fingerprint=data.responses.fingerprint(),
        prompts=[],
        export=_export,
    )


def _export(task: train.Task, state: TrainState, frozen: Any) -> None:
    """`final/`: a sequence classifier whose score is the members' mean, the members, and how scores are normalised."""
    from safetensors.numpy import save_file

    config, base, step = task.config, task.base, int(state.step)
    model, head = state.params["model"], state.params["head"]
    if base.lora is not None:
        model = join(model, frozen)
    found = _scores(task, model, head)
    if base.lora is not None:
        model = merge_by_layer(model, base.lora)
    members = gather(head)
    tokenizer, pad = _padded(base.vocabulary)
    hf = huggingface.read_hf_config(config.model)
    name = hf["architectures"][0].replace("ForCausalLM", "").replace("LMHeadModel", "")
    hf |= {"architectures": [f"{name}ForSequenceClassification"], "id2label": {"0": "reward"}, "pad_token_id": pad}
    hf |= {"label2id": {"reward": 0}, "num_labels": 1}
    described = {"rule": "mean", "members": len(members), "mean": float(found.mean()), "std": float(found.std())}
    final = Path(config.output) / "final"
    finish.put_aside(final)
    staged = final.with_name("final.staged")
    save_pretrained(
        staged,
        model,
        base.model,
        hf,
        tokenizer=tokenizer,
        model_card=finish._model_card(config, step),
        extra={"reward.json": described, finish.MARK_FILE: finish.mark(step)},
        head=members.mean(axis=0, keepdims=True),
    )
    if jax.process_index() == 0:
        save_file({"members": members}, staged / "members.safetensors")
        os.replace(staged, final)


def _scores(task: train.Task, model: Any, head: jax.Array) -> np.ndarray:
    """The members' mean of every held-out response; of the training batches' where nothing is held out."""
    graphdef, _ = make_decoder(
        task.base.model,
        param_dtype=task.config.param_dtype,
        lora=task.base.lora,
        quantise=task.config.lora.quantise,
    )

    @jax.jit
    def scores(model: Any, head: jax.Array, batch: Any) -> jax.Array:
        return response_scores(nnx.merge(graphdef, model), head, batch).mean(axis=-1)

    found = []
    for batch in task.held_out or (task.batches[i] for i in range(task.batches.steps)):
        batch = put_batch(batch, task.base.mesh)
        found.append(gather(scores(model, head, batch))[gather(batch.present)])
    return np.concatenate(found)


def _padded(vocabulary: Any) -> tuple[Any, int]:
    """The tokenizer and a pad token that ends no text: transformers reads the score at the last other token."""
    tokenizer = copy.deepcopy(vocabulary.tokenizer)
    for token in (tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in vocabulary.terminators:
            tokenizer.pad_token = token
            return tokenizer, tokenizer.pad_token_id
    raise ValueError("the tokenizer has no token to pad with that ends no text; give it a pad token of its own")
