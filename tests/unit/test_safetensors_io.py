from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraga_dist.errors import RunError, UserError
from loraga_dist.files.safetensors_io import SafetensorsWriter, read_header, read_range, read_rows
from loraga_dist.model.base import read_checkpoint_index, resolve_model_dir

INDEX = "model.safetensors.index.json"


def all_dtypes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 6, generator=generator)
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    integers = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): noise.to(dtype) for dtype in floats}
    tensors |= {str(dtype): (noise * 9).abs().to(dtype) for dtype in integers}
    return tensors | {"scalar": torch.tensor(2.5, dtype=torch.float16), "empty": torch.empty(0, 3)}


def widest_first(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """a and b in one shard, c in another."""
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(8)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, a="model-00001-of-00002.safetensors", b="model-00001-of-00002.safetensors")
    return tmp_path


def write_index(directory: Path, **shard_of: str) -> None:
    weight_map = {"c": "model-00002-of-00002.safetensors"} | shard_of
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = all_dtypes()
    save_file(tensors, tmp_path / "model.safetensors")
    index = read_checkpoint_index(tmp_path)
    assert_same({name: read_range(slot, 0, slot.numel).view(slot.shape) for name, slot in index.items()}, tensors)


def test_reads_ranges_and_rows(tmp_path: Path) -> None:
    whole = torch.randn(7, 3, 2).to(torch.bfloat16)
    save_file({"first": torch.ones(3), "whole": whole}, tmp_path / "model.safetensors")
    slot = read_checkpoint_index(tmp_path)["whole"]
    assert torch.equal(read_rows(slot, 2, 5), whole[2:5])
    assert torch.equal(read_range(slot, 5, 11), whole.view(-1)[5:11])
    assert read_range(slot, 4, 4).shape == (0,)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_safetensors_reads_what_we_write_in_chunks(tmp_path: Path, chunk: int) -> None:
    tensors = all_dtypes()
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, widest_first(tensors)) as writer:
        for name in widest_first(tensors):
            for piece in tensors[name].reshape(-1).split(chunk):
                writer.append(name, piece)
    assert_same(load_file(path), tensors)
    assert path.stat().st_size == writer.num_bytes
    slots = read_header(path)
    assert all(slot.offset % slot.dtype.itemsize == 0 for slot in slots.values())


def test_writer_refuses_another_order_size_or_dtype(tmp_path: Path) -> None:
    entries = {"a": (torch.float32, (2, 2)), "b": (torch.float32, (3,))}
    mistakes = [
        lambda writer: writer.append("b", torch.ones(3)),
        lambda writer: writer.append("a", torch.ones(5)),
        lambda writer: writer.append("a", torch.ones(4, dtype=torch.float64)),
        lambda writer: writer.append("a", torch.ones(4)),
    ]
    for mistake in mistakes:
        with pytest.raises(AssertionError), SafetensorsWriter(tmp_path / "model.safetensors", entries) as writer:
            mistake(writer)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="widest|wider"):
        SafetensorsWriter(tmp_path / "x", {"a": (torch.int8, (1,)), "b": (torch.float32, (1,))})


def test_unwritable_path_is_a_run_error_with_path_and_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"file/model\.safetensors \(\d+ bytes\) cannot be written"),
        SafetensorsWriter(tmp_path / "file" / "model.safetensors", {"a": (torch.float32, (2,))}),
    ):
        pass


