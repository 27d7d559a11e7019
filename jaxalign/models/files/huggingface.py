"""Sources of models: a Hugging Face folder, a hub name, or config:PATH for random weights. Reads config and tokenizer.

Weights are read by `load.py` and written by `save.py`. Only safetensors are read: files of the older formats can run
code when they are opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files.families import model_config

RANDOM = "config:"
_WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]


def is_random(source: str) -> bool:
    """True for config:PATH, a model with random weights."""
    return source.startswith(RANDOM)


def folder(source: str) -> Path:
    """The local folder of a source; a hub name is downloaded into the hub's cache first.

    Raises:
      Mistake: neither a local folder nor a name that the hub knows, or the hub cannot be reached.
    """
    if not source.removeprefix(RANDOM):
        raise Mistake(f"model {source!r} names nothing; give a folder, a hub name (owner/name) or config:PATH")
    path = Path(source.removeprefix(RANDOM)).expanduser()
    if is_random(source):
        if not path.exists():
            raise Mistake(f"{source}: there is no {path}; config: takes a config.json or its folder")
        return path if path.is_dir() else path.parent
    if path.is_dir():
        return path
    if path.exists():
        raise Mistake(f"{source} is a file; name the folder that holds config.json and *.safetensors")
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise Mistake(
            f"{source}: no such folder; a model is a Hugging Face folder, a hub name (owner/name) or config:PATH"
        )
    return _download(source)


def absolute_source(source: str) -> str:
    """The source with a folder as its absolute path, valid from any working directory; a hub name is unchanged."""
    return str(Path(source).expanduser().resolve()) if Path(source).expanduser().is_dir() else source


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise Mistake(
            f"{name!r} is no local folder and could not be fetched from the hub ({type(error).__name__}: {first}). "
            "Check the spelling and the network; gated models need `hf auth login`"
        ) from None


def read_hf_config(source: str) -> dict[str, Any]:
    """The source's config.json, unchanged."""
    path = Path(source.removeprefix(RANDOM)).expanduser()
    if not (is_random(source) and path.is_file()):
        path = folder(source) / "config.json"
    if not path.exists():
        raise Mistake(f"{path.parent} has no config.json; is it a Hugging Face model folder?")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of UTF-8
        raise Mistake(f"{path} is not JSON: {error}; fetch it again") from None
    if not isinstance(content, dict):
        raise Mistake(f"{path} contains a {type(content).__name__}, not the config of a model; fetch it again")
    return content


def read_generation_config(source: str) -> dict[str, Any]:
    """The source's generation_config.json, unchanged; {} if it has none."""
    path = folder(source) / "generation_config.json"
    return _read_json(path) if path.exists() else {}


def read_config(source: str) -> ModelConfig:
    """The neutral config of a source. Raises Mistake, naming the source, when the architecture is not supported."""
    hf_config = read_hf_config(source)
    try:
        return model_config(hf_config)
    except ValueError as error:
        raise Mistake(f"{source}: {error}") from None


def load_tokenizer(source: str) -> Any:
    """The transformers tokenizer of a source."""
    from transformers import AutoTokenizer

    path = folder(source)
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise Mistake(f"{path} has no tokenizer (tokenizer.json); name one with `tokenizer`")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and its dependencies raise errors of many classes
        first = (str(error).strip().splitlines() or [""])[0]
        raise Mistake(
            f"the tokenizer in {path} cannot be read ({type(error).__name__}: {first}); fetch it again, or name "
            "another with `tokenizer`"
        ) from error


def tokenizer_source(model: str, adapter: Path | str | None) -> str:
    """The folder or name whose tokenizer a model is read with: the adapter's, which training left there, or its own."""
    has_one = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    return str(adapter) if has_one else model


def check_fits(tokenizer: Any, model: ModelConfig, source: str) -> None:
    """Raises Mistake if the tokenizer has ids for which the model has no embedding."""
    if len(tokenizer) > model.vocab_size:
        raise Mistake(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the model's vocabulary is {model.vocab_size}; "
            "use the tokenizer that the model was made with"
        )


def terminators(source: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: generation_config.json's, then config.json's, then the tokenizer's eos token.

    Training appends the first one. Models may end texts with another token than the tokenizer's eos, which is why the
    ids of generation_config.json come first.
    """
    config = folder(source) / "config.json"
    ends: list[int] = []
    for settings in (read_generation_config(source), _read_json(config) if config.exists() else {}):
        ids = settings.get("eos_token_id")
        ends += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(int(i) for i in ends))
