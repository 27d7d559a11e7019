"""Command."""

from jaxalign.runs.sft import run as main  # noqa: F401
