"""One rank of test_trainers: an example as it stands, then the logits of the model as it came out of training.

usage: trainer_worker.py LOGITS EXAMPLE ARGUMENTS...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from loraga_dist.ranks.session import leave_process

IDS = torch.arange(3, 43).view(2, 20) % 250


def main() -> None:
    result, example, *arguments = sys.argv[1:]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the first start, which takes a minute
    sys.argv = [example, *arguments]
    trained = runpy.run_path(example)["main"]()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    assert getattr(trained, "args", None) is None or trained.args.world_size == world_size, "ranks that share no work"
    # a Trainer's own model is the unwrapped one, and ZeRO-3 gathers in the engine's hooks
    engine = getattr(trained, "model_wrapped", trained)
    assert world_size == 1 or all(hasattr(parameter, "ds_id") for parameter in engine.parameters()), "not sharded"
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=IDS).logits.float()
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file({"logits": logits.contiguous()}, Path(result))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
    leave_process(0)
