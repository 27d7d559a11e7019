"""Floor 10: the program `jaxalign`."""