def test_a_directory_that_another_rank_has_removed_is_not_made_again(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"gone/model\.safetensors .* cannot be written \(No such file or directory\)"),
        SafetensorsWriter(tmp_path / "gone" / "model.safetensors", {"a": (torch.float32, (2,))}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_a_run_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").symlink_to("/dev/full")
    with (
        pytest.raises(RunError, match="No space left"),
        SafetensorsWriter(tmp_path / "model.safetensors", {"a": (torch.float32, (2,))}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_cut_during_the_run_is_a_run_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    slot = read_checkpoint_index(tmp_path)["a"]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(RunError, match=r"model\.safetensors ended at byte \d+, within a"):
        read_range(slot, 0, 100)
    assert torch.equal(read_range(slot, 0, 99), torch.ones(99))
    path.unlink()
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        read_range(slot, 0, 1)


def test_sharded_index(sharded: Path) -> None:
    index = read_checkpoint_index(sharded)
    assert list(index) == ["c", "a", "b"]
    assert torch.equal(read_rows(index["a"], 1, 2), torch.tensor([[3.0, 4.0, 5.0]]))


def test_links_of_a_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for path in sharded.glob("model*"):
        (snapshot / path.name).symlink_to(Path("..", "..", path.name))
    assert read_checkpoint_index(snapshot).keys() == {"a", "b", "c"}


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint_index(directory)
    text = str(caught.value)
    assert caught.value.key == "model.name_or_path" and "\n" not in text
    return text


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert "pickled weights only (pytorch_model.bin)" in refused(tmp_path)
    assert "save_pretrained" in refused(tmp_path)


def test_empty_directory_and_adapter_directory(tmp_path: Path) -> None:
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refused(tmp_path)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors is missing" in refused(sharded)


def test_truncated_shard_names_both_sizes(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    size = path.stat().st_size
    for keep in (size - 1, 20, 3, 0):
        os.truncate(path, keep)
        message = refused(sharded)
        assert f"{path.name} is truncated" in message and f"{keep} there" in message
        if keep == size - 1:
            assert f"{size} bytes expected" in message


def test_broken_headers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def write(header: object, data: bytes = b"") -> str:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return refused(tmp_path)

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "is not JSON" in write(b"\xff{]")
    assert "is not JSON" in write([1])
    assert "is not JSON" in write({"a": {"dtype": "F32"}})
    assert "incompletely" in write({"a": {"data_offsets": [0, 8]}}, b"8 bytes.")
    assert "not its shape's" in write({"a": entry | {"shape": [3]}}, b"8 bytes.")
    assert "not its shape's" in write({"a": entry | {"shape": [-1, -2]}}, b"8 bytes.")
    assert "not its shape's" in write({"a": entry | {"shape": [2.0]}}, b"8 bytes.")
    assert "F4, which is not supported" in write({"a": entry | {"dtype": "F4"}}, b"8 bytes.")
    assert "gap or an overlap before b" in write({"a": entry, "b": entry | {"data_offsets": [4, 12]}}, b"8 bytes.")
    assert "accounts for" in write({"a": entry}, b"8 bytes and more")
    path.write_bytes(b"\xff" * 100)
    assert "header claims" in refused(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": ENTRY | {"dtype": ["F32"]}},
        {"a": ENTRY | {"dtype": None}},
        {"a": ENTRY | {"shape": "2"}},
        {"a": ENTRY | {"shape": [True, 2]}},
        {"a": ENTRY | {"shape": [2] + [1] * 100}},
        {"a": ENTRY | {"shape": [0, 2**70], "data_offsets": [0, 0]}, "b": ENTRY},
        {"a": ENTRY | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}, "b": ENTRY},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
        {"a": ENTRY | {"data_offsets": [10**400, 10**400 + 8]}},
        {"a": ENTRY | {"data_offsets": "08"}},
        {"a": ENTRY, "b": ENTRY | {"data_offsets": None}},
        {"a": [ENTRY]},
        {"__metadata__": [1], "a": ENTRY},
        {"__metadata__": {"format": {}}, "a": ENTRY},
        b"[" * 100_000,
        b'{"a":' * 200 + b"1" + b"}" * 200,
        json.dumps({"a": ENTRY}).encode("utf-16"),
        b'{"\\ud800": ' + json.dumps(ENTRY).encode() + b"}",
        b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2),
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
    ids=lambda header: repr(header)[:50],
)
def test_odd_headers_are_refused_in_a_line(tmp_path: Path, header: object) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"8 bytes.")
    assert "model.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("shard", ["x" * 300, "a\0b", ""])
def test_index_entries_that_no_file_can_have(sharded: Path, shard: str) -> None:
    write_index(sharded, a=shard)
    assert "shard" in refused(sharded)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="is missing"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors", "x/../../model.safetensors"])
def test_index_entries_outside_the_directory(sharded: Path, shard: str) -> None:
    write_index(sharded, a=shard)
    assert "outside the directory" in refused(sharded)


def test_index_that_does_not_fit_its_shards(sharded: Path) -> None:
    write_index(sharded, a="model-00002-of-00002.safetensors")
    assert "places a in model-00002-of-00002.safetensors, which does not hold it" in refused(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', "\udcff"])
def test_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert "is not a JSON index" in refused(sharded)


def test_resolve_model_dir(tmp_path: Path) -> None:
    assert resolve_model_dir(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve_model_dir(str(tmp_path / "file"))
    with pytest.raises(UserError, match="is no directory"):
        resolve_model_dir(str(tmp_path / "nothing"))


def test_hub_id_offline_is_a_user_error(tmp_path: Path) -> None:
    code = "from loraga_dist.model.base import resolve_model_dir; resolve_model_dir('nobody/nothing')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "UserError: model.name_or_path: 'nobody/nothing'" in run.stderr.splitlines()[-1]
