"""`clean` shows and removes what runs that died have left, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_staging_and_inputs import replace_and_die, replace_and_die_removing, start_and_die

from loraga_dist.cli import main
from loraga_dist.files.checkpoint import CheckpointStore
from loraga_dist.files.staging import Destination, StagedDirectory
from loraga_dist.ranks.world import World


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A place beside which a run that died has left all that one can, in a directory with other files."""
    start_and_die(tmp_path / "out", 4321)
    CheckpointStore(tmp_path / ".out.checkpoint", World.alone()).save({"work": {}}, {"a": torch.ones(3)})
    (tmp_path / ".out.checkpoint" / "residual_base").mkdir()
    (tmp_path / ".out.checkpoint" / "residual_base" / "model.safetensors.json").write_text("{}")
    (tmp_path / "notes").write_text("mine")
    return tmp_path


def test_it_shows_first_and_removes_with_yes(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(left)
    assert main(["clean", str(left / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{left}/.out.partial: 0.0 MiB" in said and f"{left}/.out.lock: 0.0 MiB" in said and "--yes" in said
    assert f"{left}/.out.checkpoint: " in said
    assert names(left) == before
    assert main(["clean", str(left / "out"), "--yes"]) == 0
    assert names(left) == ["notes"]
    assert main(["clean", str(left / "out"), "--yes"]) == 0
    assert "nothing is left" in capsys.readouterr().out and names(left) == ["notes"]


def test_an_output_that_was_about_to_be_replaced_is_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    replace_and_die(tmp_path / "out")
    assert main(["clean", str(tmp_path / "out"), "--yes"]) == 0
    assert "is put back" in capsys.readouterr().out
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


def test_what_is_left_of_an_old_output_is_not_put_back(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("file", "other"):
        (tmp_path / "out" / name).write_text("old")
    replace_and_die_removing(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "kept")
    assert main(["clean", str(tmp_path / "out"), "--yes"]) == 0
    assert names(tmp_path) == ["kept"]


def test_not_while_a_run_writes(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = StagedDirectory(Destination(left / "out", "output.dir"), World.current())
    running.create(0)
    before = names(left)
    assert main(["clean", str(left / "out"), "--yes"]) == 2
    assert "is being written by another run" in capsys.readouterr().err and names(left) == before
    running.discard()


@pytest.mark.parametrize(
    "theirs", [".out.replaced/thesis", ".out.checkpoint/thesis", ".out.checkpoint/000001/thesis", ".out.lock"]
)
def test_what_is_not_ours_stays_and_so_does_the_rest(
    left: Path, capsys: pytest.CaptureFixture[str], theirs: str
) -> None:
    (left / theirs).parent.mkdir(exist_ok=True)
    (left / theirs).write_text("mine")
    assert main(["clean", str(left / "out"), "--yes"]) == 2
    assert "move it away" in capsys.readouterr().err
    assert (left / theirs).read_text() == "mine" and (left / ".out.partial").is_dir()


def test_links_are_not_followed(left: Path, tmp_path: Path) -> None:
    (left / "elsewhere").mkdir()
    (left / "elsewhere" / "thesis").write_text("mine")
    (left / ".out.partial" / "link").symlink_to(left / "elsewhere")
    assert main(["clean", str(left / "out"), "--yes"]) == 0
    assert names(left) == ["elsewhere", "notes"] and (left / "elsewhere" / "thesis").is_file()


def test_a_checkpoint_that_is_a_link_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere" / "000001").mkdir(parents=True)
    (tmp_path / ".out.checkpoint").symlink_to(tmp_path / "elsewhere")
    assert main(["clean", str(tmp_path / "out"), "--yes"]) == 2
    assert names(tmp_path / "elsewhere") == ["000001"] and "is no checkpoint" in capsys.readouterr().err


def test_a_place_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", str(tmp_path / "gone" / "out"), "--yes"]) == 2
    assert names(tmp_path) == [] and "has no place" in capsys.readouterr().err
