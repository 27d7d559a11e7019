"""Nothing that is not ours is obeyed by a terminal: names, texts, errors and tracebacks are printed with escapes."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from jaxalign.cli.main import main, parse
from jaxalign.commands import COMMANDS
from jaxalign.config.limits import to_json
from jaxalign.config.offline import RewardConfig
from jaxalign.mistake import Mistake
from jaxalign.run import devices
from jaxalign.training.signals import StopRequest

EVIL = "\x1b[2J\x1b]0;owned\x07\r\u202e"


@pytest.fixture
def own_log():
    """A log that a test may start as a command does; afterwards it is as before."""
    root = logging.getLogger("jaxalign")
    before = root.handlers, root.propagate, root.level, sys.unraisablehook
    yield logging.getLogger("jaxalign.somewhere")
    root.handlers, root.propagate, root.level, sys.unraisablehook = before


def test_a_log_line_shows_what_it_quotes_and_stays_one_line(capsys, own_log):
    devices.start_log()
    own_log.info("rows of %s", f"{EVIL}\nerror: all is lost")
    own_log.info("the first:\n%s", f"a\nb{EVIL}")
    own_log.warning("%s", EVIL)
    try:
        raise KeyError(EVIL)
    except KeyError:
        own_log.exception("it failed")
    err = capsys.readouterr().err
    assert not set(err) & set("\x1b\x07\r\u202e")
    shown = r"\x1b[2J\x1b]0;owned\x07\r\u202e"
    assert err.startswith(f"rows of {shown}\\nerror: all is lost\nthe first:\na\nb{shown}\nwarning: {shown}\nerror: it")


@pytest.mark.parametrize("error", [Mistake(f"column {EVIL}\nline"), KeyError(EVIL), OSError(2, EVIL, EVIL)])
def test_an_error_of_a_command_shows_what_it_quotes(error, capsys, monkeypatch):
    def fails(config):
        raise error from RuntimeError(EVIL)

    quickstart = COMMANDS["quickstart"]._replace(module=__name__)
    monkeypatch.setitem(COMMANDS, "quickstart", quickstart)
    monkeypatch.setattr(type(quickstart), "load", lambda self: fails)
    for traceback in ("", "1"):
        monkeypatch.setenv("JAXALIGN_TRACEBACK", traceback)
        main(["quickstart"])
        err = capsys.readouterr().err
        assert r"\x1b[2J" in err and not set(err) & set("\x1b\x07\r\u202e")
        assert not isinstance(error, Mistake) or traceback or len(err.splitlines()) == 1


def test_an_error_is_no_longer_than_a_screen(capsys, tmp_path):
    assert main(["sft", "--model", "x" * 10**5, "--data", "/none.jsonl", "--output", str(tmp_path), "--lr", "x"]) == 2
    assert len(capsys.readouterr().err) < 5000


def test_help_shows_the_values_of_a_file(tmp_path, capsys):
    config = RewardConfig(model=EVIL, data="d", output=tmp_path, step_separator=EVIL, tokenizer=EVIL)
    (tmp_path / "config.json").write_text(json.dumps({"command": "reward", "config": to_json(config)}))
    assert parse(["reward", "--from-config", str(tmp_path)]) == ("reward", config)
    with pytest.raises(SystemExit):
        main(["reward", "--from-config", str(tmp_path), "--help"])
    out = capsys.readouterr().out
    assert r"\x1b[2J" in out and not set(out) & set("\x1b\x07\r\u202e") and "--from-config FILE" in out


def test_a_platform_that_is_absent_is_one_line(monkeypatch):
    def no_devices():
        logging.getLogger("jax._src.xla_bridge").error("plugin %s", "broken\nin two lines")
        raise RuntimeError("Unable to initialize backend 'moon'")

    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "moon")
    with pytest.raises(Mistake) as caught:
        devices.start()
    assert str(caught.value) == (
        "JAX finds no device (plugin broken in two lines; Unable to initialize backend 'moon'); JAX_PLATFORMS is "
        "'moon': cpu works everywhere"
    )


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_without_a_home_that_can_be_written_a_run_keeps_no_compiled_programs(home, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    if home is None:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
    else:
        monkeypatch.setenv("HOME", home)
    devices.start()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_typo_in_a_path_is_answered_before_heavy_imports(tmp_path):
    (tmp_path / "d.jsonl").write_text("{}")
    code = (
        "import sys; from jaxalign.cli.main import main\n"
        "for model, data in (('config:/x', '/none.jsonl'), ('/none', 'd.jsonl'), ('~nobody-here/x', 'd.jsonl')):\n"
        "    print(main(['sft', '--model', model, '--data', data, '--output', 'run']))\n"
        "print([m for m in ('jax', 'flax', 'transformers', 'datasets', 'orbax', 'grain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["2", "2", "2", "[]"]
    shown = done.stderr.splitlines()
    assert "--data: data file /none.jsonl does not exist" in shown[0] and "--model: /none: no such folder" in shown[1]
    assert "--model: ~nobody-here/x: there is no such user" in shown[2] and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_is_answered_while_python_cannot_run(caplog):
    caplog.set_level(logging.WARNING, "jaxalign")
    with StopRequest() as stop:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        began = time.time()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000)  # one call into C, as a compilation is
        ended = time.time()
        assert stop.signal == signal.SIGINT
    [record] = caplog.records
    assert "stopping after this step, with a checkpoint" in record.getMessage() and "Ctrl-C" in record.getMessage()
    assert record.created - began < 0.1 + (ended - began) / 2


def test_the_second_signal_ends_a_process_that_cannot_run_python():
    code = (
        "import hashlib, os, signal, threading\n"
        "from jaxalign.training import signals\n"
        "signals.GRACE = 0.1\n"
        "with signals.StopRequest():\n"
        "    for delay in (0.1, 0.3):\n"
        "        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**8)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 130
