"""A start for DPO: the same on two ranks as on one, and ten steps of TRL's DPOTrainer from there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, save_model
from launching import ROOT
from outputs import make_output, read_products, read_report, relative
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

import loraga_dist
from loraga_dist.config import CalibrationConfig
from loraga_dist.data.microbatches import SampleSharder
from loraga_dist.data.samples import load_samples
from loraga_dist.ranks.world import World

STEPS, GLOBAL_BATCH = 10, 4


def save_feedback(path: Path, kind: str) -> Path:
    """Rows of many lengths: sorted letters are preferred."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for row in range(40 if kind == "pairs" else 7):
        letters = "".join(chr(97 + int(i)) for i in torch.randint(26, (4 + row % 9,), generator=generator))
        good, bad = "".join(sorted(letters)), letters[: 3 + row % 5]
        if kind == "pairs":
            rows.append({"prompt": f"sort {letters}: ", "chosen": good, "rejected": bad})
        else:
            rows += [
                {"prompt": letters, "completion": good, "reward": 2},
                {"prompt": letters, "completion": bad, "reward": 0.5},
            ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["pairs", "rewards"])
def test_the_start_is_the_same_on_two_ranks(kind: str, tmp_path: Path) -> None:
    base, data = save_model(tmp_path / "base"), save_feedback(tmp_path / "data.jsonl", kind)
    outs = {}
    for ranks in (1, 2):
        # with an odd number of samples in the last step
        calibration = {"per_device_batch_size": 4 // ranks, "max_samples": 13}
        outs[ranks] = make_output(config_tree(base, data, tmp_path / f"out{ranks}", calibration=calibration), ranks)
    found, expected = (read_products(outs[ranks]) for ranks in (2, 1))
    assert found.keys() == expected.keys() and len(found) == 21
    for name, product in expected.items():
        assert relative(found[name], product) < 1e-3, name
    reports = [read_report(outs[ranks]) for ranks in (1, 2)]
    assert reports[0]["loss"] == {"pairs": "dpo", "rewards": "policy_gradient"}[kind]
    for key in ("num_sequences", "num_supervised_tokens", "data_fingerprint"):
        assert reports[0][key] == reports[1][key]
    for key in ("mean_loss", "split_half_cosine"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-3)


@dataclass(frozen=True)
class Trained:
    """The loss of every step, and the singular values of every target's gradient before the first."""

    losses: list[float]
    singular_values: dict[str, list[float]]


def start_and_train(base: Path, data: Path, output: Path) -> Trained:
    """On every rank: a start in memory, and DPOTrainer on it."""
    import deepspeed
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    is_alone = World.start().size == 1
    arguments = DPOConfig(
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
    start = loraga_dist.initialize(model, microbatches, {"lora": {"r": 4, "lora_alpha": 8}})
    rows = load_dataset("json", data_files=str(data), split="train")
    adapter = [parameter for parameter in start.model.parameters() if parameter.requires_grad]
    # TRL copies the adapter for its reference, and a shard is not what it takes it for
    with deepspeed.zero.GatheredParameters(adapter, enabled=world.size > 1):
        trainer = DPOTrainer(start.model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert world.size == 1 or all(hasattr(parameter, "ds_id") for parameter in trainer.model_wrapped.parameters())
    assert start.gradients is not None
    return Trained(
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        {name: facts.singular_values for name, facts in start.gradients.facts.items()},
    )


def test_ten_steps_of_dpo_trainer_from_a_start_in_memory(tmp_path: Path) -> None:
    base, data = save_model(tmp_path / "base"), save_feedback(tmp_path / "data.jsonl", "pairs")
    alone, sharded = (run_on_ranks(start_and_train, ranks, base, data, tmp_path / "dpo")[0] for ranks in (1, 2))
    assert len(sharded.losses) == STEPS
    assert sharded.losses[0] == pytest.approx(math.log(2), rel=1e-4), "the reference is not the model that trains"
    assert sharded.losses == pytest.approx(alone.losses, rel=1e-4)
    assert max(sharded.losses[5:]) < math.log(2)
    for name, values in alone.singular_values.items():
        assert sharded.singular_values[name][:8] == pytest.approx(values[:8], rel=1e-3), name
