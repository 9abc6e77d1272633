"""`loraga_dist.initialize`: the same start on 1, 2 and 3 ranks, one that trains as the unsharded one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import save_model
from launching import run_ranks, succeed
from safetensors.torch import load_file

WORKER = str(Path(__file__).with_name("in_place_worker.py"))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("in_place")
    model = save_model(directory / "model")
    for mode, world_size in (
        ("loraga", 1),
        ("loraga", 2),
        ("loraga", 3),
        ("default", 1),
        ("weights", 1),
        ("weights", 3),
    ):
        succeed(run_ranks([WORKER, str(model), str(directory), mode], world_size, timeout_seconds=200))
    return {path.stem: load_file(path) for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize(("mode", "world_size"), [("loraga", 2), ("loraga", 3), ("weights", 3)])
def test_gathered_weights_equal_the_single_process(results: dict, mode: str, world_size: int) -> None:
    # on 3 ranks slices start mid-row and the last is padded; `weights` is PiSSA, without data
    alone, sharded = results[f"{mode}-1"], results[f"{mode}-{world_size}"]
    assert alone.keys() == sharded.keys()
    start = {name: tensor for name, tensor in alone.items() if not name.startswith("trained.") and name != "losses"}
    for name, tensor in start.items():
        bar = 1e-4 if "lora_" in name else 1e-6
        assert relative(sharded[name], tensor) < bar, name


@pytest.mark.parametrize(("mode", "world_size"), [("loraga", 2), ("loraga", 3), ("weights", 3)])
def test_training_goes_on_as_unsharded(results: dict, mode: str, world_size: int) -> None:
    alone, sharded = results[f"{mode}-1"], results[f"{mode}-{world_size}"]
    torch.testing.assert_close(sharded["losses"], alone["losses"], rtol=0, atol=2e-5)
    for name, tensor in alone.items():
        if name.startswith("trained."):
            before = alone[name.removeprefix("trained.")]
            assert (tensor - before).norm() > 1e-3, f"{name} was not trained"
            assert relative(sharded[name], tensor) < 1e-3, name


def test_loss_falls_faster_than_from_default_lora(results: dict) -> None:
    ours, default = results["loraga-1"]["losses"], results["default-1"]["losses"]
    assert torch.isclose(ours[0], default[0], atol=1e-4), "both start at the pretrained model"
    assert default[0] - default[-1] > 0
    assert ours[0] - ours[-1] > 1.5 * (default[0] - default[-1]), (ours, default)
