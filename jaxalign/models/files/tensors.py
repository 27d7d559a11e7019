"""Safetensors files of a folder: found, opened and checked. Nothing outside the folder is read, and no NaN gets in."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.outside import brief, parse_json, read_object

INDEX = "model.safetensors.index.json"
SPELLED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # dtypes, as safetensors does
FLOATS = tuple(SPELLED.values())
# Bits of a float's exponent, all ones in NaN and infinity, and the unsigned integers that hold such a float.
EXPONENTS = {
    "float64": (np.uint64, 0x7FF0 << 48),
    "float32": (np.uint32, 0x7F80 << 16),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
HEADER_LIMIT = 100_000_000  # bytes; that of the library safetensors
CHUNK = 1 << 16  # numbers that are checked or compared at once, in the processor's cache


class Tensor(NamedTuple):
    """One tensor of an open file."""

    file: Path
    handle: Any  # of safetensors.safe_open
    name: str
    begin: int  # byte of the file at which its numbers begin

    @property
    def shape(self) -> tuple[int, ...]:
        """From the header; nothing else is read."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """As safetensors spells it, such as BF16, from the header."""
        return self.handle.get_slice(self.name).get_dtype()

    def check_dtype(self) -> None:
        """Raises Mistake unless it holds floats of a dtype of FLOATS."""
        if self.dtype not in FLOATS:
            raise Mistake(
                f"{self.file}: tensor {brief(self.name)!r} is of dtype {self.dtype}; weights must be of "
                f"{', '.join(FLOATS)}. Take the model that was quantised, or dequantise it first"
            )

    def read(self) -> np.ndarray:
        """The array. Raises Mistake unless all of its numbers are finite floats."""
        self.check_dtype()
        return self.checked(self.handle.get_tensor(self.name))

    def mapped(self) -> np.ndarray:
        """The array in its file: nothing is read yet. `part` reads what is to be used."""
        self.check_dtype()
        dtype = next(np.dtype(name) for name, spelled in SPELLED.items() if spelled == self.dtype)
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        return np.memmap(self.file, dtype, "r", self.begin, self.shape)

    def part(self, whole: np.ndarray, view: np.ndarray) -> np.ndarray:
        """A view of `mapped`'s array, read: numbers that lie in one piece with one call, and no others beside them.

        Raises Mistake unless all of them are finite.
        """
        order = "C" if view.flags.c_contiguous else "F"
        if not (view.flags[f"{order}_CONTIGUOUS"] and view.size and np.may_share_memory(whole, view)):
            return self.checked(np.array(view))
        numbers = np.empty(view.shape, view.dtype, order)
        place = numbers.reshape(-1, order=order).view(np.uint8)
        with self.file.open("rb", buffering=0) as handle:
            handle.seek(self.begin + view.ctypes.data - whole.ctypes.data)
            while place.size and (count := handle.readinto(place.data)):  # Linux reads 2 GiB at most
                place = place[count:]
        if place.size:
            raise Mistake(f"{self.file}: it ends within tensor {brief(self.name)!r}; fetch it again")
        return self.checked(numbers)

    def checked(self, array: np.ndarray) -> np.ndarray:
        """A part of the numbers, as it is. Raises Mistake unless all of them are finite."""
        if not all_finite(array):
            raise Mistake(f"{self.file}: tensor {brief(self.name)!r} holds NaN or infinity; fetch or train it again")
        if array.dtype == np.float64 and (np.abs(array) > np.finfo(np.float32).max).any():
            raise Mistake(f"{self.file}: tensor {brief(self.name)!r} holds numbers beyond float32; train it again")
        return array


def all_finite(array: np.ndarray) -> bool:
    """True if a float array holds neither NaN nor infinity."""
    unsigned, exponent = EXPONENTS[array.dtype.name]
    bits, mask = array.reshape(-1).view(unsigned), unsigned(exponent)
    return all((bits[at : at + CHUNK] & mask).max() != mask for at in range(0, bits.size, CHUNK))


def equal(a: Tensor, b: Tensor) -> bool:
    """True if two tensors hold the same numbers."""
    if a.shape != b.shape or not a.shape:
        return False
    a.check_dtype(), b.check_dtype()
    left, right = a.handle.get_slice(a.name), b.handle.get_slice(b.name)
    count, width = a.shape[0], math.prod(a.shape[1:])
    rows = max(1, 16 * CHUNK // max(1, width))
    blocks = (slice(at, min(at + rows, count)) for at in range(0, count, rows))
    return all(np.array_equal(left[block], right[block]) for block in blocks)


def open_folder(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """{name: tensor} of all files of a model's folder, which stay open as long as `stack`.

    Raises:
      Mistake: no safetensors, a listed file is absent or lies elsewhere, or a file is damaged; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    for file in files_in(path):
        tensors |= open_file(file, stack)
    return tensors


