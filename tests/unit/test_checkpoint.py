"""Saved state: read back as written, finished parts once, two generations, damage found, nothing half-written used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks

from loraga_dist.errors import LoragaError, RunError, UserError
from loraga_dist.files import disk
from loraga_dist.files.checkpoint import Checkpoint, CheckpointStore, Found
from loraga_dist.files.checksums import write_checksums
from loraga_dist.ranks.world import World


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoint", World.alone())


def save(store: CheckpointStore, number: int) -> None:
    tensors = {"a": torch.full((3, 5), float(number)), "b": torch.arange(number, dtype=torch.float64)}
    store.save({"number": number}, tensors)


def finish(store: CheckpointStore, number: int) -> None:
    store.finish({"number": number}, {"a": torch.full((2, 3), float(number))})


def number(store: CheckpointStore) -> int | None:
    newest = store.read().newest
    return None if newest is None else newest.content["number"]


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_the_newest_comes_back_as_it_was(store: CheckpointStore) -> None:
    assert store.read() == Found([], None, [])
    for i in range(1, 5):
        save(store, i)
    found = store.read().newest
    assert found is not None and not store.read().problems and found.content["number"] == 4
    assert torch.equal(found.tensors["a"], torch.full((3, 5), 4.0))
    assert torch.equal(found.tensors["b"], torch.arange(4, dtype=torch.float64))
    assert names(store) == ["000003", "000004"]
    store.clear()
    assert not store.directory.exists() and store.read() == Found([], None, [])


def test_finished_parts_are_written_once_and_end_the_generations_before_them(store: CheckpointStore) -> None:
    save(store, 1)
    finish(store, 0)
    written = (store.directory / "finished-000000" / "state.json").stat().st_mtime_ns
    save(store, 2)
    finish(store, 1)
    save(store, 3)
    assert names(store) == ["000001", "finished-000000", "finished-000001"]
    assert (store.directory / "finished-000000" / "state.json").stat().st_mtime_ns == written
    found = CheckpointStore(store.directory, World.alone()).read()
    assert [part.content["number"] for part in found.finished] == [0, 1]
    assert torch.equal(found.finished[1].tensors["a"], torch.full((2, 3), 1.0))
    assert found.newest is not None and found.newest.content["number"] == 3


def test_a_damaged_part_is_finished_again(store: CheckpointStore) -> None:
    finish(store, 0)
    finish(store, 1)
    save(store, 2)
    (store.directory / "finished-000001" / "state.json").write_text("{}")
    again = CheckpointStore(store.directory, World.alone())
    found = again.read()
    assert [part.content["number"] for part in found.finished] == [0] and found.newest is None
    assert len(found.problems) == 1 and "finished-000001 is damaged" in found.problems[0]
    save(again, 7)
    assert number(CheckpointStore(store.directory, World.alone())) == 7
    finish(again, 5)
    assert [part.content["number"] for part in again.read().finished] == [0, 5] and number(again) is None


def test_parts_behind_a_damaged_one_go_when_it_is_finished_again(store: CheckpointStore) -> None:
    finish(store, 0)
    finish(store, 1)
    (store.directory / "finished-000000" / "state.json").write_text("{}")
    again = CheckpointStore(store.directory, World.alone())
    assert again.read().finished == []
    finish(again, 5)
    assert names(store) == ["finished-000000"]


def test_a_state_of_another_version_is_given_to_whoever_refuses_it(store: CheckpointStore) -> None:
    save(store, 1)
    path = store.directory / "000001"
    (path / "state.json").write_text(json.dumps({"number": 1}))
    write_checksums(path, World.alone())
    assert number(store) == 1


def test_a_state_without_tensors(store: CheckpointStore) -> None:
    store.save({"number": 7}, {})
    found = store.read().newest
    assert found is not None and found.content["number"] == 7 and found.tensors.slots == {}


def test_a_state_may_have_more_than_other_json(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished part holds the singular values of all its targets."""
    store.finish({"number": 1, "facts": [1 / 3] * 1000}, {"a": torch.zeros(2, 3)})
    monkeypatch.setattr(disk, "MAX_JSON_BYTES", 1000)
    assert [part.content["number"] for part in store.read().finished] == [1] and store.peek("number") == 1


