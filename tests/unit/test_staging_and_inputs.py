"""Output directories survive failures at the worst moments, and checkpoints with holes are refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import TASKS, config_tree, save_data, save_model
from disks import small_disk as small_disk
from safetensors.torch import load_file, save_file

from loraga_dist.cli import init_main
from loraga_dist.errors import RunError, UserError
from loraga_dist.files import staging
from loraga_dist.files.checksums import check_checksums, write_checksums
from loraga_dist.files.disk import UNFINISHED_MARK
from loraga_dist.files.staging import Destination, StagedDirectory, files_in, free_place
from loraga_dist.ranks.world import World


def strangers(directory: Path) -> list[str]:
    return [name for name in files_in(directory) if name not in ("file", UNFINISHED_MARK)]


@pytest.fixture
def staged(tmp_path: Path) -> StagedDirectory:
    staged = StagedDirectory(Destination(tmp_path / "out", "output.dir", strangers), World.current())
    staged.create(0)
    (staged.path / "file").write_text("new")
    return staged


@pytest.fixture
def replacing(tmp_path: Path, request: pytest.FixtureRequest) -> StagedDirectory:
    """The same where an output was before."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    return request.getfixturevalue("staged")


def test_commit_replaces_and_leaves_nothing_beside(replacing: StagedDirectory, tmp_path: Path) -> None:
    replacing.commit()
    replacing.drop_lock()
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appeared_meanwhile_is_kept(staged: StagedDirectory) -> None:
    staged.destination.mkdir()
    (staged.destination / "file").write_text("another's")
    with pytest.raises(RunError, match="has appeared meanwhile and is kept"):
        staged.commit()
    staged.discard()
    assert (staged.destination / "file").read_text() == "another's"
    assert (staged.path / "file").read_text() == "new", "a finished output is not thrown away"
    shutil.rmtree(staged.destination)
    with pytest.raises(UserError, match="needs the name .*/.out.partial, .* no unfinished work .*; move it away"):
        StagedDirectory(Destination(staged.destination, "output.dir"), World.current()).create(0)
    assert [path.name for path in staged.path.iterdir()] == ["file"], "nor by the next run"


def test_what_was_put_into_the_old_output_meanwhile_is_kept(replacing: StagedDirectory) -> None:
    (replacing.destination / "trained").mkdir()
    (replacing.destination / "trained" / "adapter").write_text("thesis")
    with pytest.raises(RunError, match=f"holds trained/adapter and is kept; the output is in {replacing.path}"):
        replacing.commit()
    assert (replacing.destination / "trained" / "adapter").read_text() == "thesis"
    assert (replacing.path / "file").read_text() == "new"


def test_what_stands_in_the_place_of_the_old_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    staged = StagedDirectory(Destination(tmp_path / "out", "output.dir", lambda _: None), World.current())
    staged.create(0)
    with pytest.raises(RunError, match="is the earlier output no longer and is kept"):
        staged.commit()
    staged.discard()
    assert (tmp_path / "out").is_dir() and staged.path.is_dir()


def test_a_place_is_free_where_all_in_it_is_of_an_earlier_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with pytest.raises(UserError, match="exists; write another directory$"):
        free_place(out, "--to", overwrite=True)
    with pytest.raises(UserError, match="exists; write another directory, or add --overwrite"):
        free_place(out, "--to", strangers=strangers)
    with pytest.raises(UserError, match="is no output of loraga-dist"):
        free_place(out, "--to", strangers=lambda _: None, overwrite=True)
    assert free_place(out, "--to", strangers=strangers, overwrite=True) == Destination(out, "--to", strangers)
    for name in "abcd":
        (out / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match="holds a, b, c and 1 more, not of the output that --overwrite replaces"):
        free_place(out, "--to", strangers=strangers, overwrite=True)


