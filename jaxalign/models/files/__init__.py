"""Models in files: Hugging Face folders, families, PEFT adapters, reward models."""
