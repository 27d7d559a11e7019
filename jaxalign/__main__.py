"""`python -m jaxalign` is `jaxalign`."""

from jaxalign.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
