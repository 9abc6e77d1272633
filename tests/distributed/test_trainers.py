"""The examples, each from a start to the trained adapter on the original base, as stock PEFT loads it there."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import config_tree, save_data, save_model
from launching import INIT, ROOT, run_ranks, succeed
from peft import PeftModel
from safetensors.torch import load_file
from trainer_worker import IDS
from transformers import AutoModelForCausalLM

from loraga_dist.cli import main

WORKER = str(Path(__file__).with_name("trainer_worker.py"))
EXAMPLES = ROOT / "examples"
LEARNING_RATE, LORAPLUS_RATIO = 3e-3, 4.0


@dataclass(frozen=True)
class Started:
    """A base, the start that `init` made of it, and data."""

    base: Path
    data: Path
    out: Path


@dataclass(frozen=True)
class Way:
    """One trainer on so many ranks: its example, and where a checkpoint of step 2 lies and what names it."""

    example: str
    world_size: int
    checkpoint: str
    resume_from: str
    arguments: tuple[str, ...] = ()


ZERO3 = ("--deepspeed", str(EXAMPLES / "zero3_trainer.json"))
WAYS = {
    "zero3-2": Way("train_zero3.py", 2, "checkpoints/step2", "step2"),
    "trainer-2": Way("train_trainer.py", 2, "checkpoint-2", "{output}/checkpoint-2", ZERO3),
    "sft-1": Way("train_sft.py", 1, "checkpoint-2", "{output}/checkpoint-2"),
    "sft-2": Way("train_sft.py", 2, "checkpoint-2", "{output}/checkpoint-2", ZERO3),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    root = tmp_path_factory.mktemp("start")
    started = Started(save_model(root / "base"), save_data(root / "data.jsonl"), root / "out")
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(started.base, started.data, started.out)))
    succeed(run_ranks([INIT, "--config", str(config)], 1))
    return started


def train(way: Way, *arguments: str, logits: Path) -> torch.Tensor:
    words = [*way.arguments, *arguments, "--learning_rate", str(LEARNING_RATE)]
    words += ["--loraplus_lr_ratio", str(LORAPLUS_RATIO), "--steps", "4", "--save_steps", "2"]
    succeed(run_ranks([WORKER, str(logits), str(EXAMPLES / way.example), *words], way.world_size))
    return load_file(logits)["logits"]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def converted(base: Path, init: Path, trained: Path, to: Path) -> torch.Tensor:
    """Logits of the converted adapter on the original base, with nothing but PEFT and transformers."""
    assert main(["convert", "--init", str(init), "--trained", str(trained), "--to", str(to)]) == 0
    assert json.loads((to / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), to))


def mean_step(init: Path, trained: Path, kind: str) -> float:
    """How far the elements of all A, or of all B, have come."""
    before, after = (load_file(directory / "adapter_model.safetensors") for directory in (init, trained))
    keys = [key for key in before if f"lora_{kind}" in key]
    return torch.cat([(after[key] - before[key]).abs().flatten() for key in keys]).mean().item()


@pytest.mark.parametrize("name", WAYS)
def test_trained_saved_resumed_and_converted(started: Started, name: str, tmp_path: Path) -> None:
    way = WAYS[name]
    inputs = ["--loraga_dir", str(started.out), "--data", str(started.data)]
    logits = train(way, *inputs, "--output", str(tmp_path / "whole"), logits=tmp_path / "whole.safetensors")
    size = logits.abs().max()
    original = logits_of(AutoModelForCausalLM.from_pretrained(started.base))
    assert (original - logits).abs().max() > 1e-2 * size, "training changed nothing"

    again = tmp_path / "again"
    (again / way.checkpoint).parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / way.checkpoint, again / way.checkpoint)
    resume = ["--resume_from_checkpoint", way.resume_from.format(output=again)]
    resumed = train(way, *inputs, "--output", str(again), *resume, logits=tmp_path / "again.safetensors")
    assert (resumed - logits).abs().max() < 1e-5 * size

    for trained in (tmp_path / "whole" / "trained", again / "trained"):
        found = converted(started.base, started.out / "loraga_init", trained, tmp_path / trained.parent.name / "plain")
        assert (found - logits).abs().max() < 1e-5 * size
    moved = {kind: mean_step(started.out / "loraga_init", tmp_path / "whole" / "trained", kind) for kind in "AB"}
    # Adam's steps are about as long as the learning rate, whatever the gradient
    assert 0.6 * LORAPLUS_RATIO < moved["B"] / moved["A"] < 1.5 * LORAPLUS_RATIO


def test_a_start_on_the_original_base_trains_there(started: Started, tmp_path: Path) -> None:
    plain = config_tree(started.base, started.data, tmp_path / "out") | {"init": {"scheme": "kaiming"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    succeed(run_ranks([INIT, "--config", str(tmp_path / "config.yaml")], 1))
    inputs = ["--loraga_dir", str(tmp_path / "out"), "--data", str(started.data), "--output", str(tmp_path / "trained")]
    logits = train(WAYS["sft-1"], *inputs, logits=tmp_path / "logits.safetensors")
    base = AutoModelForCausalLM.from_pretrained(started.base)
    size = logits.abs().max()
    assert (logits_of(base) - logits).abs().max() > 1e-2 * size
    trained = PeftModel.from_pretrained(base, tmp_path / "trained" / "trained")
    assert (logits_of(trained) - logits).abs().max() < 1e-5 * size


def test_a_start_made_in_memory_is_converted(started: Started, tmp_path: Path) -> None:
    """Shards of two ranks: the start is saved before training, and taken out of the trained adapter afterwards."""
    way, output = WAYS["zero3-2"], tmp_path / "out"
    inputs = ["--model", str(started.base), "--data", str(started.data), "--output", str(output), "--rank", "4"]
    logits = train(way, *inputs, logits=tmp_path / "logits.safetensors")
    size = logits.abs().max()
    init = output / "start" / "loraga_init"
    found = converted(started.base, init, output / "trained", tmp_path / "plain")
    assert (found - logits).abs().max() < 1e-5 * size
    assert (logits_of(AutoModelForCausalLM.from_pretrained(started.base)) - logits).abs().max() > 1e-2 * size

    named = json.loads((output / "trained" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(output / "start" / "residual_base"), "on the original base it would be wrong"
    (refused,) = run_ranks([str(EXAMPLES / way.example), *inputs], 1)
    assert refused.code == 2 and "start exists: write another --output" in refused.stderr

    # what resumes it elsewhere: the residual base from the original one and the saved start
    assert main(["materialize-base", str(output / "start")]) == 0
    residual = AutoModelForCausalLM.from_pretrained(output / "start" / "residual_base")
    trained = logits_of(PeftModel.from_pretrained(residual, output / "trained"))
    assert (trained - logits).abs().max() < 1e-5 * size
