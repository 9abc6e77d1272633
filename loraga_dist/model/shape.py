"""What of a model's shapes decides costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraga_dist.model.blocks import find_blocks, shape_of
from loraga_dist.model.stacks import Stack, find_stacks
from loraga_dist.model.towers import text_model, tower_of


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a model decides costs; taken from a copy on the meta device."""

    dtype: torch.dtype
    numels: list[int]
    largest_module_numel: int
    block_numel: int
    """Parameters in the blocks that checkpointing recomputes."""
    embedding_numel: int
    """Parameters that are looked up, not multiplied."""
    linear_numel: int
    """Entries of all matrices a token of text is multiplied with, of experts those that it goes to."""
    block_linear_numel: int
    """The same, in the blocks that checkpointing recomputes."""
    has_experts: bool
    numels_of_blocks: list[int]
    """Parameters of each block the model is a sequence of; none where it is no sequence."""
    linear_numels_of_blocks: list[int]
    max_positions: int | None
    """Tokens of the longest sequence; None where the model sets no limit."""

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> ModelShape:
        from transformers.modeling_layers import GradientCheckpointingLayer

        modules = list(model.modules())
        text = text_model(model)
        reading = [module for name, module in model.named_modules() if tower_of(name, text) is None]
        blocks = [module for module in reading if isinstance(module, GradientCheckpointingLayer)]
        embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
        found = find_blocks(model)
        sequence = found.of(model) if found else []
        stacks = {id(model.get_parameter(name)): stack for name, stack in find_stacks(model).items()}
        return cls(
            dtype=dtype,
            numels=[parameter.numel() for parameter in model.parameters()],
            largest_module_numel=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in modules),
            block_numel=sum(parameter.numel() for block in blocks for parameter in block.parameters()),
            embedding_numel=sum(parameter.numel() for module in embeddings for parameter in module.parameters()),
            linear_numel=_linear_numel(reading, stacks),
            block_linear_numel=sum(_linear_numel(block.modules(), stacks) for block in blocks),
            has_experts=bool(stacks),
            numels_of_blocks=[sum(parameter.numel() for parameter in block.parameters()) for block in sequence],
            linear_numels_of_blocks=[_linear_numel(block.modules(), stacks) for block in sequence],
            max_positions=max_positions(model),
        )

    @property
    def outside_numel(self) -> int:
        """Parameters outside the blocks."""
        return sum(self.numels) - sum(self.numels_of_blocks)

    @property
    def largest_block_numel(self) -> int:
        return max(self.numels_of_blocks, default=0)

    @property
    def num_bytes_each(self) -> int:
        return self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_bytes_each * sum(self.numels)

    def partition_bytes(self, world_size: int) -> int:
        """One rank's shards: every parameter is cut on its own, and padded."""
        return self.num_bytes_each * sum(math.ceil(numel / world_size) for numel in self.numels)


def max_positions(model: nn.Module) -> int | None:
    """Find the longest sequence that position embeddings allow; None where the model sets no limit."""
    config: Any = model.config
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [stated] if isinstance(stated, int) and stated > 0 else []
    for name, module in model.get_submodule(text_model(model)).named_modules():
        padding: Any = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            # RoBERTa and its kind count positions from the row after the padding's
            limits.append(shape_of(module.get_parameter("weight"))[0] - padding - 1)
    return min(limits, default=None)


def within_positions(most: int | None, num_tokens: int) -> int:
    """So many tokens, or as many as there are positions. most: as `max_positions`."""
    return num_tokens if most is None else min(num_tokens, most)


def _linear_numel(modules: Iterable[nn.Module], stacks: Mapping[int, Stack]) -> int:
    """stacks: by the identity of their parameters."""
    modules = list(modules)
    own = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    chosen = [stacks[id(parameter)] for parameter in own if id(parameter) in stacks]
    of_experts = sum(stack.num_chosen * stack.M * stack.N for stack in chosen)
    weights = [getattr(module, "weight", None) for module in modules if not isinstance(module, nn.Embedding)]
    return of_experts + sum(weight.numel() for weight in weights if weight is not None and weight.ndim == 2)
