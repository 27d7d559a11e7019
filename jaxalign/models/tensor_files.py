"""Safetensors on disk: which files make up a checkpoint, what their headers promise, and a writer that streams.

A file is 8 bytes of header length (little endian), a JSON header from names to dtype, shape and byte offsets, and then
the tensors, one after the other. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LONGEST_HEADER = 100_000_000  # bytes; safetensors itself refuses more


class Stored(NamedTuple):
    """A tensor of an open file; its numbers are read only on demand."""

    name: str
    file: Path
    handle: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows().get_shape())

    @property
    def dtype(self) -> str:
        """As the header spells it: F32, BF16, I8, ..."""
        return self.rows().get_dtype()

    def rows(self) -> Any:
        """Something to slice, which reads what was asked for."""
        return self.handle.get_slice(self.name)

    def read(self) -> np.ndarray:
        return self.handle.get_tensor(self.name)


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name; the files stay open as long as `stack` does.

    Raises:
      FileNotFoundError: no safetensors, or a file that the index lists is absent.
      ValueError: the index or a file is damaged; the message names it, with the bytes found and promised.
    """
    import safetensors

    found: dict[str, Stored] = {}
    for file in tensor_files(folder):
        try:
            handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} {_damage(file) or f'is damaged ({error}); fetch it again'}") from None
        for name in handle.keys():
            if name in found:
                raise ValueError(f"tensor {name} is both in {found[name].file} and in {file}; remove one of the files")
            found[name] = Stored(name, file, handle)
    return found


def tensor_files(folder: Path) -> list[Path]:
    """The files of a checkpoint: model.safetensors, else those of its index (as transformers chooses), else all."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        names = _indexed(folder / INDEX)
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise FileNotFoundError(f"{folder / INDEX} lists {', '.join(absent)}, which is not there; fetch it again")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    old = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if old:
        raise FileNotFoundError(
            f"{folder} holds {', '.join(old)} but no *.safetensors. Such files can run code when opened; convert "
            "them once in transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise FileNotFoundError(
        f"{folder} has no *.safetensors (*.bin, which can run code when opened, is not fetched from the hub); "
        f"convert the model in transformers, or start from random weights with config:{folder}"
    )


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of safetensors ({type(error).__name__}: {error}); fetch it again"
        ) from None


def _damage(file: Path) -> str | None:
    """What is wrong with a file that does not open, or None where its size is as promised."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            return "is a git-lfs pointer, not the tensors; run `git lfs pull` in its repository"
        if len(start) == 8 and length > _LONGEST_HEADER:
            return f"({size:,} bytes) does not begin as safetensors do; is it another kind of file?"
        if size < 8 + length or len(start) < 8:
            return f"is truncated: {size:,} bytes found, its header alone has {8 + length:,}; fetch it again"
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    promised = 8 + length + max(ends, default=0)
    if promised == size:
        return None
    wrong = "truncated" if size < promised else "damaged"
    return f"is {wrong}: {size:,} bytes found, its header promises {promised:,}; fetch it again"


def write_header(file: BinaryIO, shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype) -> None:
    """Promises these tensors, all of one dtype; `write_tensor` must follow for each, in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes:
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin on a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)


def write_tensor(file: BinaryIO, x: np.ndarray) -> None:
    file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
