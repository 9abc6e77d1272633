"""Who holds the model: chosen in one place, for a checkpoint to be loaded and for a model that is there already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from loraga_dist.errors import UserError
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.from_disk import FromDisk
from loraga_dist.sharding.settings import Holding
from loraga_dist.sharding.single import SingleProcess
from loraga_dist.sharding.zero3 import Zero3, is_partitioned, refuse_unsupported_shards


def open_sharding(world: World, deepspeed: str | dict[str, Any] | None, *, from_disk: bool = False) -> Sharding:
    """Choose what will load and hold a checkpoint's model. Raises UserError where DeepSpeed is needed and missing.

    from_disk: of a single process, which leaves the weights there.
    """
    if from_disk:
        return FromDisk(world)
    return Zero3(world, deepspeed) if Holding.of(deepspeed, world.size).is_sharded else SingleProcess(world)


def sharding_of(model: nn.Module, world: World, deepspeed: str | dict[str, Any] | None, caller: str) -> Sharding:
    """Choose what holds a training script's own model, by how it was loaded.

    caller: the function the user called, for messages. Raises UserError for shards that cannot be edited in place, for
    a model that several ranks hold whole, and for one that lies on several devices.
    """
    if is_partitioned(model):
        refuse_unsupported_shards(model, caller)
        return Zero3(world, deepspeed)
    if world.size > 1:
        raise UserError(
            "model",
            type(model).__name__,
            f"is whole on each of {world.size} ranks; load it under ZeRO-3 (transformers' HfDeepSpeedConfig)",
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        problem = f"has parameters on {' and '.join(devices)}; load it whole on one device (no device_map, no offload)"
        raise UserError("model", type(model).__name__, f"{problem}, or under ZeRO-3")
    return SingleProcess(replace(world, device=next(model.parameters()).device))
