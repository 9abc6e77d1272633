"""Generations of saved state: read back as written, two kept, damage found, nothing half-written taken for whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loraga_dist.errors import RunError
from loraga_dist.files.checkpoint import CheckpointStore
from loraga_dist.files.checksums import write_checksums
from loraga_dist.ranks.world import World


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoint", World.alone())


def save(store: CheckpointStore, number: int) -> None:
    tensors = {"a": torch.full((3, 5), float(number)), "b": torch.arange(number, dtype=torch.float64)}
    store.save({"number": number}, tensors)


def number(store: CheckpointStore) -> int | None:
    found, _ = store.newest()
    return None if found is None else found.content["number"]


def test_the_newest_comes_back_as_it_was(store: CheckpointStore) -> None:
    assert store.newest() == (None, [])
    for i in range(1, 5):
        save(store, i)
    found, damaged = store.newest()
    assert found is not None and not damaged and found.content == {"number": 4}
    assert torch.equal(found.tensors["a"], torch.full((3, 5), 4.0))
    assert torch.equal(found.tensors["b"], torch.arange(4, dtype=torch.float64))
    assert sorted(path.name for path in store.directory.iterdir()) == ["000003", "000004"]
    store.clear()
    assert not store.directory.exists() and store.newest() == (None, [])


def test_a_state_without_tensors(store: CheckpointStore) -> None:
    store.save({"number": 7}, {})
    found, _ = store.newest()
    assert found is not None and found.content == {"number": 7} and found.tensors.slots == {}


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
    found, damaged = store.newest()
    assert found is not None and found.content == {"number": 1}
    assert len(damaged) == 1 and "000002 is damaged" in damaged[0] and name in damaged[0]
    (store.directory / "000001" / "SHA256SUMS").write_text("")
    assert number(store) is None


def test_a_whole_generation_outlives_a_damaged_one(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    (store.directory / "000002" / "state.json").write_text("{}")
    again = CheckpointStore(store.directory, World.alone())
    assert number(again) == 1
    save(again, 3)
    assert sorted(path.name for path in store.directory.iterdir()) == ["000001", "000003"]


def test_an_unfinished_generation_does_not_count(store: CheckpointStore) -> None:
    save(store, 1)
    (store.directory / "000001").rename(store.directory / "unfinished")
    assert number(store) is None
    save(store, 2)
    assert number(store) == 2 and [path.name for path in store.directory.iterdir()] == ["000001"]


def test_a_refusing_file_system_leaves_what_was_there(store: CheckpointStore) -> None:
    save(store, 1)
    full = CheckpointStore(Path("/dev/full/checkpoint"), World.alone())
    with pytest.raises(RunError, match="/dev/full"):
        save(full, 2)
    assert number(store) == 1


def test_an_index_that_leads_outside_is_refused(store: CheckpointStore) -> None:
    save(store, 1)
    index = store.directory / "000001" / "state.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    write_checksums(index.parent, World.alone())
    with pytest.raises(RunError, match="outside the directory"):
        store.newest()
