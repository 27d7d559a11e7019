"""Facts about the weights in a folder, read from their headers and a sample of their bytes: dtype and fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from jaxalign.models.files import huggingface
from jaxalign.models.files.tensors import read_header
from jaxalign.outside import read_object

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors and as we write them
# Bytes of a tensor that the fingerprint reads: all up to WHOLE, of a larger one PIECES pieces at equal distances.
WHOLE, PIECES, PIECE = 2**20, 64, 4096
DESCRIPTIONS = ("adapter_config.json", "reward.json")
# Keys of a description that say who wrote it, or how it is stored, and nothing about what the model computes.
NOTES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "peft_version")


def stored_dtype(source: str) -> str | None:
    """The dtype that holds most bytes of a folder's weights, "float32" if it is another than DTYPES; None: no files."""
    sizes: dict[str, int] = {}
    for file in _files(huggingface.folder(source)):
        for tensor in read_header(file)[0].values():
            begin, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
    return DTYPES.get(max(sizes, key=lambda name: sizes[name]), "float32") if sizes else None


def fingerprint(source: str, *, whole: bool = False, follow: bool = True) -> str:
    """A text that changes when the model of a folder or hub name does: config, adapters, heads and weights.

    Tensors of at most WHOLE bytes are read whole, and PIECES pieces of the others, so that one of 70 billion parameters
    takes seconds; with `whole` every byte. The order of tensors, and the files that they are in, do not count. With
    `follow` the base that the adapters of a reward model are on counts too.
    """
    folder = huggingface.folder(source)
    described = {"config.json": huggingface.read_hf_config(source)}
    described |= {name: read_object(folder / name).content for name in DESCRIPTIONS if (folder / name).exists()}
    for settings in described.values():
        for note in NOTES:
            settings.pop(note, None)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    base = described.get("reward.json", {}).get("base")
    if follow and isinstance(base, str):
        digest.update(fingerprint(base, whole=whole, follow=False).encode())
    if huggingface.is_random(source):
        return digest.hexdigest()
    parts = sorted(part for file in _files(folder) for part in _digests(file, folder, whole))
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def trained_on_other_weights(adapter: Path | str, base: str) -> bool:
    """True if an adapter's folder says that it was trained on another base; those of other programs say nothing."""
    mark = Path(adapter) / "jaxalign.json"
    recorded = read_object(mark).get("base", str, None) if mark.exists() else None
    return recorded not in (None, fingerprint(base))


def _files(folder: Path) -> list[Path]:
    """The weights of a folder, and those of the members that a reward model may have beside them."""
    return sorted(file for pattern in ("*.safetensors", "members/**/*.safetensors") for file in folder.glob(pattern))


def _digests(file: Path, folder: Path, whole: bool) -> list[tuple[str, str]]:
    """(name, digest of its dtype, shape and bytes, of a sample of them unless `whole`) of each tensor of a file."""
    tensors, start = read_header(file)
    place = str(file.parent.relative_to(folder))
    parts = []
    with file.open("rb") as handle:
        for name, tensor in tensors.items():
            begin, end = tensor["data_offsets"]
            digest = hashlib.sha256(json.dumps([place, tensor["dtype"], tensor.get("shape")]).encode())
            size = end - begin
            pieces = [(at, min(WHOLE, end - at)) for at in range(begin, end, WHOLE)]
            if size > WHOLE and not whole:
                pieces = [(begin + i * (size - PIECE) // (PIECES - 1), PIECE) for i in range(PIECES)]
            for at, count in pieces:
                handle.seek(start + at)
                digest.update(handle.read(count))
            parts.append((name, digest.hexdigest()))
    return parts
