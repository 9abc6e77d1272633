"""On every rank: what the plan says of shards and gathered modules is what ZeRO-3 made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from loraga_dist.config import ModelConfig
from loraga_dist.model.base import find_base_model
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.session import leave_process
from loraga_dist.ranks.world import World
from loraga_dist.sharding.zero3 import Zero3


def main(directory: Path) -> None:
    world = World.start()
    base = find_base_model(ModelConfig(name_or_path=str(directory)), "CAUSAL_LM", world.device)
    meta_model = meta_copy(base.model_class, base.config)
    shape = ModelShape.of(meta_model, torch.float32)
    model: Any = Zero3(world, None).load(
        base.directory, base.model_class, base.config, base.dtype, base.slots_of(meta_model)
    )
    shards = [parameter.ds_tensor for parameter in model.parameters()]
    assert shape.partition_bytes(world.size) == sum(shard.numel() * shard.element_size() for shard in shards)
    gathered = [sum(p.ds_numel for p in module.parameters(recurse=False)) for module in model.modules()]
    assert shape.largest_module_numel == max(gathered)
    world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process(0)
