"""Training under ZeRO-3 as a user's script does it, and alone, on the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraga_dist.ranks.world import World

GLOBAL_BATCH = 6
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}


def batches(seed: int, count: int, world: World) -> list[dict[str, Tensor]]:
    """This rank's part of `count` global batches of patterned bytes, equal numbers of tokens everywhere."""
    generator = torch.Generator().manual_seed(seed)
    per_rank = GLOBAL_BATCH // world.size
    mine = []
    for _ in range(count):
        start = torch.randint(97, 123, (GLOBAL_BATCH, 1), generator=generator)
        step = torch.randint(1, 4, (GLOBAL_BATCH, 1), generator=generator)
        ids = 97 + (start - 97 + step * torch.arange(24)) % 26
        mine.append(ids[world.rank * per_rank : (world.rank + 1) * per_rank])
    return [{"input_ids": ids, "labels": ids.clone()} for ids in mine]


@contextmanager
def zero3(world: World, *, switched_on: bool = True) -> Iterator[None]:
    """As in a training script: `from_pretrained` partitions while the block lasts, if there are several ranks."""
    switch = None
    if world.size > 1:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
        switch = HfDeepSpeedConfig(ZERO3) if switched_on else None
    yield
    del switch


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered where it is partitioned."""
    import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def train(model: nn.Module, data: list[dict[str, Tensor]], world: World) -> list[float]:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3)
    engine: Any = model.train()
    if world.size > 1:
        import deepspeed

        engine, *_ = deepspeed.initialize(model=model, config=ZERO3, optimizer=optimizer)
    losses = []
    for batch in data:
        loss = engine(**batch).loss
        if world.size > 1:
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(world.sum_(loss.detach().clone()).item() / world.size)
    return losses
