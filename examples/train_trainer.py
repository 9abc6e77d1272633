"""Train on from a LoRA-GA start with transformers' Trainer, in one process or under ZeRO-3.

    python examples/train_trainer.py --loraga_dir runs/quickstart --data build/quickstart/calibration.jsonl

    deepspeed --num_gpus 2 examples/train_trainer.py --loraga_dir runs/quickstart \\
        --data build/quickstart/calibration.jsonl --output runs/trainer-zero3 --deepspeed examples/zero3_trainer.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from from_start import WarnOfFirstLosses, base_of, read_samples
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from loraga_dist.artifacts.report import Report


def main() -> Trainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loraga_dir", type=Path, required=True, help="output directory of loraga-dist init")
    parser.add_argument("--data", required=True, help="a file in any format that calibration takes")
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=10)
    parser.add_argument("--resume_from_checkpoint", help="for instance runs/trainer/checkpoint-10")
    parser.add_argument("--learning_rate", type=float, help="by default the one that the start's README.md names")
    parser.add_argument(
        "--loraplus_lr_ratio", type=float, default=1.0, help="learning rate of B over that of A (LoRA+)"
    )
    parser.add_argument("--deepspeed", help="DeepSpeed's JSON, to shard the model by ZeRO-3")
    parser.add_argument("--local_rank", type=int, default=0)  # added by the deepspeed launcher
    options = parser.parse_args()
    start = Report.read(options.loraga_dir)
    learning_rate = start.learning_rate if options.learning_rate is None else options.learning_rate

    # before the model: from_pretrained shards it as these say
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        save_steps=options.save_steps,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        deepspeed=options.deepspeed,
        use_cpu=not torch.cuda.is_available(),  # else accelerate takes each of several ranks for the only one
        report_to="none",
    )
    base_name, how = base_of(options.loraga_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_name, **how)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(base_name, **how, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, options.loraga_dir / "loraga_init", is_trainable=True)

    num_samples = options.steps * arguments.train_batch_size * arguments.world_size
    samples = read_samples(options.data, start.config.calibration, tokenizer, num_samples)
    trainer = LoraPlusTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([sample.inputs for sample in samples]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels, too
        callbacks=[WarnOfFirstLosses(learning_rate)],
    )
    trainer.loraplus_lr_ratio = options.loraplus_lr_ratio
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    trainer.save_model(f"{options.output}/trained")
    return trainer


class LoraPlusTrainer(Trainer):
    """LoRA+: a larger learning rate for B. Under DeepSpeed, `Trainer(optimizers=...)` is dropped without a word."""

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
