"""Block order on several ranks: the unsharded gradients, and a model that is left as it was."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from builders import byte_tokenizer, save_model
from families import TARGETS, padded_microbatches, targets_of, tiny
from outputs import relative
from pieces import Loaded, autograd_gradients, exact_gradients, load
from ranks import run_on_ranks
from subspace import efficiency
from torch import Tensor, nn
from training import ZERO3, zero3

from loraga_dist.config import GradientConfig, LoraSection, MethodConfig
from loraga_dist.data.microbatches import BatchSharder, Microbatch
from loraga_dist.gradients.block_order import NotInBlocks
from loraga_dist.gradients.calibrate import calibrate
from loraga_dist.gradients.kept import Keeping
from loraga_dist.model.blocks import Blocks, choose_order, find_blocks
from loraga_dist.model.coverage import Weights
from loraga_dist.model.plan import make_plan
from loraga_dist.ranks.progress import Clock
from loraga_dist.ranks.world import World
from loraga_dist.request.request import Request

KINDS = {
    "llama": "all-linear",
    "gemma3": "all-linear",  # sliding windows and full attention, tied embeddings
    "gpt2": "all-linear",  # stored transposed, tied embeddings
    "mixtral": TARGETS["mixtral"],
}
R, PER_RANK = 4, 4


@dataclass(frozen=True)
class Part:
    """What one rank found, by kind of model, and what it found amiss."""

    exact: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sketch: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of llama: U_MR and Vh_RN that the start would be made of."""
    not_in_blocks: list[str] = field(default_factory=list)
    amiss: list[str] = field(default_factory=list)


def share(rank: int, world_size: int) -> list[Microbatch]:
    """A rank's microbatches: of other lengths, and so of other numbers of tokens, than another's."""
    mine = padded_microbatches(count=world_size * PER_RANK, longest=40)[rank::world_size]
    return [replace(microbatch, index=index) for index, microbatch in enumerate(mine)]


def state_of(loaded: Loaded) -> dict[str, Any]:
    """What a trainer would find on modules and parameters."""
    model = loaded.model
    return {
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for name, module in model.named_modules()
        },
        "parameters": {
            name: (parameter.ds_status.name, parameter.grad is None)  # type: ignore[union-attr]
            for name, parameter in model.named_parameters()
        },
    }


def be_rank(models: Path) -> Part:
    world, part = World.start(), Part()
    microbatches = share(world.rank, world.size)
    for kind, target_modules in KINDS.items():
        loaded = load(models / kind, world)
        targets, before = targets_of(loaded.model, target_modules, R), state_of(loaded)
        found = exact_gradients(
            loaded.model, loaded.sharding, targets, microbatches, GradientConfig(order="block", max_targets_in_flight=5)
        )
        part.exact[kind] = {name: G_MN.clone() for name, G_MN in found}
        if kind == "llama":
            sketch(loaded, microbatches, part)
        if state_of(loaded) != before:
            part.amiss.append(kind)
    loaded = load(models / "gemma3n", world)
    targets, before = targets_of(loaded.model, TARGETS["gemma3n"]), state_of(loaded)
    try:
        list(exact_gradients(loaded.model, loaded.sharding, targets, microbatches, GradientConfig(order="block")))
    except NotInBlocks as why:
        part.not_in_blocks.append(str(why))
    if state_of(loaded) != before:
        part.amiss.append("gemma3n")
    found = exact_gradients(loaded.model, loaded.sharding, targets, microbatches, GradientConfig(order="model"))
    part.exact["gemma3n"] = {name: G_MN.clone() for name, G_MN in found}
    return part


