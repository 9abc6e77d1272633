"""A gradient that is not finite, zero or absent ends the run on all ranks, with the place named and no output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from builders import VOCABULARY, byte_tokenizer, config_tree, make_model, save_data
from launching import INIT, Finished
from outputs import write_config
from ranks import run_script
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.distributed

LAYER = "model.layers.1"


def start(model: nn.Module, directory: Path, world_size: int, *flags: str) -> list[Finished]:
    model.save_pretrained(directory / "model")
    byte_tokenizer().save_pretrained(directory / "model")
    data = save_data(directory / "data.jsonl", rows=8)
    config = write_config(config_tree(directory / "model", data, directory / "out"))
    options = ["--output.dir", str(directory / "runs" / "out"), *flags]
    return run_script([INIT, "--config", str(config), *options], world_size)


def failure(results: list[Finished], code: int = 3) -> str:
    """The one line that says what failed, after this exit code on every rank."""
    assert {result.code for result in results} == {code}, results
    assert {result.stdout for result in results} == {""}, results
    told = [line for result in results for line in result.stderr.splitlines() if line.startswith("loraga-dist: ")]
    # targets above this one may be finished by then
    told = [line for line in told if not line.startswith("loraga-dist: the same command goes on from the checkpoint")]
    assert len(told) == 1, results
    assert not any("Traceback" in result.stderr for result in results), results
    return told[0]


def rows_named(line: str) -> list[int]:
    found = re.search(r"microbatch 0 \(data rows \[([\d, ]+)\]\) on rank 0", line)
    assert found, line
    return [int(row) for row in found[1].split(",")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_nan_in_a_weight(world_size: int, tmp_path: Path) -> None:
    model = make_model("llama")
    model.get_submodule(f"{LAYER}.mlp.up_proj").weight.data[3, 5] = torch.nan
    line = failure(start(model, tmp_path, world_size))

    assert line.startswith("loraga-dist: calibrate: the loss is nan in microbatch 0 ")
    assert line.endswith(f"first in the output of {LAYER}.mlp.up_proj")
    assert len(rows_named(line)) == 2
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {".out.checkpoint"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_backward_overflows_although_the_loss_is_finite(world_size: int, tmp_path: Path) -> None:
    model = make_model("llama")
    mlp = model.get_submodule(f"{LAYER}.mlp")
    # forward, the block adds W_down @ 0 = 0; backward, W_down^T dy exceeds float32 and reaches up_proj and all below it
    nn.init.zeros_(mlp.up_proj.weight)
    mlp.down_proj.weight.data.sign_().mul_(3e38)
    model.get_submodule("lm_head").weight.data.mul_(10)
    line = failure(start(model, tmp_path, world_size))

    assert line.startswith(
        f"loraga-dist: calibrate: the gradient of {LAYER}.mlp.up_proj is not finite in microbatch 0 "
    )
    assert len(rows_named(line)) == 2
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {".out.checkpoint"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradient_that_is_zero(world_size: int, tmp_path: Path) -> None:
    model = make_model("llama")
    nn.init.zeros_(model.get_submodule(f"{LAYER}.self_attn.o_proj").weight)
    line = failure(start(model, tmp_path, world_size), code=2)

    pattern = line.partition("change nothing in the loss, so there is no gradient to start from; write ")[2]
    pattern = pattern.removeprefix("lora.exclude_modules: ")
    named = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    assert named == {f"{LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {".out.checkpoint"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_module_outside_the_loss(world_size: int, tmp_path: Path) -> None:
    # with cross-attention but no encoder to attend to, GPT-2 never runs q_attn
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**size, add_cross_attention=True))
    line = failure(start(model, tmp_path, world_size, "--lora.target_modules", "[q_attn, c_fc]"), code=2)

    unused = [f"transformer.h.{layer}.crossattention.q_attn" for layer in (0, 1)]
    assert line.startswith(f"loraga-dist: lora.target_modules: {unused}: took no part in the loss")
    assert line.endswith(r"; write lora.exclude_modules: transformer\.h\.(0|1)\.crossattention\.q_attn")
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {".out.checkpoint"}


def test_failure_leaves_the_output_it_was_to_replace(tmp_path: Path) -> None:
    earlier = tmp_path / "runs" / "out" / "loraga_report.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    model = make_model("llama")
    model.get_submodule("model.norm").weight.data[0] = torch.nan
    line = failure(start(model, tmp_path, 1, "--overwrite"))

    assert line.endswith("first in the output of model.norm")
    assert [str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*")] == [
        "out",
        "out/loraga_report.json",
    ]
