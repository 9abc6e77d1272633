"""One rank of test_in_place_refusals: each case must raise UserError on this rank and leave its model alone.

usage: refusal_worker.py MODEL_DIR CASE...
"""

from __future__ import annotations

import sys

import deepspeed
import torch
from in_place_worker import LORA, SETTINGS, batches
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

import loraga_dist
from loraga_dist.ranks.session import leave_process
from loraga_dist.ranks.world import World


def attempt(model_dir: str, case: str, world: World) -> None:
    switch = None if case == "unsharded" else HfDeepSpeedConfig(SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    dataloader = batches(1, 2, world)
    config: dict[str, object] = {"lora": LORA}
    if case == "optimizer":
        deepspeed.initialize(model=model, config=SETTINGS, optimizer=torch.optim.AdamW(model.parameters()))
    elif case == "nvme":
        config["deepspeed"] = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    elif case == "hpz":
        config["deepspeed"] = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    elif case == "dora":
        config["lora"] = LORA | {"use_dora": True}
    elif case == "no-labels":
        dataloader = [{"input_ids": batch["input_ids"]} for batch in dataloader]
    elif case == "one-rank-empty" and world.rank == 1:
        dataloader = []
    try:
        loraga_dist.initialize(model, dataloader, config)
    except loraga_dist.LoragaError as error:
        print(f"{case}: {error.exit_code} {error}", flush=True)
    assert not any("lora" in name for name, _ in model.named_parameters())
    del switch


def main() -> None:
    model_dir, *cases = sys.argv[1:]
    world = World.start()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    for case in cases:
        attempt(model_dir, case, world)
        world.barrier()
    world.stop()


if __name__ == "__main__":
    main()
    leave_process(0)
