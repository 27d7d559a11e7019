"""Floor 9: the embedded tiny world, its gold judge, and the whole pipeline on it as ordinary runs."""
