"""Bytes and host memory at the load, save, resume and export of a 1 GiB model, by 1 and by 4 processes.

    python experiments/benchmarks/checkpoint_bytes.py           needs 15 GB of disk at --folder, which it deletes

Measured, of each process, the largest of all: bytes that it read and wrote by system calls (rchar and wchar of
/proc/self/io, sockets included), and from the disk (read_bytes, with the page cache dropped before); and its peak of
memory of its own (RssAnon of /proc/self/status, looked at every 2 ms) in a phase, above the larger of that before and
after it, in which the arrays of the (CPU) devices are. One process maps weights into memory, so they count as read from
the disk only. Processes have 8 fake devices together, on a mesh with fsdp=8. The train state is float32: parameters and
two moments, 3 GiB. A share is the bytes of the files over the processes.

Phases: load, of weights in safetensors; save, of a checkpoint; resume, its checksums and arrays; export, at the end of
a run; and extract, what `jaxalign export` does: checksums and parameters of a checkpoint, in one process.

Observed, at the commit that added this file, on 2 shared cores of a CPU with other work beside it (one run), in MiB:
               share      read from disk   written  peak above arrays
    load    by 1      1024         3      1024         0         0
    save    by 1      2843      2856         6      2843         0
    resume  by 1      2843      5695      2845         0       996
    export  by 1      1024         5         0      1024         0
    extract by 1      2843      3799      2845      1024       345
    load    by 4       256       260       307       174         0
    save    by 4       711       716         2       711       290
    resume  by 4       711      1426       936         0        24
    export  by 4       256         8         0      2816       491
Each process reads its share of the weights (+ 2%) and of what it saved (+ 1%, for checksums), and at a resume twice
its share of the checkpoint: once for checksums, once for arrays, the second time mostly out of the page cache. What the
disk reads beyond is its read-ahead of 8 MiB. `extract` reads the parameters besides, not the moments again. The peak of
`resume by 1` are chunks of all arrays, which Orbax reads at once. `export by 4` writes 1,024 MiB, by one process; the
rest went through sockets. Its peak is the embedding (128 MiB) on each of two fake devices, and twice on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32768, "max_position_embeddings": 1024}
CONFIG |= {"num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
DEVICES = 8
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="an existing folder on the disk to measure; none: a temporary one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.folder, json.loads(options.worker))
    sizes = {"hidden_size": options.hidden, "intermediate_size": 4 * options.hidden}
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (folder / "config.json").write_text(json.dumps(CONFIG | sizes | {"num_hidden_layers": options.layers}))
        run(folder, 1, ["make"])
        print("MiB of a process  share      read from disk   written  peak above arrays")
        for count in (1, 4):
            for phases in (["load"], ["save"], ["resume", "export"]) if count > 1 else PHASES_OF_ONE:
                for phase, *numbers in zip(phases, *run(folder, count, phases), strict=True):
                    most = {name: max(x[name] for x in numbers) for name in numbers[0]}
                    print(f"{phase:7} by {count} {' '.join(f'{most[name] / MIB:9.0f}' for name in most)}", flush=True)
            shutil.rmtree(folder / "checkpoints")
    finally:
        shutil.rmtree(folder)


PHASES_OF_ONE = ["load"], ["save"], ["resume", "export"], ["extract"]


def run(folder: Path, count: int, phases: list[str]) -> list[list[dict[str, int]]]:
    """The measures of the phases, in fresh processes: one list for each process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    shared = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if count > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, __file__, "--folder", str(folder), "--worker", json.dumps(phases)]
    processes = [
        subprocess.Popen(command, env=shared | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{phases} by {count} processes failed")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def work(folder: Path, phases: list[str]) -> None:
    """One process of a measurement."""
    import jax

    from jaxalign import hosts
    from jaxalign.models.decoder.decoder import init_params, make_decoder
    from jaxalign.models.files import huggingface
    from jaxalign.models.files.load import load_params
    from jaxalign.models.files.save import save_pretrained
    from jaxalign.models.places import make_mesh, shardings
    from jaxalign.training.checkpoint import Checkpoints
    from jaxalign.training.sharding import placed

    if "JAX_NUM_PROCESSES" in os.environ:
        hosts.join()
    hf_config = huggingface.read_hf_config(f"{huggingface.RANDOM}{folder}")
    config = huggingface.read_config(f"{huggingface.RANDOM}{folder}")
    mesh, abstract = make_mesh(fsdp=DEVICES), make_decoder(config)[1]
    places, like = shardings(abstract, mesh), placed(abstract, mesh)
    held: dict[str, Any] = {}

    def params(seed: int) -> Any:
        return init_params(config, jax.random.key(seed), shardings=places)

    def load() -> None:
        held["params"] = load_params(str(folder / "model"), config, shardings=places)

    def save() -> None:
        checkpoints.save(1, held["state"], {})
        checkpoints.wait()

    def resume() -> None:
        held["state"] = checkpoints.restore({"params": like, "mu": like, "nu": like})

    def export() -> None:
        weights = held["state"][0]["params"] if "state" in held else held["params"]
        save_pretrained(folder / "final", weights, config, hf_config)

    def extract() -> None:
        one = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        on_host = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), abstract)
        held["params"], _ = checkpoints.restore_part("params", on_host)
        export()

    if phases == ["make"]:
        save_pretrained(folder / "model", params(0), config, hf_config)
        print("[]")
        return
    if "save" in phases:
        held["state"] = jax.block_until_ready({name: params(seed) for seed, name in enumerate(("params", "mu", "nu"))})
    checkpoints = Checkpoints(folder / "checkpoints")
    known = {"load": load, "save": save, "resume": resume, "export": export, "extract": extract}
    files = {"load": "model", "export": "final"}
    results = []
    for phase in phases:
        hosts.barrier(f"before {phase}")
        if jax.process_index() == 0:
            shutil.rmtree(folder / "final", ignore_errors=True)
            drop_cache(folder)
        hosts.barrier(f"cache dropped before {phase}")
        measures = measured(known[phase])
        hosts.barrier(f"after {phase}")
        content = (folder / files.get(phase, "checkpoints")).rglob("*")
        share = sum(file.stat().st_size for file in content if file.is_file()) // jax.process_count()
        results.append({"share": share} | measures)
    checkpoints.close()
    print(json.dumps(results))


def measured(function: Callable[[], None]) -> dict[str, int]:
    """Bytes read, from disk and written, and the peak of memory, while a function runs."""
    before, own, ending, peaks = counters(), own_memory(), threading.Event(), [0]

    def watch() -> None:
        while not ending.wait(0.002):
            peaks[0] = max(peaks[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    ending.set()
    watcher.join()
    after = counters()
    delta = {name: after[name] - before[name] for name in ("rchar", "read_bytes", "wchar")}
    return delta | {"peak": max(peaks[0] - max(own, own_memory()), 0)}


def counters() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def own_memory() -> int:
    """Resident bytes of this process that are pages of no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def drop_cache(folder: Path) -> None:
    """Forgets the pages of all files of a folder, so that they are read from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDWR)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


if __name__ == "__main__":
    main()
