"""The run folder: the commit of the working folder, read without git; and a full disk, where something is written."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from jaxalign.mistake import Mistake
from jaxalign.models.files.save import complete_folder
from jaxalign.outside import writing
from jaxalign.run import folder
from jaxalign.training.metrics import JsonLines

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def commit_here(path, monkeypatch):
    monkeypatch.chdir(path)
    return folder.git_commit()


def git(path, *arguments):
    # hooks and settings of the user's own would decide what is tested
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=path, env=environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / "inside").mkdir(parents=True)
    git(root, "init", "-q", "-b", "main")
    (root / "file").write_text("text")
    git(root, "add", "file")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_the_commit_is_that_of_git_whether_refs_are_files_or_packed_detached_or_of_a_worktree(repository, monkeypatch):
    expected = git(repository, "rev-parse", "HEAD")
    assert commit_here(repository / "inside", monkeypatch) == expected
    git(repository, "worktree", "add", "-q", str(repository.parent / "tree"), "-b", "other")
    assert commit_here(repository.parent / "tree", monkeypatch) == expected
    git(repository, "pack-refs", "--all")
    assert commit_here(repository, monkeypatch) == commit_here(repository.parent / "tree", monkeypatch) == expected
    git(repository, "checkout", "-q", "--detach")
    assert commit_here(repository, monkeypatch) == expected


@pytest.mark.parametrize(
    "setting", ["core.fsmonitor", "core.pager", "diff.external", "filter.x.clean", "core.sshCommand", "core.hooksPath"]
)
def test_no_setting_of_the_folder_makes_a_program_run(setting, repository, monkeypatch):
    expected, trace = git(repository, "rev-parse", "HEAD"), repository / "trace"
    program = repository / "program"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    git(repository, "config", setting, str(program))
    (repository / ".gitattributes").write_text("* filter=x\n")
    (repository / "file").write_text("other")  # so that git would look into it
    assert commit_here(repository, monkeypatch) == expected
    assert not trace.exists()


@pytest.mark.parametrize(
    "head", ["", "ref: ../../secret", "ref: /etc/hostname", "ref: refs/heads/gone", "text", "ref: \0"]
)
def test_a_damaged_head_is_no_commit(head, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("password")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text(head)
    assert commit_here(tmp_path, monkeypatch) is None


def test_other_weights_than_the_run_began_with_are_named_and_an_older_run_has_none_to_compare(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"weights": {"`model` base": "1", "`ref_model` other": "2"}}))
    folder.check_weights(path, {"`model` base": "1", "`reward` reward_model later": "3"})
    with pytest.raises(Mistake, match=r"the weights or config of `ref_model` other have changed since .* was started"):
        folder.check_weights(path, {"`model` base": "1", "`ref_model` other": "3"})
    path.write_text("{}")
    folder.check_weights(path, {"`model` base": "1"})


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_with_the_path_and_the_way_out(tmp_path, monkeypatch):
    message = r"cannot be written \(No space left on device\); make room there and run the same command again"
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(Mistake, match=rf"metrics.jsonl {message}"):
            lines.write({"step": 1})
    with pytest.raises(Mistake, match=rf"final {message}"), complete_folder(tmp_path / "final") as partial:
        assert partial.is_dir()
        full()
    assert not list(tmp_path.iterdir())  # nothing of it is left, which would fill the disk
    with pytest.raises(Mistake, match="File too large"), writing(tmp_path):  # as libraries in Rust say it
        raise Exception("Error while serializing: I/O error: File too large (os error 27)")
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