def sketch(loaded: Loaded, microbatches: list[Microbatch], part: Part) -> None:
    targets, world = targets_of(loaded.model, "all-linear", R), loaded.sharding.world
    config = GradientConfig(order="block", engine="sketch", refine_passes=1)
    names = [target.name for target in targets]
    order = choose_order("block", "Llama", find_blocks(loaded.model), names, in_pieces=True)
    method = MethodConfig(lora=LoraSection(r=R), gradient=config)
    request = Request(
        config=method,
        plan=make_plan(targets, method, world.size, order),
        data=BatchSharder(microbatches),
        factor_dtypes={},
        coverage=Weights.of(loaded.model).covered_by(targets, ()),
    )
    gradients = calibrate(
        loaded.model, request, sharding=loaded.sharding, clock=Clock(), keeping=Keeping(chunk_microbatches=2)
    )
    part.sketch.update({name: (svd.U_MK[:, R : 2 * R], svd.Vh_KN[:R]) for name, svd in gradients.owned.items()})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for kind in (*KINDS, "gemma3n"):
        tiny(kind).save_pretrained(directory / kind)  # type: ignore[operator]
        byte_tokenizer().save_pretrained(directory / kind)
    return directory


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_the_unsharded_gradients(world_size: int, models: Path) -> None:
    parts: list[Part] = run_on_ranks(be_rank, world_size, models, timeout_seconds=550)
    shares = [share(rank, world_size) for rank in range(world_size)]
    assert len({sum(microbatch.num_supervised_tokens for microbatch in each) for each in shares}) == world_size
    everything = [microbatch for each in shares for microbatch in each]
    for kind in (*KINDS, "gemma3n"):
        expected = autograd_gradients(models / kind, everything)
        found = [(name, G_MN) for part in parts for name, G_MN in part.exact[kind].items()]
        targets = targets_of(tiny(kind), KINDS.get(kind, TARGETS["gemma3n"]), 2)
        assert sorted(name for name, _ in found) == sorted(target.name for target in targets), kind
        for name, G_MN in found:
            G = expected[name].T if kind == "gpt2" else expected[name]
            assert relative(G_MN, G) < 1e-5, (kind, name)
        if kind == "llama":
            directions = {name: both for part in parts for name, both in part.sketch.items()}
            assert directions.keys() == dict(found).keys()
            for name, (U_MR, Vh_RN) in directions.items():
                assert efficiency(expected[name], U_MR, Vh_RN.T) > 0.999, name  # as alone: test_kept_inputs
    for part in parts:
        assert part.not_in_blocks == parts[0].not_in_blocks != []
        assert "block 2 uses what a block before it left behind" in part.not_in_blocks[0]
        assert part.amiss == []


class TwoLists(nn.Module):
    """The smaller list comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.ModuleList([nn.Linear(2, 2)])
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])


def blocks_of_shards() -> Blocks | None:
    import deepspeed

    with zero3(World.start(), switched_on=False), deepspeed.zero.Init(config_dict_or_path=ZERO3):
        model = TwoLists()
    assert not sum(parameter.numel() for parameter in model.parameters())
    return find_blocks(model)


def test_the_list_of_most_parameters_is_found_among_shards_too() -> None:
    assert run_on_ranks(blocks_of_shards, 2, timeout_seconds=120) == [Blocks(prefix="layers", count=3)] * 2


def fail_to_hold(model: Path) -> list[str]:
    """What DeepSpeed gathers by after a hold that failed, and during the next."""
    from deepspeed.comm import comm

    loaded = load(model, World.start())
    weight: Any = loaded.model.get_submodule("model.layers.1.mlp.down_proj").weight

    def gathers_by() -> str:
        return comm.cdb.all_gather_function.__name__  # type: ignore[union-attr]

    found = []
    whole = weight.ds_tensor.data
    weight.ds_tensor.data = whole[:-1]
    with pytest.raises(RuntimeError, match="must match the size"), loaded.sharding.hold([weight]):
        raise AssertionError("not to be reached")
    found.append(gathers_by())
    weight.ds_tensor.data = whole
    with loaded.sharding.hold([weight]):
        assert weight.shape == weight.ds_shape
        found.append(gathers_by())
    return found


def test_a_hold_that_fails_leaves_deepspeed_as_it_was(tmp_path: Path) -> None:
    found = run_on_ranks(fail_to_hold, 2, save_model(tmp_path), timeout_seconds=120)
    assert found == [["all_gather_into_tensor"] * 2] * 2
