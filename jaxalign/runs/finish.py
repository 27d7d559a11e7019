"""The end of a run: `final/`, a Hugging Face folder with a model card that says where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

import jaxalign
from jaxalign.commands import name_of
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files import huggingface
from jaxalign.models.files.save import save_pretrained
from jaxalign.runs.vocabulary import Vocabulary
from jaxalign.training.metrics import read_rows
from jaxalign.training.state import TrainState

MARK, MARK_FILE = "trained_steps", "jaxalign.json"


def is_finished(output: Path, steps: int) -> bool:
    """Whether `final/` holds the model after that many steps."""
    try:
        return json.loads((Path(output) / "final" / MARK_FILE).read_text())[MARK] == steps
    except (OSError, ValueError, KeyError):
        return False


def export_final(config: Any, model: ModelConfig, vocabulary: Vocabulary, state: TrainState) -> None:
    """Writes `final/`; an older one, of fewer steps, is put aside as `final-<steps>`."""
    final = Path(config.output) / "final"
    put_aside(final)
    export(final, config, model, vocabulary, state.params, int(state.step))


def put_aside(folder: Path) -> None:
    """Renames a folder of fewer steps, if there is one, to `<name>-<steps>`; of several hosts, the first does it."""
    if jax.process_index() == 0 and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-{trained_steps(folder)}"))


def trained_steps(final: Path) -> Any:
    """What an exported folder says of itself."""
    try:
        return json.loads((final / MARK_FILE).read_text())[MARK]
    except (OSError, ValueError, KeyError):
        return "unknown"


def export(directory: Path, config: Any, model: ModelConfig, vocabulary: Vocabulary, params: Any, step: int) -> None:
    """The parameters after `step` as a Hugging Face folder."""
    save_pretrained(
        directory,
        params,
        model,
        huggingface.read_hf_config(config.model),
        tokenizer=vocabulary.tokenizer,
        generation_config=generation_config(config.tokenizer or config.model, vocabulary.terminators),
        model_card=model_card(config, step),
        extra={MARK_FILE: mark(step)},
    )


def mark(step: int) -> dict[str, Any]:
    """What MARK_FILE says of an exported folder."""
    return {MARK: step, "jaxalign": jaxalign.__version__}


def generation_config(source: str, terminators: tuple[int, ...]) -> dict[str, Any]:
    """The source's, and in it the tokens that ended texts in training."""
    ids = terminators[0] if len(terminators) == 1 else list(terminators)
    return huggingface.read_generation_config(source) | {"eos_token_id": ids}


def model_card(config: Any, step: int) -> str:
    rows = [row for row in read_rows(Path(config.output) / "metrics.jsonl") if row["step"] <= step]
    held = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    command = name_of(config)
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
    lines += [f"AdamW at {config.optimizer.learning_rate:g} ({config.optimizer.schedule}), seed {config.seed}.", ""]
    if held:
        lines += ["| step | held-out loss |", "|---|---|"]
        lines += [f"| {at} | {loss:.4f} |" for at, loss in held]
    return "\n".join(lines) + "\n"
