"""The end of a run: `final/`, a Hugging Face folder with a model card that says where it came from.

A LoRA run writes the merged model, and the adapter in PEFT's format beside it. A reward model is a sequence classifier
to transformers, with its members besides.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jax

import jaxalign
from jaxalign import hosts
from jaxalign.models.adapters.lora import join
from jaxalign.models.adapters.merge import merge_by_layer
from jaxalign.models.files import huggingface
from jaxalign.models.files.peft import save_adapter
from jaxalign.models.files.reward import BASE, CLASSIFIERS, DESCRIPTION, HEADS, MEMBERS, classifier_name
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.files.weights import fingerprint
from jaxalign.run import lock
from jaxalign.run.folder import MARK_FILE, mark, trained_steps
from jaxalign.run.run import Outcome, Run
from jaxalign.run.vocabulary import Vocabulary
from jaxalign.training.metrics import read_rows
from jaxalign.types import PyTree

FLAT = 1e-6  # scores whose standard deviation is below it are equal; dividing by it would turn rounding into scores


@lock.released_on_error
def language_model(run: Run, outcome: Outcome, *, among: str | None = None) -> int:
    """Writes `final/`, and `adapter/` of a LoRA run, once a fit has come to its end; returns the run's exit status.

    Older ones, of fewer steps, are put aside as `final-<steps>`.

    Args:
      run: the run.
      outcome: of its fit.
      among: name of the model among the trained parameters; by default they are the model's, whole or adapters.
    """
    if outcome.is_new:
        trained, step = outcome.state.params, outcome.step
        params = trained if among is None else trained[among]
        if run.lora is not None:
            folder = run.folder / "adapter"
            # else a run that was stopped between the two folders has written it
            if hosts.first_decides(lambda: trained_steps(folder) != step):
                _put_aside(folder)
                save_lora(folder, run, params, step)
            params = merge_by_layer(join(params, outcome.frozen), run.lora)
        save_model(final_folder(run), run, params, step)
    return run.end(outcome)


def save_model(folder: Path, run: Run, params: PyTree, step: int) -> None:
    """Writes whole parameters after `step` as a Hugging Face folder."""
    tokenizer, generation = for_generation(run.config, run.vocabulary)
    dtype = run.export_dtype
    save_pretrained(
        folder,
        params,
        run.model,
        huggingface.read_hf_config(run.config.model) | {"eos_token_id": generation["eos_token_id"]},
        tokenizer=tokenizer,
        generation_config=generation,
        model_card=model_card(run.config, run.command, step, dtype),
        extra={MARK_FILE: mark(step)},
        dtype=dtype,
    )


def save_lora(folder: Path, run: Run, adapter: PyTree, step: int) -> None:
    """Writes the adapter after `step` in PEFT's format, with the mark, the tokenizer and what else `final/` carries."""
    assert run.lora is not None
    tokenizer, generation = for_generation(run.config, run.vocabulary)

    def write(partial: Path) -> None:
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(run.config, run.command, step, "float32"))

    base = huggingface.absolute_source(run.config.model)
    trained_on = {} if huggingface.is_random(run.config.model) else {"base": fingerprint(run.config.model)}
    extra = {MARK_FILE: mark(step) | trained_on, "generation_config.json": generation}
    save_adapter(folder, adapter, run.lora, run.model, base_model=base, extra=extra, besides=write)


def reward_model(folder: Path, run: Run, params: PyTree, statistics: dict[str, Any], step: int) -> None:
    """Writes a folder that `models/files/reward.py` and transformers read.

    transformers sees a single raw score: the mean head for heads on one trunk; the first member, merged, for an
    ensemble of adapters, whose other members lie in PEFT's format beside it and name their base.

    Args:
      folder: made anew.
      run: the run; its model is the trunk.
      params: whole parameters, as models/heads.py names them.
      statistics: "mean" and "std" [M] of each member's scores of the reference responses and, of a model that scores
        steps, the "separator" behind each.
      step: steps that it was trained for.
    """
    from safetensors.numpy import save_file

    config, vocabulary = run.config, run.vocabulary
    is_ensemble_of_adapters = "members" in params and config.members > 1
    all_heads, dtype = hosts.gather(params["head"]), run.export_dtype
    tokenizer, pad = with_pad_token(vocabulary)
    description = {
        "members": len(all_heads),
        "rule": config.combine,
        "mean": statistics["mean"],
        "std": [x if x > FLAT else 1.0 for x in statistics["std"]],
        "as_chat": config.as_chat,
        "max_length": config.max_length,
    }
    if statistics.get("separator") is not None:
        description["separator"] = statistics["separator"]
    if is_ensemble_of_adapters:
        description |= {"base": huggingface.absolute_source(config.model), "quantise": config.lora.quantise}

    def write_members(partial: Path) -> None:
        if jax.process_index() == 0:
            (partial / MEMBERS).mkdir()
            save_file({"heads": all_heads}, partial / MEMBERS / HEADS)
            if is_ensemble_of_adapters:
                base = {"fingerprint": fingerprint(config.model)}
                (partial / MEMBERS / BASE).write_text(json.dumps(base) + "\n")
        for m in range(len(all_heads) if is_ensemble_of_adapters else 0):
            assert run.lora is not None
            member = jax.tree.map(lambda x, m=m: x[m], params["members"])
            save_adapter(partial / MEMBERS / str(m), member, run.lora, run.model, base_model=description["base"])

    hf_config = huggingface.read_hf_config(config.model)
    generation = generation_config(config.tokenizer or config.model, vocabulary.terminators)
    architecture = hf_config["architectures"][0]
    if architecture not in CLASSIFIERS:
        architecture = classifier_name(architecture)
    save_pretrained(
        folder,
        _first_member(params, run),
        run.model,
        hf_config
        | {"architectures": [architecture], "pad_token_id": pad, "eos_token_id": generation["eos_token_id"]}
        | {"id2label": {"0": "reward"}, "label2id": {"reward": 0}},
        tokenizer=tokenizer,
        generation_config=generation,
        model_card=model_card(config, run.command, step, dtype),
        extra={DESCRIPTION: description, MARK_FILE: mark(step)},
        head=all_heads[:1] if is_ensemble_of_adapters else all_heads.mean(axis=0, keepdims=True),
        besides=write_members,
        dtype=dtype,
    )


