"""Train on from a LoRA-GA start under ZeRO-3: the library call, then an ordinary DeepSpeed loop.

    deepspeed --num_gpus 2 examples/train_zero3.py \\
        --model build/quickstart/model --data build/quickstart/calibration.jsonl

The order matters: model under zero.Init, `loraga_dist.initialize`, then `deepspeed.initialize` with the optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import loraga_dist


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL with a column 'text'")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4, help="per rank")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--save", help="directory for the trained adapter")
    parser.add_argument("--local_rank", type=int, default=0)  # added by the deepspeed launcher
    options = parser.parse_args()

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
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batches = read_batches(options)

    start = loraga_dist.initialize(model, batches[:8], {"lora": {"r": options.rank, "lora_alpha": 2 * options.rank}})
    say(f"{len(start.targets)} targets, logits moved by {start.identity_check.max_abs_logit_diff:.1e} at most")

    trainable = [parameter for parameter in start.model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=start.model, config=settings, optimizer=torch.optim.AdamW(trainable, lr=options.learning_rate)
    )
    for step in range(options.steps):
        batch = {name: tensor.to(engine.device) for name, tensor in batches[step % len(batches)].items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach().clone())
        say(f"step {step + 1}: loss {loss.item() / dist.get_world_size():.4f}")
    if options.save:
        save_adapter(start.model, Path(options.save))
    del keep_alive
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # on CPUs gloo's threads can abort an orderly exit, after all work is done


def read_batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """This rank's batches: every rank takes its own lines."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [json.loads(line)["text"] for line in Path(options.data).read_text().splitlines()]
    texts = texts[dist.get_rank() :: dist.get_world_size()]
    batches = []
    for first in range(0, len(texts) - options.batch_size + 1, options.batch_size):
        batch = tokenizer(
            texts[first : first + options.batch_size],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=256,
            return_token_type_ids=False,
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(dict(batch))
    return batches


def save_adapter(model: torch.nn.Module, directory: Path) -> None:
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
