"""Sources of models: a Hugging Face folder, a hub name, or config:PATH for random weights. Reads config and tokenizer.

Weights are read by `load.py` and written by `save.py`. Only safetensors are read: files of the older formats can run
code when they are opened.
"""

from __future__ import annotations

import contextlib
import functools
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files.families import embedding_names, model_config
from jaxalign.models.files.families.base import note_once
from jaxalign.models.files.tensors import INDEX, check_regular, equal, files_in, open_folder
from jaxalign.outside import brief, check_local, read_object

RANDOM = "config:"
LARGEST_TEXT = 1 << 30  # bytes of a config or tokenizer; the largest tokenizers have 40 MB
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
    check_local(source.removeprefix(RANDOM))
    path = Path(source.removeprefix(RANDOM)).expanduser()
    if is_random(source):
        if not path.exists():
            raise Mistake(f"{source}: there is no {path}; config: takes a config.json or its folder")
        return path if path.is_dir() else path.parent
    if path.is_dir():
        _check_files(path)
        return path
    if path.exists():
        raise Mistake(f"{source} is a file; name the folder that holds config.json and *.safetensors")
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise Mistake(
            f"{source}: no such folder; a model is a Hugging Face folder, a hub name (owner/name) or config:PATH"
        )
    return _download(source)


def _check_files(path: Path) -> None:
    """Raises Mistake on a pipe, a device, or a huge text where transformers and we read files to their ends."""
    for file in path.iterdir():
        if file.suffix not in (".json", ".jinja", ".model", ".txt", ".safetensors") or not file.exists():
            continue
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Mistake(f"{brief(str(file), 200)} is not a regular file; fetch it again")
        if file.suffix != ".safetensors" and status.st_size > LARGEST_TEXT:
            raise Mistake(f"{brief(str(file), 200)} has {status.st_size:,} bytes; {LARGEST_TEXT:,} is the most")


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
    """The source's config.json; `tie_word_embeddings` is false where the files hold an output matrix of their own.

    transformers 5 keeps such a matrix whatever the config says, and an exported config says it too.
    """
    path = Path(source.removeprefix(RANDOM)).expanduser()
    if not (is_random(source) and path.is_file()):
        path = folder(source) / "config.json"
    if not path.exists():
        raise Mistake(f"{path.parent} has no config.json; is it a Hugging Face model folder?")
    fields = read_object(path)
    hf_config = fields.content
    if isinstance(hf_config.get("architectures"), str):
        hf_config["architectures"] = [hf_config["architectures"]]
    fields.texts("architectures")
    if not is_random(source) and hf_config.get("architectures") and _has_own_head(path.parent, hf_config):
        note_once(
            f"{path}: 'tie_word_embeddings' is true, and the files hold an output matrix that is not the embedding; "
            "the matrix is kept, as in transformers 5"
        )
        hf_config["tie_word_embeddings"] = False
    return hf_config


def _has_own_head(path: Path, hf_config: dict[str, Any]) -> bool:
    """True if the config ties the output matrix to the embedding and the files hold another one."""
    try:
        config = model_config(hf_config)
    except Mistake:  # raised by those who need the config
        return False
    if not config.tied or not (any(path.glob("*.safetensors")) or (path / INDEX).exists()):
        return False
    return _differ(path, embedding_names(config), tuple(sorted(map(_stamp, files_in(path)))))


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_mtime_ns, status.st_size


@functools.cache
def _differ(path: Path, names: tuple[str, str], stamps: tuple) -> bool:
    """True if both tensors are in the files and hold other numbers; `stamps` change with the files."""
    with contextlib.ExitStack() as stack:
        tensors = open_folder(path, stack)
        embedding, head = (
            next((tensors[n] for n in (name, name.partition(".")[2]) if n in tensors), None) for name in names
        )
        return embedding is not None and head is not None and not equal(embedding, head)


def read_generation_config(source: str) -> dict[str, Any]:
    """The source's generation_config.json, unchanged; {} if it has none."""
    path = folder(source) / "generation_config.json"
    return read_object(path).content if path.exists() else {}


def read_config(source: str) -> ModelConfig:
    """The neutral config of a source. Raises Mistake, naming the source, when the architecture is not supported."""
    return model_config(read_hf_config(source), f"{source}: config.json")


def load_tokenizer(source: str) -> Any:
    """The transformers tokenizer of a source."""
    from transformers import AutoTokenizer

    path = folder(source)
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise Mistake(f"{path} has no tokenizer (tokenizer.json); name one with `tokenizer`")
    for pattern in _WANTED:
        for file in path.glob(pattern):
            if not (file.is_dir() or file.suffix == ".safetensors"):
                check_regular(file)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and its dependencies raise errors of many classes
        first = (str(error).strip().splitlines() or [""])[0]
        raise Mistake(
            f"the tokenizer in {path} cannot be read ({type(error).__name__}: {brief(first, 200)}); fetch it again, "
            "or name another with `tokenizer`"
        ) from error


def tokenizer_source(model: str, adapter: Path | str | None) -> str:
    """The folder or name whose tokenizer a model is read with: the adapter's, which training left there, or its own."""
    has_one = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    return str(adapter) if has_one else model


def check_fits(tokenizer: Any, model: ModelConfig, source: str) -> None:
    """Makes a tokenizer with more ids than the model has embeddings raise Mistake on a text that has such an id.

    Models come with tokenizers of a few more tokens, which texts do not have; gemma-3-1b has one for images.
    """
    if max(tokenizer.get_vocab().values(), default=0) < model.vocab_size:
        return

    def checked(ids: Any) -> None:
        if len(ids) and not isinstance(ids[0], int):
            for row in ids:
                checked(row)
        elif len(ids) and max(ids) >= model.vocab_size:
            token = brief(repr(tokenizer.convert_ids_to_tokens(int(max(ids)))))
            raise Mistake(
                f"token {token} is number {max(ids)} of the tokenizer of {source}, and the model has embeddings for "
                f"{model.vocab_size}; use the tokenizer that the model was made with, or texts without this token"
            )

    kind = type(tokenizer)

    def call(self: Any, *texts: Any, **options: Any) -> Any:
        encoded = kind.__call__(self, *texts, **options)
        checked(encoded["input_ids"])
        return encoded

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def check_ids(ids: Iterable[int], model: ModelConfig, source: str) -> None:
    """Raises Mistake unless the ids, such as terminators, are tokens of the model."""
    foreign = [i for i in ids if not 0 <= i < model.vocab_size]
    if foreign:
        raise Mistake(
            f"{source}: token {brief(str(foreign[0]))} is to end texts, and the model has tokens 0 to "
            f"{model.vocab_size - 1}; correct 'eos_token_id' in its generation_config.json, or the tokenizer"
        )


def terminators(source: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: generation_config.json's, then config.json's, then the tokenizer's eos token.

    Training appends the first one. Models may end texts with another token than the tokenizer's eos, which is why the
    ids of generation_config.json come first.
    """
    ends: list[int] = []
    for path in (folder(source) / "generation_config.json", folder(source) / "config.json"):
        value = read_object(path).content.get("eos_token_id") if path.exists() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise Mistake(
                f"{path}: 'eos_token_id' is {brief(value)}; it must be the number of a token, or a list of them"
            )
        ends += ids
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ends))
