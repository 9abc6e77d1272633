"""One rank of test_in_place: initialize on a partitioned (or plain) model, then train ten steps.

usage: in_place_worker.py MODEL_DIR RESULT_DIR MODE      MODE: loraga | default | weights
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import loraga_dist
from loraga_dist.ranks.session import leave_process
from loraga_dist.ranks.world import World
from loraga_dist.sharding.zero3 import Zero3

GLOBAL_BATCH = 6
STEPS = 10
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}
LORA = {"r": 4, "lora_alpha": 8}


def batches(seed: int, count: int, world: World) -> list[dict[str, torch.Tensor]]:
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


def gathered(model: torch.nn.Module, sharded: bool) -> dict[str, torch.Tensor]:
    if not sharded:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    import deepspeed

    full = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            full[name] = parameter.detach().clone()
    return full


def watch_gathered_weights() -> None:
    """Fail when a rank gets a weight while it still holds the one before."""
    gather, storages = Zero3.weight_on, []

    def weight_on(self: Zero3, parameter: torch.nn.Parameter, owner: int) -> torch.Tensor | None:
        if owner == self.world.rank:
            assert not any(storage() for storage in storages), "a weight gathered before is still there"
        weight = gather(self, parameter, owner)
        assert (weight is not None) == (owner == self.world.rank)
        if weight is not None:
            storages.append(weakref.ref(weight.untyped_storage()))
        return weight

    Zero3.weight_on = weight_on  # type: ignore[method-assign]


def main() -> None:
    model_dir, result_dir, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    world = World.start()
    sharded = world.size > 1
    if sharded:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
        switch = HfDeepSpeedConfig(SETTINGS)  # from_pretrained shards while it lives
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    calibration = batches(1, 4, world)
    if mode == "loraga":
        start = loraga_dist.initialize(
            model, calibration, {"lora": LORA, "gradient": {"engine": "exact", "oversampling": 8}}
        )
        peft_model = start.model
        print("identity", start.identity_check, flush=True)
        assert start.identity_check.max_abs_logit_diff < 1e-5 * start.identity_check.max_abs_logit
    elif mode == "weights":
        watch_gathered_weights()
        start = loraga_dist.initialize(model, None, {"lora": LORA, "init": {"scheme": "pissa"}})
        peft_model = start.model
        assert start.calibration is None
        assert start.identity_check.max_abs_logit_diff < 1e-5 * start.identity_check.max_abs_logit
    else:
        torch.manual_seed(0)
        peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", **LORA))

    weights = gathered(peft_model, sharded)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in n for n, p in peft_model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    losses = []
    peft_model.train()
    if sharded:
        engine, *_ = deepspeed.initialize(model=peft_model, config=SETTINGS, optimizer=optimizer)
        for batch in batches(2, STEPS, world):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(world.sum_(loss.detach().clone()).item() / world.size)
    else:
        for batch in batches(2, STEPS, world):
            loss = peft_model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    after = gathered(peft_model, sharded)
    if world.is_main:
        trained = {f"trained.{name}": tensor for name, tensor in after.items() if "lora_" in name}
        save_file(
            {**weights, **trained, "losses": torch.tensor(losses)}, result_dir / f"{mode}-{world.size}.safetensors"
        )
    if sharded:
        del switch
    world.barrier()
    world.stop()


if __name__ == "__main__":
    main()
    leave_process(0)
