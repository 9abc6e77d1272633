"""`loraga_dist.initialize`: the same start on 1, 2 and 3 ranks, one that trains as the unsharded one does; and what it
refuses, on every rank, in one line that says what to do."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_model
from outputs import relative
from peft import LoraConfig, get_peft_model
from pieces import PROJECTIONS, load
from ranks import finish_on_ranks, run_on_ranks
from torch import Tensor, nn
from training import ZERO3, batches, train, whole, zero3
from transformers import AutoModelForCausalLM

import loraga_dist
from loraga_dist.data.microbatches import microbatches_from_batches
from loraga_dist.gradients.forward import forward
from loraga_dist.model.targets import Target
from loraga_dist.ranks.world import World
from loraga_dist.sharding.zero3 import Zero3
from loraga_dist.start.identity import flip_last_bits

STEPS = 10
LORA = {"r": 4, "lora_alpha": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "loraga": {"lora": LORA, "gradient": {"engine": "exact", "oversampling": 8}},
    "weights": {"lora": LORA, "init": {"scheme": "pissa"}},
}


@dataclass(frozen=True)
class Trained:
    """Whole parameters at the start, adapters after some steps, and the loss before each step."""

    start: dict[str, Tensor]
    adapter: dict[str, Tensor]
    losses: Tensor


def watch_gathered_weights() -> None:
    """Fail when a rank gets a weight while it still holds the one before."""
    gather, storages = Zero3.weight_on, []

    def weight_on(self: Zero3, parameter: nn.Parameter, target: Target, owner: int) -> Tensor | None:
        if owner == self.world.rank:
            assert not any(storage() for storage in storages), "a weight gathered before is still there"
        weight = gather(self, parameter, target, owner)
        assert (weight is not None) == (owner == self.world.rank)
        if weight is not None:
            storages.append(weakref.ref(weight.untyped_storage()))
        return weight

    Zero3.weight_on = weight_on  # type: ignore[method-assign]


def start_and_train(model_dir: Path, way: str) -> Trained | None:
    """On every rank: a start (of stock PEFT, or by one of the configurations) and ten steps; rank 0's view of them."""
    world = World.start()
    with zero3(world):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        if way == "default":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", **LORA))
        else:
            watch_gathered_weights()
            start = loraga_dist.initialize(model, batches(1, 4, world) if way == "loraga" else None, CONFIGS[way])
            assert start.identity_check.max_abs_logit_diff < 1e-5 * start.identity_check.max_abs_logit
            if way == "loraga":
                assert start.gradients is not None
                assert start.gradients.order.name == ("model" if world.size == 1 else "block")
            model = start.model
        before = whole(model)
        losses = train(model, batches(2, STEPS, world), world)
        after = whole(model)
    if not world.is_main:
        return None
    return Trained(before, {name: tensor for name, tensor in after.items() if "lora_" in name}, torch.tensor(losses))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Trained]:
    model = save_model(tmp_path_factory.mktemp("in_place") / "model")
    ways = [("loraga", 1), ("loraga", 2), ("loraga", 3), ("default", 1), ("weights", 1), ("weights", 3)]
    return {
        (way, world_size): run_on_ranks(start_and_train, world_size, model, way, timeout_seconds=200)[0]
        for way, world_size in ways
    }


# on 3 ranks slices start mid-row and the last is padded; `weights` is PiSSA, without data
SHARDED = pytest.mark.parametrize(("way", "world_size"), [("loraga", 2), ("loraga", 3), ("weights", 3)])


@SHARDED
def test_gathered_weights_equal_the_single_process(trained: dict, way: str, world_size: int) -> None:
    alone, sharded = trained[way, 1], trained[way, world_size]
    assert alone.start.keys() == sharded.start.keys()
    for name, tensor in alone.start.items():
        # factors are of gradients that were summed in another order; the residual is of weights that are the same
        assert relative(sharded.start[name], tensor) < (1e-4 if "lora_" in name else 1e-6), name


