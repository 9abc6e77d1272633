"""Gradients of experts and routers on ranks that route differently equal unsharded ones, and nothing stays gathered."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from builders import save_model
from experts import WAYS, experts_of, lowest_linear, reference, routers_of, shown, worst
from families import padded_microbatches
from pieces import load
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from loraga_dist.data.losses import Loss
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.model.stacks import find_stacks
from loraga_dist.ranks.world import World

KINDS = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4"]
PER_RANK = 2


@dataclass(frozen=True)
class Part:
    """What one rank was shown, by kind and way, and which weights were gathered where they should not be."""

    gradients: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)
    amiss: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Watching(Loss):
    """Between forward and backward, looks which weights of experts are in memory still."""

    held: list[tuple[str, StorageWeakRef]] = field(default_factory=list)
    """What was multiplied with in forward."""
    amiss: list[str]

    def of(self, model: nn.Module) -> Watching:
        for stack in find_stacks(model).values():
            parameter = model.get_parameter(stack.parameter_name)

            def hold(*_: Any, parameter: nn.Parameter = parameter, name: str = stack.parameter_name) -> None:
                assert parameter.numel(), "it is gathered for its module's forward"
                self.held.append((name, StorageWeakRef(parameter.untyped_storage())))

            # before those of DeepSpeed, which free it
            module_name = stack.parameter_name.rpartition(".")[0]
            model.get_submodule(module_name).register_forward_hook(hold)
        return self

    def __call__(self, *args: Any) -> Tensor:
        assert self.held
        self.amiss.extend(name for name, storage in self.held if not storage.expired())
        self.held.clear()
        return super().__call__(*args)


def is_gathered(model: nn.Module, name: str) -> bool:
    parameter = model.get_parameter(name)
    return hasattr(parameter, "ds_id") and parameter.ds_status.name != "NOT_AVAILABLE"  # type: ignore[attr-defined]


def share(rank: int, world_size: int) -> list[Microbatch]:
    """Of the first rank, one token again and again: to few experts, and always to the same."""
    mine = padded_microbatches(count=world_size * PER_RANK, longest=20)[rank::world_size]
    if rank == 0:
        mine = [
            replace(each, inputs=each.inputs | {"input_ids": each.inputs["input_ids"].clamp(max=5)}) for each in mine
        ]
    return [replace(each, index=index) for index, each in enumerate(mine)]


def gradients_of_rank(directory: Path) -> Part:
    world, part = World.start(), Part()
    for kind in KINDS:
        loaded = load(directory / kind, world)
        model, microbatches = loaded.model, share(world.rank, world.size)
        names = [*experts_of(model), *routers_of(model), lowest_linear(model)]
        loss = Watching(shifts=True, by_token=True, amiss=part.amiss).of(model)
        for way in WAYS:
            part.gradients[kind, way] = dict(shown(model, names, microbatches, way, loaded.sharding, loss))
            for name, parameter in model.named_parameters():
                if parameter.grad is not None or is_gathered(model, name):
                    part.amiss.append(f"{name} after {way}")
    return part


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_expert_matches_the_unsharded_reference(world_size: int, tmp_path: Path) -> None:
    models = {kind: AutoModelForCausalLM.from_pretrained(save_model(tmp_path / kind, kind)) for kind in KINDS}
    parts: list[Part] = run_on_ranks(gradients_of_rank, world_size, tmp_path, timeout_seconds=280)
    assert [part.amiss for part in parts] == [[]] * world_size
    everything = [microbatch for rank in range(world_size) for microbatch in share(rank, world_size)]
    for kind, model in models.items():
        names = [*experts_of(model), *routers_of(model), lowest_linear(model)]
        expected = reference(model, names, everything)
        few, many = (len(part.gradients[kind, "none"]) for part in parts[:2])
        assert few < many, "ranks should route differently"
        for way in WAYS:
            found: dict[str, Tensor] = {}
            for part in parts:
                for name, G_MN in part.gradients[kind, way].items():
                    found[name] = found.get(name, 0) + G_MN
            assert worst(found, expected) < 1e-5, (kind, way)
