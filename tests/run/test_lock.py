"""One process at a time in a run folder: real ones at once, killed, interrupted, suspended, of another machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxalign.cli.main import main
from jaxalign.mistake import Mistake
from jaxalign.run import lock
from jaxalign.training.metrics import Console
from tests.shared import on_one_device

HOLD = """
import logging, signal, sys, time
from pathlib import Path
from jaxalign.mistake import Mistake
from jaxalign.run import lock
logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in background, which ignore it
folder, begin, end = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
time.sleep(max(0.0, begin - time.time()))
try:
    lock.acquire(folder)
except Mistake as mistake:
    sys.exit(f"refused: {mistake}")
print("held", flush=True)
sys.stdin.read()
if end == "error":
    raise RuntimeError("an error")
if end == "release":
    lock.release(folder)
"""


def start(folder, *, begin=0.0, end="exit"):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLD, str(folder), str(begin), end]
    return subprocess.Popen(command, **pipes)


def holding(folder, **options):
    process = start(folder, **options)
    assert process.stdout.readline() == "held\n", process.communicate()
    return process


def write(folder, **changes):
    """A lock file, by default of this process."""
    folder.mkdir(exist_ok=True)
    (folder / lock.FILE).write_text(json.dumps(lock.Holder.this()._asdict() | {"token": "other"} | changes))
    return folder


def remains(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stale", [False, True], ids=["new", "taking a stale lock"])
def test_of_several_processes_at_once_one_has_the_folder_and_the_others_name_it(stale, tmp_path):
    folder = tmp_path / "run"
    if stale:
        write(folder, pid=os.getpid(), started="1")
    begin = time.time() + 0.5
    processes = [start(folder, begin=begin) for _ in range(6)]
    winners = [p for p in processes if p.stdout.readline() == "held\n"]
    assert len(winners) == 1
    for process in processes:
        _, error = process.communicate("")
        if process is winners[0]:
            assert ("its lock is taken" in error) == stale
        else:
            assert f"in use by process {winners[0].pid} on " in error and " s ago. Wait until it ends" in error
    assert remains(folder) == []


@pytest.mark.parametrize("end", ["exit", "error", "release", "interrupt"])
def test_the_lock_ends_with_its_process_however_that_ends(end, tmp_path):
    process = holding(tmp_path, end=end)
    assert remains(tmp_path) == [lock.FILE]
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
    process.communicate("")
    assert remains(tmp_path) == []


def test_the_lock_of_a_killed_process_is_taken_and_the_log_names_it(tmp_path, caplog):
    process = holding(tmp_path)
    with pytest.raises(Mistake, match=rf"in use by process {process.pid} on .*, since 20.*; or name another folder"):
        lock.acquire(tmp_path)
    process.send_signal(signal.SIGSTOP)  # suspended, it is alive
    with pytest.raises(Mistake, match=rf"in use by process {process.pid} on "):
        lock.acquire(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and in the table of processes still
    lock.acquire(tmp_path)
    assert f"locked by process {process.pid} on " in caplog.text and "that process is gone" in caplog.text
    lock.release(tmp_path)
    process.communicate()
    assert remains(tmp_path) == []


def test_a_later_process_of_the_same_number_is_not_taken_for_the_holder(tmp_path):
    lock.acquire(write(tmp_path, pid=os.getppid(), started="1"))
    lock.release(tmp_path)


def test_a_lock_of_another_machine_is_held_while_it_moves_and_taken_once_it_does_not(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "PAUSE", 0.05)
    path, ending = write(tmp_path, host="elsewhere", machine="another", pid=1) / lock.FILE, threading.Event()

    def renew():
        while not ending.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(Mistake, match="in use by process 1 on elsewhere"):
        lock.acquire(tmp_path)
    ending.set()
    thread.join()
    monkeypatch.setattr(lock, "LIMIT", 0.5)
    began = time.monotonic()
    lock.acquire(tmp_path)
    assert time.monotonic() - began > 0.3 and "process 1 on elsewhere" in caplog.text
    lock.release(tmp_path)
    old = time.time() - 1000
    os.utime(write(tmp_path, host="elsewhere") / lock.FILE, (old, old))
    monkeypatch.setattr(lock, "LIMIT", 120.0)
    lock.acquire(tmp_path)
    lock.release(tmp_path)


def test_a_damaged_lock_is_taken_once_nobody_can_be_writing_it(tmp_path, monkeypatch):
    (tmp_path / lock.FILE).write_text('{"host": "a", "pid": tru')
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    monkeypatch.setattr(lock, "PAUSE", 0.05)
    lock.acquire(tmp_path)
    lock.release(tmp_path)


def test_a_process_that_slept_while_its_lock_was_taken_notices_and_leaves_the_other_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED", 0.05)
    lock.acquire(tmp_path)
    lock.check(tmp_path)
    (tmp_path / lock.FILE).unlink()  # by hand: it is written again, for nobody else has taken it
    lock.check(tmp_path)
    other = (write(tmp_path, host="elsewhere", pid=7) / lock.FILE).read_text()
    with pytest.raises(Mistake, match=r"has been taken by process 7 on elsewhere.*gave no sign of life for more than"):
        lock.check(tmp_path)
    os.utime(tmp_path / lock.FILE, (1, 1))
    time.sleep(0.2)
    lock.release(tmp_path)
    assert (tmp_path / lock.FILE).read_text() == other and (tmp_path / lock.FILE).stat().st_mtime == 1


def sft(model, data, output):
    flags = {"model": model, "data": data, "output": output, "steps": 4, "batch-size": 8, "max-length": 16}
    flags |= {"eval-share": 0, "remat": "none", "checkpoint.every": 0}
    return ["sft", *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_lock_is_taken_stops_without_another_word_in_the_folder(
    tiny_model, tiny_data, tmp_path, capsys, monkeypatch
):
    output, seen = tmp_path / "run", {}
    show = Console.show

    def shown(console, row):
        show(console, row)
        if row["step"] == 2:
            write(output, host="elsewhere", pid=7)
            seen.update(contents(output))

    monkeypatch.setattr(Console, "show", shown)
    with on_one_device():
        assert main(sft(tiny_model, tiny_data, output)) == 2
    assert "--output" in (error := capsys.readouterr().err) and "has been taken by process 7 on elsewhere" in error
    assert contents(output) == seen


def test_a_second_command_is_refused_before_it_reads_anything_and_the_first_unlocks_at_its_end(
    tiny_model, tiny_data, tmp_path, capsys
):
    process = holding(tmp_path / "run")
    assert main(sft(tiny_model, tmp_path / "absent.jsonl", tmp_path / "run")) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    assert main(sft(tiny_model, tiny_data, tmp_path / "run")) == 2
    assert f"--output {tmp_path / 'run'} is in use by process {process.pid}" in capsys.readouterr().err
    process.communicate("")
    assert remains(tmp_path / "run") == []
