"""What waits between blocks: in memory or in a file that leaves nothing, for some microbatches or all at a time."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import small_disk as small_disk
from families import alone, padded_microbatches, targets_of, tiny
from outputs import relative
from subspace import efficiency
from torch import Tensor

from loraga_dist.config import GradientConfig, LoraSection, MethodConfig
from loraga_dist.data.microbatches import BatchSharder
from loraga_dist.engines.base import ERROR_COLUMNS
from loraga_dist.engines.group import EngineGroup
from loraga_dist.errors import RunError
from loraga_dist.gradients.calibrate import calibrate
from loraga_dist.gradients.gradients import Gradients
from loraga_dist.gradients.kept import Keeping, KeptInputs
from loraga_dist.model.blocks import choose_order, find_blocks
from loraga_dist.model.coverage import Weights
from loraga_dist.model.plan import make_plan
from loraga_dist.ranks.progress import Clock
from loraga_dist.request.request import Request

CPU = torch.device("cpu")
SQUARE = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""32 x 32 in these models: with r = 16 all singular triplets are found, that is the gradient itself."""


@functools.cache
def calibrated(
    keeping: Keeping = Keeping(),  # noqa: B008
    *,
    num_microbatches: int = 5,
    r: int = 16,
    **gradient: Any,
) -> Gradients:
    """Of a tiny llama's square targets, in block order unless told otherwise."""
    model = tiny("llama")
    targets = targets_of(model, SQUARE, r)
    config = GradientConfig(**({"order": "block", "engine": "exact"} | gradient))
    order = choose_order(config.order, "Llama", find_blocks(model), [target.name for target in targets], in_pieces=True)
    method = MethodConfig(lora=LoraSection(r=r, target_modules=SQUARE), gradient=config)
    request = Request(
        config=method,
        plan=make_plan(targets, method, 1, order),
        data=BatchSharder(padded_microbatches(count=num_microbatches, longest=2 * num_microbatches + 7)),
        factor_dtypes={},
        coverage=Weights.of(model).covered_by(targets, ()),
    )
    return calibrate(model, request, sharding=alone(), clock=Clock(), keeping=keeping)


def product(gradients: Gradients, name: str) -> Tensor:
    svd = gradients.owned[name]
    return svd.U_MK * svd.S_K @ svd.Vh_KN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_put_is_got(in_file: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = {(block, at): torch.randn(2, 3 + at, 8, generator=draw).to(dtype) for block in range(3) for at in range(4)}
    with KeptInputs(tmp_path / "new" if in_file else None, CPU) as kept:
        for _ in range(2):  # chunks
            for key, tensor in hidden.items():
                kept.put(*key, tensor)
            for key, tensor in reversed(hidden.items()):
                assert torch.equal(kept.get(*key), tensor) and kept.get(*key).dtype == dtype
            kept.clear()
        assert not in_file or list((tmp_path / "new").iterdir()) == []


def test_files_give_what_memory_gives(tmp_path: Path) -> None:
    memory, files = (calibrated(Keeping(directory=directory)) for directory in (None, tmp_path / "kept"))
    assert memory.owned.keys() == files.owned.keys()
    assert all(torch.equal(product(memory, name), product(files, name)) for name in memory.owned)
    assert list((tmp_path / "kept").iterdir()) == []


def keep_and_wait(directory: Path) -> None:
    with KeptInputs(directory, CPU) as kept:
        kept.put(0, 0, torch.ones(2**18))
        (directory / "ready").touch()
        time.sleep(60)


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=keep_and_wait, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]


def test_a_full_disk_is_one_clear_line(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 20_000))
    with pytest.raises(RunError) as error:
        calibrated(Keeping(directory=small_disk))
    assert str(error.value) == (
        f"calibrate: inputs of blocks cannot be written in {small_disk} (No space left on device); "
        "name another place by gradient.activations_dir, or lower gradient.chunk_microbatches"
    )
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("in_flight", [None, 3, 1])
def test_chunks_have_the_same_exact_gradients(chunk: int | None, in_flight: int | None) -> None:
    expected = calibrated(order="model")
    found = calibrated(Keeping(chunk_microbatches=chunk), max_targets_in_flight=in_flight)
    assert found.owned.keys() == expected.owned.keys()
    assert found.data == expected.data
    assert all(relative(product(found, name), product(expected, name)) < 1e-6 for name in expected.owned)


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_chunks_leave_the_sketch_its_accuracy(chunk: int | None) -> None:
    """That of model order: the same microbatches, seen with the same bases."""
    r, wide = 4, {"engine": "sketch", "num_microbatches": 8, "refine_passes": 1}
    exact = calibrated(num_microbatches=8)
    by_model = calibrated(order="model", r=r, **wide)
    by_blocks = calibrated(Keeping(chunk_microbatches=chunk), r=r, **wide)
    for name, svd in by_blocks.owned.items():
        of_model = by_model.owned[name]
        shares = [
            efficiency(product(exact, name), each.U_MK[:, r : 2 * r], each.Vh_KN[:r].T) for each in (svd, of_model)
        ]
        assert shares[0] > 0.999 and shares[0] == pytest.approx(shares[1], abs=1e-4), name


def test_state_is_that_of_the_largest_sweep() -> None:
    of_block = calibrated().state_bytes_per_rank
    assert of_block == 4 * 4 * (32 * 32 + (2 * 32 + 32) * ERROR_COLUMNS)
    assert calibrated(Keeping(chunk_microbatches=2)).state_bytes_per_rank == 3 * of_block
    assert calibrated(order="model").state_bytes_per_rank == 3 * of_block


def test_one_target_in_flight_holds_the_state_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where engines are made and looked at when the next one is."""
    alive: list[Any] = []
    most = 0
    make = EngineGroup.of

    def of(group: Any, **options: Any) -> EngineGroup:
        nonlocal most
        engines = make(group, **options)
        alive[:] = [each for each in alive if each() is not None] + [weakref.ref(engines)]
        most = max(most, sum(len(each().engine_of) for each in alive))
        return engines

    monkeypatch.setattr(EngineGroup, "of", of)
    calibrated(max_targets_in_flight=1)
    assert most == 1
