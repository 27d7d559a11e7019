"""Settings of each command: frozen dataclasses, shared by the command line and experiment files.

Standard library only, so that `jaxalign --help` answers at once. The docstring under a field is its help, and the
`Annotated` type of a number holds its limits. A command's class is put together from mixins: it has the settings that
it obeys, and no others.
"""
