"""One rank of test_gradients: every Linear's mean gradient by the exact engine against an unsharded autograd reference.

usage: gradient_worker.py MODEL_DIR DATA RESULT_JSON
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraga_dist.config import CalibrationConfig, GradientConfig, LoraSection, ModelConfig
from loraga_dist.data.losses import causal_lm
from loraga_dist.data.microbatches import assign_microbatches
from loraga_dist.data.samples import load_samples
from loraga_dist.engines import ExactEngine, StateHome
from loraga_dist.gradients.one_pass import LossTotals, forward, run_pass
from loraga_dist.model.base import find_base_model
from loraga_dist.model.plan import make_plan
from loraga_dist.model.targets import meta_copy, select_targets
from loraga_dist.ranks.progress import Progress
from loraga_dist.ranks.session import leave_process
from loraga_dist.ranks.world import World
from loraga_dist.schemes import SCHEMES
from loraga_dist.sharding.single import SingleProcess
from loraga_dist.sharding.zero3 import Zero3

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def reference_gradients(model_dir: str, microbatches: list) -> dict[str, torch.Tensor]:
    """d(mean loss over all supervised tokens)/dW by autograd, on one unsharded float32 model."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    num_tokens = sum(microbatch.num_supervised_tokens for microbatch in microbatches)
    for microbatch in microbatches:
        loss = causal_lm(forward(model, microbatch, torch.device("cpu")), microbatch.inputs["labels"])
        (loss / num_tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def main() -> None:
    model_dir, data, result = sys.argv[1:]
    world = World.start()
    base = find_base_model(ModelConfig(name_or_path=model_dir), "CAUSAL_LM", world.device)
    samples = load_samples(
        CalibrationConfig(data_files=data, max_length=64),
        AutoTokenizer.from_pretrained(model_dir),
        task_type="CAUSAL_LM",
        max_positions=base.max_positions,
    )

    def microbatches_of(rank: int, size: int) -> list:
        return assign_microbatches(samples, rank=rank, world_size=size, per_device_batch_size=2, pad_token_id=256)

    reference = reference_gradients(model_dir, microbatches_of(0, 1))
    sharding = Zero3(world, None) if world.size > 1 else SingleProcess(world)
    slots = base.slots_of(meta_copy(base.model_class, base.config))
    model = sharding.load(base.directory, base.model_class, base.config, base.dtype, slots)
    targets = select_targets(
        meta_copy(base.model_class, base.config), LoraSection(r=2, target_modules=PROJECTIONS), lambda r: 2 * r
    ).targets
    mine = microbatches_of(world.rank, world.size)
    cases = []
    for checkpointing, in_flight in itertools.product(("non_reentrant", "none", "reentrant"), (None, 1)):
        plan = make_plan(targets, GradientConfig(max_targets_in_flight=in_flight), SCHEMES["lora_ga"], world.size)
        module = sharding.attach(model)
        worst, seen = 0.0, 0
        for matrices in plan.groups:
            engine = ExactEngine(matrices, home=StateHome(world.device), seed=0, dtype=torch.float32)
            totals = LossTotals()
            run_pass(
                module,
                [matrix.name for matrix in matrices],
                mine,
                engine,
                sharding=sharding,
                loss_sum=causal_lm,
                checkpointing=checkpointing,
                progress=Progress("", len(mine), "batch", shown=False),
                totals=totals,
            )
            for matrix, G_MN in engine.mean_gradients(world, totals.num_tokens):
                expected = reference[f"{matrix.name}.weight"]
                worst = max(worst, ((G_MN - expected).norm() / expected.norm()).item())
                seen += 1
        gathered = [
            n
            for n, p in model.named_parameters()
            if getattr(p, "ds_status", None) and p.ds_status.name != "NOT_AVAILABLE"
        ]
        with_grad = [n for n, p in model.named_parameters() if p.grad is not None]
        sharding.detach()
        cases.append(
            {
                "checkpointing": checkpointing,
                "in_flight": in_flight,
                "worst": max(float(text) for text in world.all_texts(str(worst))),
                "targets": sum(int(text) for text in world.all_texts(str(seen))),
                "left_gathered": gathered,
                "with_grad": with_grad,
            }
        )
    tokens = [int(text) for text in world.all_texts(str(sum(m.num_supervised_tokens for m in mine)))]
    if world.is_main:
        Path(result).write_text(json.dumps({"cases": cases, "tokens_per_rank": tokens}))
    world.barrier()
    world.stop()


if __name__ == "__main__":
    main()
    leave_process(0)
