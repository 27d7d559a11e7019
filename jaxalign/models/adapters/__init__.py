"""LoRA, merging and quantised kernels."""