def test_the_lock_is_held_while_the_new_output_is_worked_with(staged: StagedDirectory, tmp_path: Path) -> None:
    staged.commit()
    with pytest.raises(UserError, match="is being written by another run"):
        StagedDirectory(Destination(tmp_path / "out", "output.dir", strangers), World.current()).create(0)
    staged.drop_lock()
    StagedDirectory(Destination(tmp_path / "out", "output.dir", strangers), World.current()).create(0)


def test_what_another_run_has_finished_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for _ in range(2):  # the lock is not kept
        with pytest.raises(UserError, match="exists by now; write another directory"):
            StagedDirectory(Destination(tmp_path / "out", "output.dir"), World.current()).create(0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_cannot_write_one_output(staged: StagedDirectory, tmp_path: Path) -> None:
    other = StagedDirectory(Destination(tmp_path / "out", "output.dir"), World.current())
    with pytest.raises(UserError, match="is being written by another run"):
        other.create(0)
    assert (staged.path / "file").read_text() == "new"
    other = StagedDirectory(Destination(tmp_path / "next" / "out", "output.dir"), World.current())
    other.create(0)
    other.discard()
    assert list((tmp_path / "next").iterdir()) == []


def test_a_lock_whose_file_is_gone_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ended between our opening the file and our locking it."""
    lock = fcntl.flock

    def late_lock(file: Any, how: int) -> None:
        (tmp_path / ".out.lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late_lock)
    with pytest.raises(UserError, match="is being written by another run"):
        StagedDirectory(Destination(tmp_path / "out", "output.dir"), World.current()).create(0)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rename_puts_the_old_directory_back(
    replacing: StagedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = replacing
    rename = Path.rename

    def fails_for_the_new(path: Path, target: Path) -> Path:
        if path == staged.path:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(RunError, match="cannot be put in place"):
        staged.commit()
    staged.discard()
    assert (staged.destination / "file").read_text() == "old"
    assert [path.name for path in staged.path.iterdir()] == ["file"], "a finished output is not thrown away"


def test_a_file_system_without_syncs_of_directories(staged: StagedDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    staged.commit()
    assert (staged.destination / "file").read_text() == "new"


class SeenLate(type(Path())):
    """A path that another node does not see at the first looks."""

    looks = 0

    def is_dir(self) -> bool:
        if self.name != ".out.partial":
            return super().is_dir()
        SeenLate.looks += 1
        return SeenLate.looks > 3 and super().is_dir()


def test_a_place_that_another_node_sees_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = StagedDirectory(Destination(tmp_path / "new" / "out", "output.dir"), World.current())
    staged.path = SeenLate(staged.path)
    staged.create(0)
    assert SeenLate.looks >= 4 and Path(staged.path).is_dir()
    staged.discard()
    monkeypatch.setattr(staging, "SEEN_SECONDS", 0.1)
    SeenLate.looks = -1000
    with pytest.raises(UserError, match="is not seen by rank 0; write a place on a file system that all ranks share"):
        staged.create(0)


def test_a_mount_point_is_refused_before_the_work(small_disk: Path) -> None:
    with pytest.raises(UserError, match="is a mount point, which cannot be renamed; write a directory below it"):
        free_place(small_disk, "output.dir", strangers=lambda _: [], overwrite=True)
    assert free_place(small_disk / "out", "output.dir")


def replace_and_die(destination: Path) -> None:
    """What a run does that is killed between its two renames."""

    def replace() -> None:
        staged = StagedDirectory(Destination(destination, "output.dir", strangers), World.alone())
        staged.create(0)
        (staged.path / "file").write_text("new")
        rename = Path.rename

        def rename_once(path: Path, target: Path) -> Path:
            if path == staged.path:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = rename_once  # type: ignore[method-assign]
        staged.commit()

    die(replace)


def die(work: Callable[[], None]) -> None:
    """Run it in a process of its own, which kills itself in the end."""
    child = os.fork()
    if child == 0:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def start_and_die(destination: Path, num_bytes: int) -> None:
    def start() -> None:
        staged = StagedDirectory(Destination(destination, "output.dir"), World.alone())
        staged.create(0)
        (staged.path / "file").write_bytes(b"x" * num_bytes)

    die(start)


def test_what_a_run_that_died_left_is_removed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_and_die(tmp_path / "out", 1234)
    again = StagedDirectory(Destination(tmp_path / "out", "output.dir"), World.current())
    again.create(0)
    assert f"removed {tmp_path}/.out.partial (1234 bytes), which a run that died had left" in capsys.readouterr().err
    (again.path / "file").write_text("new")
    write_checksums(again.path, World.alone())
    again.commit()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["SHA256SUMS", "file"]
    assert check_checksums(tmp_path / "out", World.alone()) == []


@pytest.mark.parametrize("num_removed", range(5))
def test_what_a_kill_leaves_of_a_removal_is_known_as_ours(tmp_path: Path, num_removed: int) -> None:
    def discard() -> None:
        staged = StagedDirectory(Destination(tmp_path / "out", "output.dir"), World.alone())
        staged.create(0)
        for name in "abc":
            (staged.path / name).touch()
        unlink, left = os.unlink, iter(range(num_removed))

        def unlink_or_die(*arguments: Any, **named: Any) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            unlink(*arguments, **named)

        os.unlink = unlink_or_die
        staged.discard()

    die(discard)
    StagedDirectory(Destination(tmp_path / "out", "output.dir"), World.current()).create(0)


def replace_and_die_removing(destination: Path) -> None:
    """What a run does that is killed when it has removed a file of the old output."""

    def replace() -> None:
        staged = StagedDirectory(Destination(destination, "output.dir", lambda _: []), World.alone())
        staged.create(0)
        (staged.path / "file").write_text("new")
        unlink = Path.unlink

        def unlink_and_die(path: Path, **named: Any) -> None:
            unlink(path, **named)
            if path.name != UNFINISHED_MARK:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.unlink = unlink_and_die  # type: ignore[method-assign]
        staged.commit()

    die(replace)


def test_what_a_kill_leaves_of_an_old_output_is_not_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even where the new output was moved away since."""
    (tmp_path / "out").mkdir()
    for name in ("file", "other"):
        (tmp_path / "out" / name).write_text("old")
    replace_and_die_removing(tmp_path / "out")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["new"]
    (tmp_path / "out").rename(tmp_path / "kept")
    StagedDirectory(Destination(tmp_path / "out", "output.dir", strangers), World.current()).create(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.partial", "kept"]
    assert f"removed {tmp_path}/.out.removed (3 bytes)" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced", ".out.removed"])
@pytest.mark.parametrize("kind", ["directory", "link", "dangling", "file"])
def test_what_is_not_ours_is_neither_removed_nor_renamed(tmp_path: Path, name: str, kind: str) -> None:
    theirs, elsewhere = tmp_path / "here" / name, tmp_path / "elsewhere"
    (elsewhere / "thesis").mkdir(parents=True)
    theirs.parent.mkdir()
    if kind == "directory":
        (theirs / "thesis").mkdir(parents=True)
    elif kind == "file":
        theirs.write_text("thesis")
    else:
        theirs.symlink_to(elsewhere if kind == "link" else tmp_path / "gone")
    problem = f"needs the name {theirs}, and what stands there is no unfinished work of loraga_dist; move it away"
    with pytest.raises(UserError, match=problem):
        StagedDirectory(Destination(tmp_path / "here" / "out", "output.dir"), World.current()).create(0)
    assert [path.name for path in tmp_path.glob("here/*")] == [name] and (elsewhere / "thesis").is_dir()
    assert kind != "directory" or (theirs / "thesis").is_dir()


@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "pipe", "text"])
def test_a_lock_that_is_not_ours_is_left_alone(tmp_path: Path, kind: str) -> None:
    lock, elsewhere = tmp_path / ".out.lock", tmp_path / "elsewhere"
    elsewhere.write_text("thesis")
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "directory":
        lock.mkdir()
    elif kind == "text":
        lock.write_text("thesis")
    else:
        lock.symlink_to(elsewhere if kind == "link" else tmp_path / "gone")
    with pytest.raises(UserError, match="is no unfinished work of loraga_dist; move it away"):
        StagedDirectory(Destination(tmp_path / "out", "output.dir"), World.current()).create(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "elsewhere"]
    assert elsewhere.read_text() == "thesis" and (kind != "text" or lock.read_text() == "thesis")


