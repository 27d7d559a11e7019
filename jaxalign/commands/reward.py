"""Command."""

from jaxalign.runs.reward import run as main  # noqa: F401
