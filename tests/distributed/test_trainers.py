"""The examples, each from a start to the trained adapter on the original base, as stock PEFT loads it there."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import config_tree, save_data, save_model
from launching import ROOT
from outputs import IDS, causal_lm, logits_of, make_output, read_adapter
from peft import PeftModel
from ranks import run_on_ranks, run_script

from loraga_dist.cli import main

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
    base, data = save_model(root / "base"), save_data(root / "data.jsonl")
    return Started(base, data, make_output(config_tree(base, data, root / "out")))


def run_example(example: str, arguments: Sequence[str]) -> torch.Tensor:
    """On every rank: an example as it stands, then the logits of the model as it came out of training."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the first start, which takes a minute
    sys.argv, sys.path[0] = [example, *arguments], str(Path(example).parent)
    trained = runpy.run_path(example)["main"]()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    assert getattr(trained, "args", None) is None or trained.args.world_size == world_size, "ranks that share no work"
    # a Trainer's own model is the unwrapped one, and ZeRO-3 gathers in the engine's hooks
    engine = getattr(trained, "model_wrapped", trained)
    assert world_size == 1 or all(hasattr(parameter, "ds_id") for parameter in engine.parameters()), "not sharded"
    engine.eval()
    with torch.no_grad():
        return engine(input_ids=IDS).logits.float()


def train(way: Way, *arguments: str) -> torch.Tensor:
    words = [*way.arguments, *arguments, "--learning_rate", str(LEARNING_RATE)]
    words += ["--loraplus_lr_ratio", str(LORAPLUS_RATIO), "--steps", "4", "--save_steps", "2"]
    return run_on_ranks(run_example, way.world_size, str(EXAMPLES / way.example), words)[0]


def converted(base: Path, init: Path, trained: Path, to: Path) -> torch.Tensor:
    """Logits of the converted adapter on the original base, with nothing but PEFT and transformers."""
    assert main(["convert", "--init", str(init), "--trained", str(trained), "--to", str(to)]) == 0
    assert json.loads((to / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    return logits_of(PeftModel.from_pretrained(causal_lm(base), to))


def mean_step(init: Path, trained: Path, kind: str) -> float:
    """How far the elements of all A, or of all B, have come."""
    before, after = read_adapter(init.parent), read_adapter(trained.parent, trained.name)
    keys = [key for key in before if f"lora_{kind}" in key]
    return torch.cat([(after[key] - before[key]).abs().flatten() for key in keys]).mean().item()


@pytest.mark.parametrize("name", WAYS)
def test_trained_saved_resumed_and_converted(started: Started, name: str, tmp_path: Path) -> None:
    way = WAYS[name]
    inputs = ["--loraga_dir", str(started.out), "--data", str(started.data)]
    logits = train(way, *inputs, "--output", str(tmp_path / "whole"))
    size = logits.abs().max()
    original = logits_of(causal_lm(started.base))
    assert (original - logits).abs().max() > 1e-2 * size, "training changed nothing"

    again = tmp_path / "again"
    (again / way.checkpoint).parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / way.checkpoint, again / way.checkpoint)
    resume = ["--resume_from_checkpoint", way.resume_from.format(output=again)]
    resumed = train(way, *inputs, "--output", str(again), *resume)
    assert (resumed - logits).abs().max() < 1e-5 * size

    for trained in (tmp_path / "whole" / "trained", again / "trained"):
        found = converted(started.base, started.out / "loraga_init", trained, tmp_path / trained.parent.name / "plain")
        assert (found - logits).abs().max() < 1e-5 * size
    moved = {kind: mean_step(started.out / "loraga_init", tmp_path / "whole" / "trained", kind) for kind in "AB"}
    # Adam's steps are about as long as the learning rate, whatever the gradient
    assert 0.6 * LORAPLUS_RATIO < moved["B"] / moved["A"] < 1.5 * LORAPLUS_RATIO


def test_a_start_on_the_original_base_trains_there(started: Started, tmp_path: Path) -> None:
    out = make_output(config_tree(started.base, started.data, tmp_path / "out", init={"scheme": "kaiming"}))
    inputs = ["--loraga_dir", str(out), "--data", str(started.data), "--output", str(tmp_path / "trained")]
    logits = train(WAYS["sft-1"], *inputs)
    base = causal_lm(started.base)
    size = logits.abs().max()
    assert (logits_of(base) - logits).abs().max() > 1e-2 * size
    trained = PeftModel.from_pretrained(base, tmp_path / "trained" / "trained")
    assert (logits_of(trained) - logits).abs().max() < 1e-5 * size


def test_a_start_made_in_memory_is_converted(started: Started, tmp_path: Path) -> None:
    """Shards of two ranks: the start is saved before training, and taken out of the trained adapter afterwards."""
    way, output = WAYS["zero3-2"], tmp_path / "out"
    inputs = ["--model", str(started.base), "--data", str(started.data), "--output", str(output), "--rank", "4"]
    logits = train(way, *inputs)
    size = logits.abs().max()
    init = output / "start" / "loraga_init"
    found = converted(started.base, init, output / "trained", tmp_path / "plain")
    assert (found - logits).abs().max() < 1e-5 * size
    assert (logits_of(causal_lm(started.base)) - logits).abs().max() > 1e-2 * size

    named = json.loads((output / "trained" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(output / "start" / "residual_base"), "on the original base it would be wrong"
    (refused,) = run_script([str(EXAMPLES / way.example), *inputs], 1)
    assert refused.code == 2 and "start exists: write another --output" in refused.stderr

    # what resumes it elsewhere: the residual base from the original one and the saved start
    assert main(["materialize-base", str(output / "start")]) == 0
    residual = causal_lm(output / "start" / "residual_base")
    trained = logits_of(PeftModel.from_pretrained(residual, output / "trained"))
    assert (trained - logits).abs().max() < 1e-5 * size


def test_experts_train_sharded_and_convert(tmp_path: Path) -> None:
    """Each rank's tokens go to other experts."""
    base, data = save_model(tmp_path / "base", "qwen3_moe"), save_data(tmp_path / "data.jsonl")
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    out = make_output(config_tree(base, data, tmp_path / "out", kind="qwen3_moe", r=2, lora=experts))
    logits = train(WAYS["zero3-2"], "--loraga_dir", str(out), "--data", str(data), "--output", str(tmp_path / "run"))
    size = logits.abs().max()
    assert (logits_of(causal_lm(base)) - logits).abs().max() > 1e-2 * size, "training changed nothing"
    init, trained = out / "loraga_init", tmp_path / "run" / "trained"
    before, after = read_adapter(out), read_adapter(trained.parent, trained.name)
    assert all("experts" not in key or (before[key] != after[key]).any() for key in before)
    assert any("experts" in key for key in before)
    found = converted(base, init, trained, tmp_path / "plain")
    assert (found - logits).abs().max() < 1e-5 * size
