"""Gradients of experts as taps show them, and as plain autograd finds them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from families import alone
from outputs import relative
from pieces import block_order
from torch import Tensor, nn

from loraga_dist.data.losses import Loss, causal_lm
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.route import ModelOrder, Route
from loraga_dist.model.blocks import Blocks, find_blocks
from loraga_dist.model.stacks import find_stacks, split_name
from loraga_dist.sharding.base import Sharding

CPU = torch.device("cpu")
WAYS = ["none", "non_reentrant", "block"]
"""Model order, recomputed or not, and block order."""


class Gradients(dict[str, Tensor]):
    """Sums what taps show, and counts the calls of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def take(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        assert len(x_TN) == len(dy_TM) > 0
        assert not (x_TN.requires_grad or dy_TM.requires_grad), "who keeps rows keeps the graph with them"
        self.calls.append(name)
        self[name] = self.get(name, 0) + dy_TM.T @ x_TN


def experts_of(model: nn.Module) -> list[str]:
    return [name for stack in find_stacks(model).values() for name in stack.names]


def routers_of(model: nn.Module) -> list[str]:
    """By the names that families have for them."""
    return [name for name, _ in model.named_modules() if name.endswith(("mlp.gate", ".router"))]


def lowest_linear(model: nn.Module) -> str:
    """Of the first block's attention: below all experts."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def reference(model: nn.Module, names: Sequence[str], microbatches: Sequence[Microbatch]) -> dict[str, Tensor]:
    """Gradients of targets, as they are defined, from those of all parameters of an untouched copy."""
    model = copy.deepcopy(model).requires_grad_(True)
    for microbatch in microbatches:
        causal_lm(forward(model, microbatch, CPU), microbatch.inputs["labels"]).backward()
    stacks, found = find_stacks(model), {}
    for name in names:
        parameter, expert = split_name(name) or (f"{name}.weight", None)
        gradient = model.get_parameter(parameter).grad
        assert gradient is not None
        if expert is not None:
            gradient = gradient[expert].T if stacks[parameter].transposed else gradient[expert]
        found[name] = gradient
    return found


def shown(
    model: nn.Module,
    names: Sequence[str],
    microbatches: Sequence[Microbatch],
    way: Any,
    sharding: Sharding | None = None,
    loss: Loss = causal_lm,
) -> Gradients:
    """What taps show on this rank. way: of `WAYS`. sharding: None for a model that is whole."""
    found, sharding = Gradients(), sharding or alone()
    blocks = find_blocks(model)
    assert blocks is not None
    route: Route = block_order(model, blocks, list(names), sharding, loss)
    if way != "block":
        route = ModelOrder(model, loss, sharding=sharding, checkpointing=way)
    with route.opened():
        for stage_names in by_stage(names, blocks) if way == "block" else [names]:
            with route.showing(microbatches, stage_names, found.take) as take:
                for microbatch in microbatches:
                    take(microbatch)
    return found


def by_stage(names: Sequence[str], blocks: Blocks) -> list[list[str]]:
    """The names of each block, the last block first."""
    of_blocks = [[name for name in names if blocks.index_of(name) == index] for index in range(blocks.count)]
    return [of_block for of_block in reversed(of_blocks) if of_block]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error; what was not shown must be zero."""
    assert found.keys() <= expected.keys()
    assert all(name in found or not G_MN.any() for name, G_MN in expected.items())
    return max(relative(G_MN, expected[name]) for name, G_MN in found.items())
