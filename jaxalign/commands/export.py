"""Command."""

from jaxalign.runs.export import run as main  # noqa: F401
