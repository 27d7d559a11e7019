"""Floor 1: Pallas kernels for the hot paths. They import jax only."""
