"""Floor 2: array in, array out. Picks the implementation for the platform; knows no models."""
