"""Commands with a fault on one host; tests run them on two."""

import errno
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from jaxalign.mistake import Mistake


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


def at(number, error, function):
    """The function, but for its call of that number, counted from 1."""
    calls = iter(range(1, 1_000_000))
    return lambda *arguments: raising(error)() if next(calls) == number else function(*arguments)


def data():
    from jaxalign.commands import sft

    sft.load_data = raising(Mistake("rows.jsonl, line 3 is not JSON"))


def source():
    from jaxalign.run import run

    iterate = run.iterate

    class Batches:
        def __init__(self, batches):
            self._batches = iterate(batches)
            self.set_state, self._next = self._batches.set_state, at(4, RuntimeError("the rows are gone"), next)

        def __next__(self):
            return self._next(self._batches)

    run.iterate = Batches


def logger():
    from jaxalign.training import metrics

    full = OSError(errno.ENOSPC, "No space left on device")
    metrics.JsonLines.write = at(2, full, metrics.JsonLines.write)


def space():
    from jaxalign.training import checkpoint

    usage = checkpoint.shutil.disk_usage
    checkpoint.shutil.disk_usage = lambda path: usage(path)._replace(free=0)


def memory():
    import jax

    from jaxalign.training.compiled import CompiledStep

    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17 bytes")
    CompiledStep.__call__ = at(2, full, CompiledStep.__call__)


def main():
    """Runs commands, [[HOST:FAULT, arguments], ...]; prints of each the status, stderr, checkpoints and seconds.

    Each runs in a child of this process, which imports the libraries once for all.
    """
    from jaxalign.cli.main import parse
    from jaxalign.commands import COMMANDS
    from jaxalign.models.files.huggingface import load_tokenizer

    commands = json.loads(sys.argv[1])
    COMMANDS["sft"].load()
    load_tokenizer(parse(commands[0][1])[1].model)
    results = []
    for fault, arguments in commands:
        with tempfile.TemporaryFile() as errors:
            start = time.monotonic()
            child = os.fork()
            if not child:
                os.dup2(errors.fileno(), 2)
                sys.exit(run(fault, arguments))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            results.append([status, errors.read().decode(), checkpoints(arguments), time.monotonic() - start])
    print("results", json.dumps(results))


def checkpoints(arguments):
    """Steps of the checkpoints in the run folder."""
    folder = Path(arguments[arguments.index("--output") + 1]) / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def run(fault, arguments):
    from jaxalign.cli.main import main

    host, _, name = fault.partition(":")
    if os.environ["JAX_PROCESS_ID"] == host:
        globals()[name]()
    return main(arguments)


if __name__ == "__main__":
    main()
