"""Rows of metrics: what is on disk after an interruption, and what a person sees."""

import errno
import importlib.machinery
import io
import json
import math
import os
import sys
import types

import pytest

from jaxalign.mistake import Mistake
from jaxalign.training.metrics import Console, JsonLines, Recorder, deterministic, format_row, peak_flops, read_rows


def row(step, **more):
    return {"step": step, "loss": 1.0 / step, **more}


def write(folder, steps, *, resumed_at=-1, total=9):
    folder.mkdir(exist_ok=True)
    recorder = Recorder(folder, total_steps=total, resumed_at=resumed_at, stream=io.StringIO())
    for step in steps:
        recorder(row(step))
    recorder.close()


def test_after_a_resume_every_step_has_one_row_in_order(tmp_path):
    write(tmp_path, range(1, 7))
    write(tmp_path, range(5, 10), resumed_at=4)  # the newest checkpoint was of step 4
    assert read_rows(tmp_path / "metrics.jsonl") == [row(step) for step in range(1, 10)]


def test_rows_that_two_processes_wrote_at_once_are_one_for_each_step_again_after_a_resume(tmp_path):
    write(tmp_path, range(1, 7))
    write(tmp_path / "other", range(3, 9))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write((tmp_path / "other" / "metrics.jsonl").read_text())
    write(tmp_path, range(6, 10), resumed_at=5)
    assert read_rows(tmp_path / "metrics.jsonl") == [row(step) for step in range(1, 10)]


def test_a_half_written_last_line_is_dropped_on_resume_and_never_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [r["step"] for r in read_rows(path)] == [1, 2]
    write(tmp_path, [3], resumed_at=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_damaged_lines_are_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(row(step)).encode() for step in (1, 2, 3)]
    damaged = [b'{"step": "2"}', b'{"step": null}', b"[]", b"7", b'{"loss": 1.0}', b"\xff", b"{" * 10**5]
    damaged += [b'{"step": 2, "eval_loss": "low"}', b'{"step": 1e400}', b""]
    path.write_bytes(b"\n".join([good[0], *damaged, *good[1:]]) + b"\n")
    assert read_rows(path) == [row(1), row(2), row(3)]
    assert f"{len(damaged)} damaged lines are left out, the first is line 2" in caplog.text
    write(tmp_path, [3], resumed_at=2)
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "a\x1b b", "x" * 200, "a\nb"])
def test_an_id_of_weights_and_biases_that_is_none_is_refused(content, tmp_path, monkeypatch):
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "wandb_run_id").write_text(content)
    with pytest.raises(Mistake, match=r"wandb_run_id holds .* no id of Weights & Biases; delete it for a new one"):
        Recorder(tmp_path, total_steps=1, wandb="project", stream=io.StringIO())


def test_a_run_that_starts_again_leaves_no_row_of_the_one_before(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert read_rows(tmp_path / "metrics.jsonl") == [row(1)]


def test_what_json_has_no_number_for_is_null(tmp_path):
    JsonLines(tmp_path / "m.jsonl").write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "ok": 1.5})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null, "ok": 1.5}\n'


def test_only_what_a_clock_measured_differs_between_two_runs_of_the_same():
    one = {"step": 1, "loss": 2.0, "step_seconds": 0.1, "tokens_per_second": 10.0, "mfu": 0.4}
    assert deterministic(one) == deterministic(one | {"step_seconds": 0.2, "mfu": 0.2}) == {"step": 1, "loss": 2.0}
    assert deterministic(one) != deterministic(one | {"loss": 2.1})


def test_utilisation_is_the_share_of_the_peak_that_the_tokens_need(tmp_path):
    recorder = Recorder(tmp_path, total_steps=1, flops_per_token=6e9, peak_flops=4e13, stream=io.StringIO())
    recorder(row(1, tokens_per_second=2000.0))
    recorder.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["mfu"] == pytest.approx(0.3)  # 2000 x 6e9 / 4e13


def test_the_line_tells_progress_loss_speed_and_the_time_left():
    values = {"step": 20, "loss": 1.23456, "tokens_per_second": 12_345.6, "step_seconds": 50.0, "mfu": 0.401}
    assert format_row(values, 100) == "step 20/100  loss 1.2346  12,346 tokens/s  MFU 40.1 %  1:06:40 left"
    assert format_row({"step": 0, "eval_loss": 2.0}, 100) == "step 0/100  eval_loss 2.0000"
    assert "skipped 2" in format_row({"step": 3, "skipped_steps": 2}, 9)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_that_changes_and_lines_that_last_for_evaluations():
    stream = Terminal()
    console = Console(4, stream)
    for values in (row(1), row(2), row(3, eval_loss=0.5), row(4)):
        console.show(values)
    shown = [line.split("\r\x1b[K")[-1] for line in stream.getvalue().split("\n")]  # what a line ends up as
    assert [text.split("  ")[0] for text in shown] == ["step 1/4", "step 3/4", "step 4/4", ""]


def test_a_log_file_has_few_lines_and_no_control_characters():
    stream = io.StringIO()
    console = Console(500, stream)
    for step in range(1, 501):
        console.show(row(step))
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and len(lines) < 10
    assert lines[0].startswith("step 1/500") and lines[-1].startswith("step 500/500")


def test_a_log_on_a_full_disk_is_named_with_the_way_out():
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Mistake, match=r"the log cannot be written \(No space left on device\); make room"):
        Console(10, Full()).show(row(1))


def test_the_peak_of_a_chip_is_that_of_its_longest_known_name():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("cpu") is None
