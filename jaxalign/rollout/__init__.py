"""Floor 5, beside algorithms: text out of models."""
