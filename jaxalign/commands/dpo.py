"""Command."""

from jaxalign.runs.preferences import run_dpo as main  # noqa: F401
