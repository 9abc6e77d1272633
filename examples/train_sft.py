"""Train on from a LoRA-GA start with TRL's SFTTrainer, in one process or under ZeRO-3.

    python examples/train_sft.py --loraga_dir runs/quickstart --data build/quickstart/calibration.jsonl

    deepspeed --num_gpus 2 examples/train_sft.py --loraga_dir runs/quickstart \\
        --data build/quickstart/calibration.jsonl --output runs/sft-zero3 --deepspeed examples/zero3_trainer.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import PeftConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> SFTTrainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loraga_dir", type=Path, required=True, help="output directory of loraga-dist init")
    parser.add_argument("--data", required=True, help="JSONL in any of TRL's formats")
    parser.add_argument("--output", default="runs/sft")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=10)
    parser.add_argument("--resume_from_checkpoint", help="for instance runs/sft/checkpoint-10")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="as for full fine-tuning")
    parser.add_argument(
        "--loraplus_lr_ratio", type=float, default=1.0, help="learning rate of B over that of A (LoRA+)"
    )
    parser.add_argument("--deepspeed", help="DeepSpeed's JSON, to shard the model by ZeRO-3")
    parser.add_argument("--local_rank", type=int, default=0)  # added by the deepspeed launcher
    options = parser.parse_args()

    # before the model: from_pretrained shards it as these say
    arguments = SFTConfig(
        output_dir=options.output,
        max_steps=options.steps,
        save_steps=options.save_steps,
        logging_steps=1,
        per_device_train_batch_size=4,
        max_length=256,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        deepspeed=options.deepspeed,
        use_cpu=not torch.cuda.is_available(),  # else accelerate takes each of several ranks for the only one
        bf16=torch.cuda.is_available(),  # SFTConfig's default is True
        report_to="none",
    )
    adapter, base_name, revision = options.loraga_dir / "loraga_init", options.loraga_dir / "residual_base", None
    if not base_name.exists():  # a scheme that leaves the base as it is
        peft_config = PeftConfig.from_pretrained(adapter)
        base_name, revision = peft_config.base_model_name_or_path, peft_config.revision
    base = AutoModelForCausalLM.from_pretrained(base_name, revision=revision, dtype=torch.float32)
    trainer = LoraPlusSFTTrainer(
        # without is_trainable TRL trains nothing; with a peft_config it would add a second adapter
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True),
        args=arguments,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(base_name, revision=revision),
    )
    trainer.loraplus_lr_ratio = options.loraplus_lr_ratio
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    trainer.save_model(f"{options.output}/trained")
    return trainer


class LoraPlusSFTTrainer(SFTTrainer):
    """LoRA+: a larger learning rate for B. Under DeepSpeed, `SFTTrainer(optimizers=...)` is dropped without a word."""

    loraplus_lr_ratio = 1.0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = create_loraplus_optimizer(
            self.model,
            torch.optim.AdamW,
            lr=self.args.learning_rate,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
        )
        return self.optimizer


if __name__ == "__main__":
    main()
