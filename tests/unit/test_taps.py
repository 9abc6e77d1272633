"""What tapping a model leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import TASKS, make_model
from transformers.pytorch_utils import Conv1D

from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.taps import tapped


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_set_on_a_block_is_used_and_stays(checkpointing: Any, fails: bool) -> None:
    """As accelerate and others set it on instances."""
    model: Any = make_model("llama")
    first, second, *_ = model.model.layers
    original, calls = first.forward, []

    def own_forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return original(*args, **kwargs)

    first.forward = own_forward
    seen = []
    name = "model.layers.0.mlp.down_proj"
    try:
        with tapped(model, [name], lambda name, x_TN, dy_TM: seen.append(name), checkpointing=checkpointing):
            model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert seen == [name] and calls
    assert first.forward is own_forward
    assert "forward" not in vars(second)


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "bart"])
def test_taps_see_what_autograd_sees(kind: str, checkpointing: Any) -> None:
    """In every family, recomputed or not: dy^T x summed over tokens is the weight's own gradient."""
    model: Any = make_model(kind)
    # the last end of sequence is what BART's classifier reads
    ids = torch.cat([torch.arange(2 * 11).reshape(2, 11), torch.full((2, 1), 257)], dim=1)
    labels = torch.tensor([0, 2]) if TASKS[kind] == "SEQ_CLS" else ids
    microbatch = Microbatch({"input_ids": ids, "labels": labels}, 1, 0, ())

    def backward() -> None:
        forward(model, microbatch, torch.device("cpu")).square().sum().backward()

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head"  # tied in GPT-2 and T5
    }
    model.requires_grad_(False)
    gradients: dict[str, Any] = dict.fromkeys(layers, 0.0)

    def sink(name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        gradients[name] = gradients[name] + x_TN.T @ dy_TM

    with tapped(model, list(layers), sink, checkpointing=checkpointing):
        backward()
    model.requires_grad_(True)
    backward()
    for name, module in layers.items():
        expected = module.weight.grad if isinstance(module, Conv1D) else module.weight.grad.T
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
