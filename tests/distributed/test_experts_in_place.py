"""`loraga_dist.initialize` on a sharded mixture of experts: stock PEFT trains the saved start alone to the same
adapter, and what `convert` makes of it is the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_model
from multimodal import as_trl_loads, save_multimodal
from outputs import EXPERTS, logits_of, relative
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from ranks import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor
from training import batches, train, zero3

import loraga_dist
from loraga_dist.cli import main
from loraga_dist.ranks.world import World

STEPS = 10
KINDS = ["mixtral", "deepseek_v3", "gpt_oss", "llama4", "qwen3_vl_moe"]


def initialize_and_train(root: Path) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """On every rank, by kind: a start saved before ten steps, their losses, and on rank 0 the adapter."""
    import deepspeed

    world, found = World.start(), {}
    for kind in KINDS:
        config = {"lora": {"r": 4, "lora_alpha": 8, "target_parameters": EXPERTS}}
        with zero3(world):
            model = as_trl_loads(root / kind / "model")
            start = loraga_dist.initialize(model, batches(1, 4, world), config)
            assert start.identity_check.max_abs_logit_diff < 1e-5 * start.identity_check.max_abs_logit
            loraga_dist.save_start(start, root / kind / "start")
            deepspeed.utils.set_z3_leaf_modules(start.model, [ParamWrapper])
            losses = train(start.model, batches(2, STEPS, world), world)
            adapter = [parameter for parameter in start.model.parameters() if parameter.requires_grad]
            with deepspeed.zero.GatheredParameters(adapter):
                state = get_peft_model_state_dict(start.model) if world.is_main else {}
                found[kind] = losses, {key: tensor.detach().clone() for key, tensor in state.items()}
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("experts")
    for kind in KINDS:
        (save_multimodal if kind == "qwen3_vl_moe" else save_model)(root / kind / "model", kind)
    return root, run_on_ranks(initialize_and_train, 2, root, timeout_seconds=200)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_trains_the_saved_start_to_the_same_adapter(kind: str, sharded: tuple) -> None:
    (root, found), alone = sharded, World.alone()
    root, (losses, adapter) = root / kind, found[kind]
    assert main(["materialize-base", str(root / "start"), "--to", str(root / "residual")]) == 0
    model = PeftModel.from_pretrained(as_trl_loads(root / "residual"), root / "start/loraga_init", is_trainable=True)
    assert (logits_of(model) - logits_of(as_trl_loads(root / "model"))).abs().max() < 1e-5
    before = load_file(root / "start/loraga_init/adapter_model.safetensors")
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(train(model, batches(2, STEPS, alone), alone)), rtol=0, atol=2e-5
    )
    after = get_peft_model_state_dict(model)
    assert after.keys() == adapter.keys() == before.keys()
    for key, tensor in after.items():
        assert relative(before[key], tensor) > 1e-3, f"{key} was not trained"
        # Adam divides by a gradient's size, so that rounding weighs more after each step
        assert relative(adapter[key], tensor) < 1e-3, key

    model.save_pretrained(root / "trained")
    trained = ["--init", str(root / "start/loraga_init"), "--trained", str(root / "trained")]
    assert main(["convert", *trained, "--to", str(root / "plain"), "--merge", str(root / "merged")]) == 0
    expected = logits_of(model)
    assert (logits_of(as_trl_loads(root / "model")) - expected).abs().max() > 1e-2 * expected.abs().max()
    plain = PeftModel.from_pretrained(as_trl_loads(root / "model"), root / "plain")
    assert (logits_of(plain) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits_of(as_trl_loads(root / "merged")) - expected).abs().max() < 1e-5 * expected.abs().max()
