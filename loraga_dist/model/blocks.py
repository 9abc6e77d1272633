"""Which modules a model is a sequence of, and in which order calibration goes through them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn import Parameter

from loraga_dist.config import OrderName
from loraga_dist.errors import UserError
from loraga_dist.model.towers import text_model


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A model's layers: the children of one `nn.ModuleList`, each called with the output of the one before."""

    prefix: str
    """Name of the list."""
    count: int

    def index_of(self, name: str) -> int | None:
        """Of the block that holds a module or parameter; None outside of all."""
        if not name.startswith(f"{self.prefix}."):
            return None
        number, dot, _ = name[len(self.prefix) + 1 :].partition(".")
        return int(number) if dot and number.isdecimal() else None

    def of(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(f"{self.prefix}.{index}") for index in range(self.count)]


def find_blocks(model: nn.Module) -> Blocks | None:
    """Find the list of layers with most parameters; None where a language model is more than one sequence."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    text = text_model(model)
    lists = [
        (sum(map(numel_of, module.parameters())), Blocks(prefix=name, count=len(module)))
        for name, module in model.get_submodule(text).named_modules(prefix=text)
        if isinstance(module, nn.ModuleList) and len(module) and not re.search(r"\.\d+\.", f".{name}.")
    ]
    return max(lists, key=lambda sized: sized[0])[1] if lists else None


def shape_of(parameter: Parameter) -> tuple[int, ...]:
    """The whole one's, also of a shard's."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: Parameter) -> int:
    """The whole one's, also of a shard's."""
    return math.prod(shape_of(parameter))


def expert_lists(model: nn.Module) -> dict[str, str]:
    """Lists of experts that are modules, by name, and the module that calls some of them.

    Which ones depends on the data, and so ranks cannot gather them one by one.
    """
    return {
        name: name.rpartition(".")[0] if type(module).forward is nn.Module.forward else name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len(module) > 1
        and "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    }


class Piece(NamedTuple):
    """A module, and parameters that its forward wants."""

    module: nn.Module
    parameters: list[Parameter]


def pieces_of(model: nn.Module) -> list[Piece]:
    """The model in pieces: blocks, each whole, and all that lies outside them, which others may look into; of a model
    without blocks every module that has parameters, or that calls some of its experts."""
    blocks = find_blocks(model)
    if blocks is None:
        callers = {model.get_submodule(name) for name in expert_lists(model).values()}
        inside = {module for caller in callers for module in caller.modules()} - callers
        owners = (
            (module, list(module.parameters(recurse=module in callers)))
            for module in model.modules()
            if module not in inside
        )
        return [Piece(module, own) for module, own in owners if own]
    found = [Piece(block, list(block.parameters())) for block in blocks.of(model)]
    inside = {id(parameter) for piece in found for parameter in piece.parameters}
    return [*found, Piece(model, [parameter for parameter in model.parameters() if id(parameter) not in inside])]


@dataclass(frozen=True, kw_only=True)
class Order:
    """In which order calibration goes through the model, and why."""

    blocks: Blocks | None
    """Each takes all microbatches before the next one does; None: each microbatch goes through the whole model."""
    why: str

    @property
    def name(self) -> Literal["block", "model"]:
        return "model" if self.blocks is None else "block"

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "why": self.why}

    @cached_property
    def num_stages(self) -> int:
        """What is taken backward by itself: the blocks, and last what comes after them; or the whole model."""
        return 1 if self.blocks is None else self.blocks.count + 1

    def stage_of(self, name: str) -> int:
        """Of a target."""
        index = None if self.blocks is None else self.blocks.index_of(name)
        return self.num_stages - 1 if index is None else index


MODEL_ORDER = Order(blocks=None, why="the model is whole in one process")


def saved_order(saved: Any, blocks: Blocks | None) -> Order | None:
    """What an earlier run of the same work has gone on in; None where nothing whole is known of it."""
    if not isinstance(saved, dict) or not isinstance(why := saved.get("why"), str):
        return None
    if saved.get("name") == "block":
        return None if blocks is None else Order(blocks=blocks, why=why)
    return Order(blocks=None, why=why)


def choose_order(
    wanted: OrderName, model_class: str, blocks: Blocks | None, targets: Iterable[str], *, in_pieces: bool
) -> Order:
    """Choose the order for a model with these blocks and targets.

    in_pieces: no process holds the model whole where it computes: it is sharded, offloaded, or on disk.
    Raises UserError where block order is demanded of a model that is no sequence of blocks.
    """
    if wanted == "model":
        return Order(blocks=None, why="gradient.order asks for it")
    if blocks is not None and not any(blocks.index_of(name) is not None for name in targets):
        blocks = None
    if blocks is None:
        problem = f"{model_class} is no single sequence of blocks with targets in it"
        if wanted == "block":
            raise UserError("gradient.order", "block", f"{problem}; write auto")
        return Order(blocks=None, why=problem)
    if wanted == "auto" and not in_pieces:
        return MODEL_ORDER
    why = "gradient.order asks for it" if wanted == "block" else "a block is gathered once for all microbatches"
    return Order(blocks=blocks, why=why)
