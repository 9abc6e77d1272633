"""Ten steps of transformers' and TRL's trainers from starts made in memory: two ranks' losses are those of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_data, save_feedback, save_model
from launching import ROOT
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

import loraga_dist
from loraga_dist.config import CalibrationConfig
from loraga_dist.data.microbatches import SampleSharder
from loraga_dist.data.samples import load_samples
from loraga_dist.ranks.world import World

STEPS, GLOBAL_BATCH = 10, 4
LORA = {"r": 4, "lora_alpha": 8}


@dataclass(frozen=True)
class Trained:
    """The loss of every step, and the singular values of every target before the first."""

    losses: list[float]
    singular_values: dict[str, list[float]]


def start_and_train(kind: str, init: Mapping[str, str], base: Path, data: Path, output: Path) -> Trained:
    """On every rank: a start in memory, and a trainer on it."""
    import deepspeed
    from datasets import Dataset, load_dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    is_alone = World.start().size == 1
    arguments = {"dpo": DPOConfig, "sft": SFTConfig, "trainer": TrainingArguments}[kind](
        output_dir=str(output),
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=GLOBAL_BATCH if is_alone else GLOBAL_BATCH // 2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        deepspeed=None if is_alone else str(ROOT / "examples" / "zero3_trainer.json"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        # a mean over all ranks' tokens, however many each has
        **({} if kind == "dpo" else {"average_tokens_across_devices": True}),
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer, world = AutoTokenizer.from_pretrained(base), World.current()
    samples = load_samples(
        CalibrationConfig(data_files=str(data)), tokenizer, task_type="CAUSAL_LM", max_positions=None
    )
    sharder = SampleSharder(
        samples=samples, rank=world.rank, world_size=world.size, per_device_batch_size=2, pad_token_id=256
    )
    microbatches = sharder.microbatches(0, len(samples), 0)
    start = loraga_dist.initialize(model, microbatches, {"lora": LORA, "init": dict(init)})
    if kind == "dpo":
        rows = load_dataset("json", data_files=str(data), split="train")
        adapter = [parameter for parameter in start.model.parameters() if parameter.requires_grad]
        # TRL copies the adapter for its reference, and a shard is not what it takes it for
        with deepspeed.zero.GatheredParameters(adapter, enabled=world.size > 1):
            trainer: Any = DPOTrainer(start.model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    else:
        rows = Dataset.from_list([sample.inputs for sample in samples])
        inputs = {"model": start.model, "args": arguments, "train_dataset": rows, "processing_class": tokenizer}
        trainer = (
            SFTTrainer(**inputs)
            if kind == "sft"
            else Trainer(**inputs, data_collator=DataCollatorForSeq2Seq(tokenizer))
        )
    trainer.train()
    assert world.size == 1 or all(hasattr(parameter, "ds_id") for parameter in trainer.model_wrapped.parameters())
    assert start.gradients is not None
    return Trained(
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        {name: facts.singular_values for name, facts in start.gradients.facts.items()},
    )


def agree(sharded: Trained, alone: Trained) -> None:
    assert len(sharded.losses) == STEPS
    assert sharded.losses == pytest.approx(alone.losses, rel=1e-4)
    for name, values in alone.singular_values.items():
        assert sharded.singular_values[name][:8] == pytest.approx(values[:8], rel=1e-3), name


def test_dpo_trainer(tmp_path: Path) -> None:
    base, data = save_model(tmp_path / "base"), save_feedback(tmp_path / "data.jsonl", "pairs")
    alone, sharded = (
        run_on_ranks(start_and_train, ranks, "dpo", {}, base, data, tmp_path / "out")[0] for ranks in (1, 2)
    )
    agree(sharded, alone)
    assert sharded.losses[0] == pytest.approx(math.log(2), rel=1e-4), "the reference is not the model that trains"
    assert max(sharded.losses[5:]) < math.log(2)


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_trainers_go_on_from_a_regression(kind: str, tmp_path: Path) -> None:
    base, data = save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl")
    alone, sharded = (
        run_on_ranks(start_and_train, ranks, kind, {"scheme": "rrr"}, base, data, tmp_path / "out")[0]
        for ranks in (1, 2)
    )
    agree(sharded, alone)
    assert min(sharded.losses[5:]) < sharded.losses[0]