def final_folder(run: Run) -> Path:
    """`final/` of a run; an older one has been put aside."""
    final = run.folder / "final"
    _put_aside(final)
    return final


def with_pad_token(vocabulary: Vocabulary) -> tuple[Any, int]:
    """The tokenizer with a pad token that ends no text: transformers reads the score at the last other token."""
    tokenizer = vocabulary.tokenizer
    ends = {*vocabulary.terminators, tokenizer.eos_token_id}
    usable = [i for i in (tokenizer.pad_token_id, *_unused(tokenizer)) if i is not None and i not in ends]
    # a vocabulary with nothing but an eos token: the last word, which texts that were not cut do not end with
    return _padded_with(tokenizer, usable[0] if usable else max(set(tokenizer.get_vocab().values()) - ends))


def for_generation(config: Any, vocabulary: Vocabulary) -> tuple[Any, dict[str, Any]]:
    """(tokenizer, content of generation_config.json) that name every token which ends a text, and one to pad with.

    A tokenizer without a pad token gets one, so that whoever loads the folder can generate for several prompts at once.
    """
    tokenizer, ends = vocabulary.tokenizer, vocabulary.terminators
    generation = generation_config(config.tokenizer or config.model, ends)
    if tokenizer.pad_token_id is None:
        usable = [i for i in _unused(tokenizer) if i is not None and i not in ends]
        tokenizer, _ = _padded_with(tokenizer, usable[0] if usable else ends[-1])
    if generation.get("pad_token_id") is None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    return tokenizer, generation


def _unused(tokenizer: Any) -> tuple[int | None, ...]:
    """Special tokens that stand within no response."""
    return tokenizer.unk_token_id, tokenizer.bos_token_id


def _padded_with(tokenizer: Any, pad: int) -> tuple[Any, int]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer, pad


def generation_config(source: str, terminators: tuple[int, ...]) -> dict[str, Any]:
    """The source's, and in it the tokens that ended texts in training."""
    ids = terminators[0] if len(terminators) == 1 else list(terminators)
    return huggingface.read_generation_config(source) | {"eos_token_id": ids}


def _first_member(params: PyTree, run: Run) -> PyTree:
    """The trunk, with the first member's adapters merged into it."""
    if "members" not in params:
        return params["model"]
    return merge_by_layer(join(jax.tree.map(lambda x: x[0], params["members"]), params["model"]), run.lora)


def _put_aside(folder: Path) -> None:
    """Renames a folder of fewer steps, if there is one, to `<name>-<steps>`; of several hosts, the first does it."""

    def rename() -> bool:
        lock.check(folder.parent)
        if exists := folder.exists():
            steps = trained_steps(folder)
            folder.rename(folder.with_name(f"{folder.name}-{'unknown' if steps is None else steps}"))
        return exists

    hosts.first_decides(rename)


def model_card(config: Any, command: str, step: int, dtype: str = "float32") -> str:
    """README.md of an exported folder: where the model comes from, and its held-out losses."""
    metrics = Path(config.output) / "metrics.jsonl"
    rows = [row for row in read_rows(metrics) if row["step"] <= step] if metrics.exists() else []
    losses = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [jaxalign, {command}]",
        "---",
        "",
        f"# {Path(config.output).name}",
        "",
    ]
    data = ", ".join(Path(part.strip()).name for part in config.data.split(","))  # of a mixture, with its weights
    lines += [f"{Path(config.model).name} after {step} steps of `{command}` on {data}"]
    lines += [
        f"with jaxalign {jaxalign.__version__}: batches of {config.batch_size}, at most {config.max_length} tokens,"
    ]
    lines += [f"AdamW at {config.peak_learning_rate:g} ({config.optimizer.schedule}), seed {config.seed}."]
    lines += [f"The weights are {dtype}.", ""]
    if losses:
        lines += ["| step | held-out loss |", "|---|---|"]
        lines += [f"| {at} | {loss:.4f} |" for at, loss in losses]
    return "\n".join(lines) + "\n"