@pytest.mark.parametrize("name", ["state.json", "state-00001-of-00001.safetensors", "state.safetensors.index.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_generation_gives_way_to_the_one_before(store: CheckpointStore, name: str, damage: str) -> None:
    save(store, 1)
    save(store, 2)
    path = store.directory / "000002" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = store.read()
    assert found.newest is not None and found.newest.content["number"] == 1
    assert len(found.problems) == 1 and "000002 is damaged" in found.problems[0] and name in found.problems[0]
    (store.directory / "000001" / "SHA256SUMS").write_text("")
    assert number(store) is None


def test_a_whole_generation_outlives_a_damaged_one(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    (store.directory / "000002" / "state.json").write_text("{}")
    again = CheckpointStore(store.directory, World.alone())
    assert number(again) == 1
    save(again, 3)
    assert names(store) == ["000001", "000003"]


@pytest.mark.parametrize("step", ["save", "finish", "clear"])
def test_a_kill_while_state_is_removed_damages_nothing(
    store: CheckpointStore, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(store, 0)
    save(store, 1)
    save(store, 2)

    def be_killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            next(path.rglob("state.json")).unlink()
            raise KeyboardInterrupt

    def check(saved: Checkpoint, num_finished: int | None) -> None:
        if num_finished == 2:
            raise ValueError("a state within another group")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", be_killed)
        {"save": lambda: save(store, 3), "finish": lambda: finish(store, 1), "clear": store.clear}[step]()
    again = CheckpointStore(store.directory, World.alone())
    again.require_ours()
    found = again.read(check)
    assert found.problems == []
    kept = [part.content["number"] for part in found.finished], found.newest and found.newest.content["number"]
    assert kept == {"save": ([0], 3), "finish": ([0, 1], None), "clear": ([], None)}[step]
    save(again, 4)
    assert number(again) == 4 and not any("unfinished" in name for name in names(store))


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(store: CheckpointStore, name: str) -> None:
    save(store, 1)
    save(store, 2)
    (store.directory / "000002" / name).unlink()
    os.mkfifo(store.directory / "000002" / name)
    assert store.peek("number") == 1 and number(store) == 1


@pytest.mark.parametrize("name", ["unfinished", "unfinished-000003", "unfinished-finished-000000"])
def test_an_unfinished_generation_does_not_count(store: CheckpointStore, name: str) -> None:
    save(store, 1)
    (store.directory / "000001").rename(store.directory / name)
    store.require_ours()
    assert number(store) is None
    save(store, 2)
    assert number(store) == 2 and names(store) == ["000001"]


def finish_as_two_nodes(root: Path, stale: list[str]) -> str:
    """Two parts, the second by a node to which names still lead to where they led before; how that failed.

    The second rank's directory is made of links, as its cache of a network file system would resolve the names.
    """
    world = World.start()
    directory = root / ("checkpoint" if world.is_main else "of_rank_1")
    store, tensor = CheckpointStore(directory, world), torch.full((3,), float(world.rank))
    store.finish({"number": 0}, {f"of {world.rank}": tensor})
    if not world.is_main:
        for name in stale:
            (directory / name).unlink()
            (directory / name).symlink_to(root / "checkpoint" / "finished-000000")
    try:
        store.finish({"number": 1}, {f"of {world.rank}": tensor + 10})
    except LoragaError as error:
        return str(error)
    return ""


OF_ONE_PART = ["unfinished", "unfinished-finished-000000"]


@pytest.mark.parametrize("stale", [OF_ONE_PART, [*OF_ONE_PART, "unfinished-finished-000001"]], ids=["past", "all"])
def test_names_that_lead_to_the_part_before_on_another_node(tmp_path: Path, stale: list[str]) -> None:
    (tmp_path / "of_rank_1").mkdir()
    for name in [*OF_ONE_PART, "unfinished-finished-000001"]:
        (tmp_path / "of_rank_1" / name).symlink_to(tmp_path / "checkpoint" / name)
    told = run_on_ranks(finish_as_two_nodes, 2, tmp_path, stale)
    store = CheckpointStore(tmp_path / "checkpoint", World.alone())
    if stale == OF_ONE_PART:
        found = store.read()
        assert told == ["", ""] and found.problems == []
        parts = [[part.tensors[f"of {rank}"].tolist() for rank in range(2)] for part in found.finished]
        assert parts == [[[0.0] * 3, [1.0] * 3], [[10.0] * 3, [11.0] * 3]]
    else:
        problem = "is not what the ranks have written (shard state-00002-of-00002.safetensors is missing)"
        assert told[0] == told[1] and problem in told[0]
        assert names(store) == ["finished-000000"]


def test_a_state_that_cannot_be_written_leaves_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left"):
        patch.setattr(Path, "rename", full)
        save(store, 1)
    assert not store.directory.exists() and not store.holds_work
    save(store, 1)
    assert store.holds_work
    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left"):
        patch.setattr(Path, "rename", full)
        save(store, 2)
    assert names(store) == ["000001"] and store.holds_work


@pytest.mark.parametrize(
    ("name", "goes_on"),
    [
        ("unfinished-000001/state.json", False),
        ("residual_base/model.safetensors", False),
        ("residual_base/model.safetensors.json", True),
        ("finished-000000/state.json", True),
    ],
)
def test_what_a_run_could_go_on_from(store: CheckpointStore, name: str, goes_on: bool) -> None:
    (store.directory / name).parent.mkdir(parents=True)
    (store.directory / name).touch()
    assert store.holds_work == goes_on


def test_a_refusing_file_system_leaves_what_was_there(store: CheckpointStore) -> None:
    save(store, 1)
    full = CheckpointStore(Path("/dev/full/checkpoint"), World.alone())
    with pytest.raises(RunError, match="/dev/full"):
        save(full, 2)
    assert number(store) == 1


@pytest.mark.parametrize("name", ["thesis", "000001/thesis", "residual_base/thesis", "000001"])
def test_what_is_not_ours_is_refused_and_stays(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    store.require_ours()  # nothing is there
    save(store, 7)
    store.require_ours()
    path = store.directory / name
    path.parent.mkdir(exist_ok=True)
    if name == "000001":
        shutil.rmtree(path)
        path.symlink_to(tmp_path)
    else:
        path.write_text("mine")
    with pytest.raises(UserError, match=f"{path} is not of one; move it away"):
        store.require_ours()
    assert path.exists()


def test_an_index_that_leads_outside_is_refused(store: CheckpointStore) -> None:
    save(store, 1)
    index = store.directory / "000001" / "state.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    write_checksums(index.parent, World.alone())
    found = store.read()
    assert found.newest is None and "outside the directory" in found.problems[0]


@pytest.mark.parametrize("text", ["[1]", "7", "[" * 100_000, "{", '{"number": "x"}', "{}"])
def test_content_that_is_none_gives_way_to_the_one_before(store: CheckpointStore, text: str) -> None:
    save(store, 1)
    save(store, 2)
    path = store.directory / "000002"
    (path / "state.json").write_text(text)
    write_checksums(path, World.alone())

    def check(saved: Checkpoint, num_finished: int | None) -> None:
        assert num_finished == 0
        if saved.content["number"] < 1:
            raise ValueError("less than 1")

    found = store.read(check)
    assert found.newest is not None and found.newest.content["number"] == 1
    assert len(found.problems) == 1 and found.problems[0].startswith(f"{path} is damaged (")
    save(store, 3)
    assert store.read(check).newest.content["number"] == 3  # type: ignore[union-attr]
