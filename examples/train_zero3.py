"""Train on from a LoRA-GA start in an ordinary DeepSpeed ZeRO-3 loop.

From the files of `loraga-dist init`, with checkpoints to resume from:

    deepspeed --num_gpus 2 examples/train_zero3.py --loraga_dir runs/quickstart \\
        --data build/quickstart/calibration.jsonl

or from a start that is made in memory and saved as `start/` in the output directory, for `loraga-dist convert`:

    deepspeed --num_gpus 2 examples/train_zero3.py --model build/quickstart/model \\
        --data build/quickstart/calibration.jsonl --output runs/zero3-in-memory

The order matters: model under zero.Init, `loraga_dist.initialize`, `save_start`, then `deepspeed.initialize` with the
optimizer.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from from_start import FirstLosses, base_of, read_samples
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import loraga_dist
from loraga_dist.artifacts.report import Report
from loraga_dist.config import CalibrationConfig
from loraga_dist.data.microbatches import SampleSharder
from loraga_dist.data.samples import padding_token_id


def main() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loraga_dir", type=Path, help="output directory of loraga-dist init")
    parser.add_argument("--model", help="without --loraga_dir: the model to make a start of in memory")
    parser.add_argument("--data", required=True, help="a file in any format that calibration takes")
    parser.add_argument("--output", type=Path, default=Path("runs/zero3"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=10)
    parser.add_argument("--resume_from_checkpoint", help="for instance step10; needs --loraga_dir")
    parser.add_argument("--batch_size", type=int, default=4, help="per rank")
    parser.add_argument("--learning_rate", type=float, help="by default the one that the start's README.md names")
    parser.add_argument(
        "--loraplus_lr_ratio", type=float, default=1.0, help="learning rate of B over that of A (LoRA+)"
    )
    parser.add_argument("--rank", type=int, default=8, help="of a start made in memory")
    parser.add_argument("--local_rank", type=int, default=0)  # added by the deepspeed launcher
    options = parser.parse_args()
    if (options.loraga_dir is None) == (options.model is None) or (
        options.resume_from_checkpoint and not options.loraga_dir
    ):
        parser.error("write either --loraga_dir or --model; --resume_from_checkpoint goes with --loraga_dir")
    start_directory = options.output / "start"
    if options.model and start_directory.exists():
        parser.error(f"{start_directory} exists: write another --output")

    transformers.set_seed(0)
    if not torch.cuda.is_available():
        # on CPUs DeepSpeed would compile a shared-memory all-reduce first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    settings = {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 1.0,
    }
    keep_alive = HfDeepSpeedConfig(settings)  # from_pretrained shards while it lives
    if options.loraga_dir:
        base_name, how = base_of(options.loraga_dir)
        calibration = Report.read(options.loraga_dir).config.calibration
    else:
        base_name, how, calibration = options.model, {}, CalibrationConfig(max_length=256)
    base = AutoModelForCausalLM.from_pretrained(base_name, **how, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_name, **how)
    batches = read_batches(options, calibration, tokenizer, base.config.get_text_config().vocab_size)
    if options.loraga_dir:
        model: Any = PeftModel.from_pretrained(base, options.loraga_dir / "loraga_init", is_trainable=True)
    else:
        start = loraga_dist.initialize(base, batches[:8], {"lora": {"r": options.rank, "lora_alpha": 2 * options.rank}})
        say(f"{len(start.targets)} targets, logits moved by {start.identity_check.max_abs_logit_diff:.1e} at most")
        say(f"convert later with --init {loraga_dist.save_start(start, start_directory)}/loraga_init")
        model = start.model

    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = Report.read(options.loraga_dir or start_directory).learning_rate
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        # experts: which run differs between ranks, and PEFT's layers nest, so each is gathered at once
        deepspeed.utils.set_z3_leaf_modules(model, [ParamWrapper])
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate, options.loraplus_lr_ratio))
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)
    del keep_alive
    if options.resume_from_checkpoint:
        # frozen parameters are not in it: they come from residual_base
        engine.load_checkpoint(options.output / "checkpoints", options.resume_from_checkpoint, load_module_strict=False)
    engine.train()
    first_losses = FirstLosses(learning_rate)
    for step in range(engine.global_steps, options.steps):
        batch = {name: tensor.to(engine.device) for name, tensor in batches[step % len(batches)].items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach().clone())
        mean_loss = loss.item() / dist.get_world_size()
        say(f"step {step + 1}: loss {mean_loss:.4f}")
        if warning := first_losses.warning(mean_loss):
            say(warning)
        if options.loraga_dir and (step + 1) % options.save_steps == 0:
            engine.save_checkpoint(options.output / "checkpoints", f"step{step + 1}", exclude_frozen_parameters=True)
    save_adapter(model, options.output / "trained")
    return engine


def parameter_groups(model: torch.nn.Module, learning_rate: float, loraplus_lr_ratio: float) -> list[dict[str, Any]]:
    """LoRA+: a larger learning rate for B.

    What `peft.optimizers.create_loraplus_optimizer` does, by name alone: it takes every parameter with one dimension
    for a B, and a ZeRO-3 shard has one.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [
        {"params": [p for name, p in trainable.items() if "lora_B" not in name], "lr": learning_rate},
        {"params": [p for name, p in trainable.items() if "lora_B" in name], "lr": learning_rate * loraplus_lr_ratio},
    ]


def read_batches(
    options: argparse.Namespace, calibration: CalibrationConfig, tokenizer: Any, num_embeddings: int
) -> list[dict[str, torch.Tensor]]:
    """This rank's batches, as many as the steps take; every rank reads the data and takes its own samples."""
    num_samples = options.steps * options.batch_size * dist.get_world_size()
    sharder = SampleSharder(
        samples=read_samples(options.data, calibration, tokenizer, num_samples),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        per_device_batch_size=options.batch_size,
        pad_token_id=padding_token_id(tokenizer, num_embeddings),
    )
    num_whole = sharder.num_samples // sharder.samples_per_step * sharder.samples_per_step
    if not num_whole:
        sys.exit(f"{options.data} holds {sharder.num_samples} samples, one step takes {sharder.samples_per_step}")
    return [microbatch.inputs for microbatch in sharder.microbatches(0, num_whole, 0)]


def save_adapter(model: Any, directory: Path) -> None:
    """Gather the adapter, nothing else, and write it from rank 0."""
    adapter = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(adapter.values()), modifier_rank=None):
        full = {name: parameter.detach().cpu().clone() for name, parameter in adapter.items()}
    if dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=full)


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # on CPUs gloo's threads can abort an orderly exit, after all work is done