@pytest.mark.parametrize("path", ["~nobody-of-this-name/out", "a\0b", "x" * 244, "loop/out", "/"])
def test_a_place_that_is_none_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"is no path to write to: .*; write another directory"):
        free_place(Path(path), "--to")
    assert free_place(Path("x" * 243), "--to")


def test_a_run_killed_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    replace_and_die(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.partial", ".out.replaced"]
    StagedDirectory(Destination(tmp_path / "out", "output.dir", strangers), World.current()).create(0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def run(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **sections: dict
) -> tuple[int, str]:
    data = save_data(tmp_path / "data.jsonl")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(model, data, tmp_path / "out", **sections)))
    code = init_main(["--config", str(config), *overrides])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist: ")]
    return code, "".join(lines)


def test_a_checkpoint_with_a_hole_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", shards=False)
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for options in ((), ("--dry_run",)):
        code, said = run(tmp_path, model, capsys, *options)
        assert code == 2 and "'model.norm.weight': the checkpoint lacks it; write one that holds" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "name", "held", "stated"),
    [
        ("llama", {"vocab_size": 260}, "embed_tokens", (258, 64), (260, 64)),
        ("bert", {"max_position_embeddings": 64}, "position_embeddings", (128, 48), (64, 48)),
        ("bert", {"id2label": {0: "no", 1: "yes"}}, "classifier", (3, 48), (2, 48)),
    ],
)
def test_a_config_of_other_sizes_than_the_weights_is_refused(
    kind: str, changes: dict, name: str, held: tuple, stated: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `resize_token_embeddings`, where only one of the two was saved again."""
    model = save_model(tmp_path / "model", kind, shards=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    data = save_data(tmp_path / "of_the_task.jsonl", TASKS[kind])
    sections = {"lora": {"task_type": TASKS[kind]}, "calibration": {"data_files": str(data)}}
    for options in ((), ("--dry_run",)):
        code, said = run(tmp_path, model, capsys, *options, **sections)
        assert code == 2 and f"{name}.weight has shape {held}, the model's config says {stated}; mend its" in said


def test_an_output_that_holds_the_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "out" / "residual_base")
    (tmp_path / "out" / "loraga_report.json").write_text("{}")
    write_checksums(tmp_path / "out", World.alone())
    code, said = run(tmp_path, model, capsys, output={"dir": str(tmp_path / "out"), "overwrite": True})
    assert code == 2 and "holds the base model" in said
    assert (model / "config.json").exists()


def test_an_output_that_holds_the_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loraga_report.json").write_text("{}")
    data = save_data(tmp_path / "out" / "data.jsonl")
    sections = {"calibration": {"data_files": [str(data)]}, "output": {"dir": str(tmp_path / "out"), "overwrite": True}}
    code, said = run(tmp_path, model, capsys, **sections)
    assert code == 2 and f"output.dir: '{tmp_path}/out': holds {data}, which is read" in said
    assert data.exists()


def test_a_directory_with_the_name_of_the_checkpoint_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    (tmp_path / ".out.checkpoint" / "thesis").mkdir(parents=True)
    for resume in ("auto", "never"):
        code, said = run(tmp_path, model, capsys, "--resume", resume)
        assert code == 2 and f"{tmp_path}/.out.checkpoint/thesis is not of one; move it away" in said
    assert (tmp_path / ".out.checkpoint" / "thesis").is_dir() and not (tmp_path / ".out.partial").exists()


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would load it on top of the model."""
    model = save_model(tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    code, said = run(tmp_path, model, capsys)
    assert code == 2 and "has an adapter_config.json beside its weights" in said
