"""Examples that a command trains on, holds out, or takes prompts from."""