@SHARDED
def test_training_goes_on_as_unsharded(trained: dict, way: str, world_size: int) -> None:
    alone, sharded = trained[way, 1], trained[way, world_size]
    torch.testing.assert_close(sharded.losses, alone.losses, rtol=0, atol=2e-5)
    for name, tensor in alone.adapter.items():
        assert (tensor - alone.start[name]).norm() > 1e-3, f"{name} was not trained"
        # Adam divides by a gradient's size, so that rounding weighs more after each step
        assert relative(sharded.adapter[name], tensor) < 1e-3, name


def test_loss_falls_faster_than_from_default_lora(trained: dict) -> None:
    ours, default = trained["loraga", 1].losses, trained["default", 1].losses
    assert torch.isclose(ours[0], default[0], atol=1e-4), "both start at the pretrained model"
    assert default[0] - default[-1] > 0
    assert ours[0] - ours[-1] > 1.5 * (default[0] - default[-1]), (ours, default)


def flip_and_flip_back(model_dir: Path) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every target's weight in bfloat16: as it was, with bits flipped, and with these flipped back."""
    world = World.start()
    loaded = load(model_dir, world)
    targets, model = loaded.targets(PROJECTIONS), loaded.model
    names = [target.parameter_name for target in targets]
    (microbatch, *_) = microbatches_from_batches(batches(1, 1, world), "CAUSAL_LM")
    seen, module = [whole(model)], loaded.sharding.attach(model)
    for _ in range(2):
        with torch.no_grad():
            forward(module, microbatch, world.device)
        loaded.sharding.release()
        flip_last_bits(model, targets, loaded.sharding)
        seen.append(whole(model))
    loaded.sharding.detach()
    return [(seen[0][name], seen[1][name], seen[2][name]) for name in names]


def test_ranks_flip_the_bits_that_one_process_does_and_flip_them_back(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    alone, sharded = (run_on_ranks(flip_and_flip_back, world_size, model)[0] for world_size in (1, 3))
    for (W, flipped, W_again), (W_3, flipped_3, W_3_again) in zip(alone, sharded, strict=True):
        assert torch.equal(W, W_again) and not torch.equal(W, flipped)
        assert torch.equal(W, W_3) and torch.equal(flipped, flipped_3) and torch.equal(W, W_3_again)


REFUSED = {
    # name: what to write instead; one process group runs them in this order
    "nvme": "write cpu or none",
    "hpz": "zero_hpz_partition_size",
    "no-labels": "labels",
    "one-rank-empty": "give every rank at least one",
    "unsharded": "load it under ZeRO-3",
    "dora": "make the start with loraga-dist init",
    "optimizer": "call loraga_dist.initialize before deepspeed.initialize",
}


def refusals_of_rank(model_dir: Path) -> dict[str, tuple[int, str]]:
    """Exit code and message of each case, whose model must have been left alone."""
    world = World.start()
    return {case: refusal(model_dir, case, world) for case in REFUSED}


def refusal(model_dir: Path, case: str, world: World) -> tuple[int, str]:
    import deepspeed

    data, config = batches(1, 2, world), {"lora": dict(LORA)}
    with zero3(world, switched_on=case != "unsharded"):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        if case == "optimizer":
            deepspeed.initialize(model=model, config=ZERO3, optimizer=torch.optim.AdamW(model.parameters()))
        elif case == "nvme":
            config["deepspeed"] = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
        elif case == "hpz":
            config["deepspeed"] = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
        elif case == "dora":
            config["lora"]["use_dora"] = True
        elif case == "no-labels":
            data = [{"input_ids": batch["input_ids"]} for batch in data]
        elif case == "one-rank-empty" and world.rank == 1:
            data = []
        with pytest.raises(loraga_dist.LoragaError) as error:
            loraga_dist.initialize(model, data, config)
    assert not any("lora" in name for name, _ in model.named_parameters())
    world.barrier()
    return error.value.exit_code, str(error.value)


def test_refused_on_both_ranks(tmp_path: Path) -> None:
    ranks = finish_on_ranks(refusals_of_rank, 2, save_model(tmp_path / "model"))
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert [rank.stdout for rank in ranks] == ["", ""]
    for rank in ranks:
        assert rank.value.keys() == REFUSED.keys()
        for case, (code, said) in rank.value.items():
            assert code == 2 and REFUSED[case] in said and "\n" not in said, case
