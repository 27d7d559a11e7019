"""Command."""

from jaxalign.runs.preferences import run_kto as main  # noqa: F401
