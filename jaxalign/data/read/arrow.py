"""Rows that Arrow holds: parquet files, saved datasets, and sets on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from jaxalign.data.read.json_rows import Row
from jaxalign.mistake import Mistake
from jaxalign.outside import brief

Splits = dict[str | None, Sequence[Row]]

# Objects in whose keys Arrow's None means that the row lacks them: schemas of tools, and calls.
OF_TOOLS = ("tools", "functions", "tool_calls", "function_call")


class ArrowRows(Sequence[Row]):
    """Rows of a dataset. Arrow gives all objects of a column the same keys; those added as None leave OF_TOOLS again.

    Keys in JSON files stay as they are, null too.
    """

    def __init__(self, dataset: Sequence[Row]):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return _compact(self._dataset[index])

    def __iter__(self) -> Iterator[Row]:
        return map(_compact, self._dataset)


def _compact(value: Any, *, of_tools: bool = False) -> Any:
    if isinstance(value, list):
        return [_compact(item, of_tools=of_tools) for item in value]
    if not isinstance(value, dict):
        return value
    items = value.items()
    return {k: _compact(v, of_tools=of_tools or k in OF_TOOLS) for k, v in items if v is not None or not of_tools}


def read_parquet(path: Path) -> Sequence[Row]:
    """The rows of a file. Raises Mistake if it is damaged."""
    import pyarrow.parquet
    from datasets import Dataset

    try:
        pyarrow.parquet.read_schema(path)  # raises the error that `datasets` would also log
        return ArrowRows(cast(Sequence[Row], Dataset.from_parquet(str(path))))
    except Exception as error:  # arrow's errors, under many names
        causes = [error, error.__cause__ or error]  # `datasets` gives the reason in the cause
        reason = (str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__])[0]
        raise Mistake(f"data file {path} cannot be read as {path.suffix}: {brief(reason, 200)}") from None


def load_folder(path: Path) -> Splits:
    """The splits of a folder that `save_to_disk` wrote; None is the split of a set without any. Raises Mistake."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError:
        raise Mistake(f"data folder {path} is not a dataset saved with save_to_disk") from None
    except Exception as error:  # of a damaged folder, under many names
        reason = brief(f"{type(error).__name__}: {error}", 200)
        raise Mistake(f"data folder {path} cannot be read: {reason}; save it again") from None
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {None: dataset}
    return {name and str(name): ArrowRows(cast(Sequence[Row], rows)) for name, rows in splits.items()}


def load_hub(name: str, config: str | None) -> Splits:
    """The splits of a set on the hub. Raises Mistake if it cannot be fetched."""
    from datasets import load_dataset

    unreachable = _go_offline_if_unreachable(name)
    try:
        splits = dict(load_dataset(name, config))
        return {str(split): ArrowRows(cast(Sequence[Row], rows)) for split, rows in splits.items()}
    except Exception as error:  # the hub client raises under many names
        reason = brief(unreachable or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}", 200)
        raise Mistake(
            f"data {brief(name, 200)!r} is no local file and could not be fetched from the hub ({reason}). "
            "Check the spelling and the network"
        ) from None


def _go_offline_if_unreachable(name: str) -> str | None:
    """Makes one request to the hub; if it fails, sets the hub's client offline for the rest of this process.

    A client that is not offline retries five times for each file, half a minute in all, before it reads its cache.
    Returns the reason why the hub cannot be reached, or None.
    """
    import datasets.config
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return None  # reached; load_dataset reports the same error
    except Exception as error:  # httpx's connection errors, under many names
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return None
