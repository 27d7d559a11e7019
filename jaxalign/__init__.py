"""jaxalign: alignment of language models in JAX, on TPUs, GPUs and laptops."""

__version__ = "0.1.0"
