"""Command."""

from jaxalign.runs.generate import run as main  # noqa: F401
