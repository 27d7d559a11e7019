"""Command."""

from jaxalign.runs.chat import run as main  # noqa: F401