def open_file(file: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """{name: tensor} of one file. Raises Mistake where it is damaged, or no regular file."""
    import safetensors

    check_regular(file)
    try:
        handle = stack.enter_context(safetensors.safe_open(file, framework="np"))
    except (safetensors.SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise Mistake(
            f"{file} ({size:,} bytes) is truncated or damaged: {brief(str(error), 200)}; fetch it again"
        ) from None
    tensors, start = read_header(file)
    return {name: Tensor(file, handle, name, start + tensor["data_offsets"][0]) for name, tensor in tensors.items()}


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(the description of each tensor, the byte at which the first begins). Raises Mistake on a damaged file."""
    problem = f"{file} is truncated or damaged; fetch it again"
    if not file.is_file():
        raise Mistake(f"{file} is not a regular file; give a file")
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(HEADER_LIMIT, file.stat().st_size):
            raise Mistake(problem)
        header = parse_json(handle.read(length).decode(errors="replace"), str(file))
    try:
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        for value in tensors.values():
            begin, end = value["data_offsets"]
            if not (isinstance(value["dtype"], str) and 0 <= begin <= end):
                raise Mistake(problem)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Mistake(problem) from None
    return tensors, 8 + length


def read_file(file: Path) -> dict[str, np.ndarray]:
    """{name: array} of a small file, such as an adapter. Raises Mistake where it is damaged or not finite."""
    with contextlib.ExitStack() as stack:
        return {name: tensor.read() for name, tensor in open_file(file, stack).items()}


def write_file(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Writes tensors of one dtype as they come, so that one of them is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        begin, at = at, at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SPELLED[dtype.name], "shape": list(shape), "data_offsets": [begin, at]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            output.write(np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8).data)


def check_regular(file: Path) -> None:
    """Raises Mistake unless it is a regular file: a named pipe or a device could hold a reader for ever."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise Mistake(f"{brief(str(file), 200)} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Mistake(f"{brief(str(file), 200)} is not a regular file; weights are read from regular files")


def files_in(path: Path) -> list[Path]:
    """The safetensors files of a model's folder: those of its index, else all. Raises Mistake where there are none."""
    if (path / INDEX).exists():
        files = [path / name for name in _listed(path)]
        absent = [brief(file.name) for file in files if not os.path.exists(file)]  # also for a name that is too long
        if absent:
            raise Mistake(f"{path / INDEX} lists {', '.join(absent[:5])}, which is not there; fetch it again")
    else:
        files = sorted(path.glob("*.safetensors"))
    for file in files:
        _check_inside(path, file)
    if files:
        return files
    old = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if old:
        raise Mistake(
            f"{path} holds {brief(', '.join(old))} but no *.safetensors. Such files can run code when opened; convert "
            "them once in transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise Mistake(f"{path} has no *.safetensors; start from random weights with config:{path}")


def _listed(path: Path) -> list[str]:
    """Names of files in the index, each a path below the folder."""
    index = read_object(path / INDEX)
    if "weight_map" not in index:
        raise Mistake(f"{index.where}: 'weight_map' is absent; fetch it again")
    weights = index.object("weight_map")
    names = {weights.get(key, str) for key in weights}
    for name in names:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name:
            raise Mistake(f"{index.where}: 'weight_map' names {brief(name)!r}; it must name files of this folder")
    return sorted(names)


def _check_inside(path: Path, file: Path) -> None:
    """Raises Mistake where a link leads out of the folder; links of the hub's cache lead to its blobs."""
    check_regular(file)  # also of a link that leads to itself
    target = file.resolve()
    blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not (blob or target.is_relative_to(path.resolve())):
        raise Mistake(f"{file} is a link to {brief(str(target), 200)}, outside its folder; put the file itself there")


def names_of(tensors: Iterable[str], limit: int = 5) -> str:
    """Some names for an error or a log, and the number of those besides."""
    ordered = sorted(tensors)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(map(brief, ordered[:limit])) + more
