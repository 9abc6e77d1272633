"""Standard streams that are full, closed, or read by nobody: what was done is not undone by them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

COMMAND = """
import sys
from loraga_dist.ranks.session import run_alone
from loraga_dist.ranks.words import require_said

def work():
    print("x" * {length})
    print("to stderr", file=sys.stderr)
    with open({path!r}, "w") as file:
        file.write("the work")
    {end}

sys.exit(run_alone(work))
"""


def run_in_shell(redirect: str, path: Path, *, length: int = 10, end: str = "") -> subprocess.CompletedProcess[str]:
    """The exit code is the command's own, also before a pipe."""
    command = [sys.executable, "-c", COMMAND.format(length=length, path=str(path), end=end)]
    script = f'set -o pipefail; "$@" {redirect}'
    shell = ["bash", "-c", script, "shell", *command]
    done = subprocess.run(shell, env=environment(), capture_output=True, text=True, timeout=60)
    assert path.read_text() == "the work", "a closed stream's number went to the file"
    return done


FULL = "loraga-dist: standard output: No space left on device; what it was to show is lost\n"


@pytest.mark.parametrize("length", [10, 10**6])
@pytest.mark.parametrize(
    ("redirect", "said"),
    [
        (
            ">/dev/full",
            "to stderr\nloraga-dist: standard output: No space left on device; what it was to show is lost\n",
        ),
        (">&-", "to stderr\n"),
        ("| true", "to stderr\n"),
        ("2>/dev/full", ""),
        ("2>&-", ""),
        (">&- 2>&- <&-", ""),
        (">/dev/full 2>/dev/full", ""),
    ],
)
def test_words_that_cannot_be_said_end_nothing(redirect: str, said: str, length: int, tmp_path: Path) -> None:
    done = run_in_shell(redirect, tmp_path / "work", length=length)
    assert (done.returncode, done.stderr) == (0, said)


def test_an_error_has_its_exit_code_where_it_cannot_be_said(tmp_path: Path) -> None:
    failing = "raise ValueError"
    assert run_in_shell("2>/dev/full", tmp_path / "work", end=failing).returncode == 3
    assert run_in_shell("2>&-", tmp_path / "work", end=failing).returncode == 3


def test_words_that_are_the_whole_work_must_be_said(tmp_path: Path) -> None:
    done = run_in_shell(">/dev/full", tmp_path / "work", end="require_said()")
    assert done.returncode == 3
    assert done.stderr == "to stderr\nloraga-dist: standard output: No space left on device\n"
    assert run_in_shell("| true", tmp_path / "work", end="require_said()").returncode == 0


def test_torchrun_is_left_the_line_for_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from loraga_dist.ranks.words import say_why

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    say_why("lora.r: 0: must be 1 or more", "a note")
    assert json.loads(file.read_text()) and [path.name for path in tmp_path.iterdir()] == ["error.json"]
    failures = {1: ProcessFailure(1, 11, 2, ""), 0: ProcessFailure(0, 10, 2, str(file))}
    *_, line, border = str(ChildFailedError("launch/init.py", failures)).splitlines()
    assert line == "  traceback : loraga-dist: lora.r: 0: must be 1 or more" and set(border) == {"="}
