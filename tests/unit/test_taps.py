"""What tapping a model leaves behind."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from builders import make_model
from families import alone, padded_microbatches, tiny
from handmade import set_own_forward
from transformers.pytorch_utils import Conv1D

from loraga_dist.data.losses import causal_lm
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.route import ModelOrder
from loraga_dist.gradients.taps import tapped


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_set_on_a_block_is_used_and_stays(checkpointing: Any, fails: bool) -> None:
    model: Any = make_model("llama")
    first, second, *_ = model.model.layers
    calls = set_own_forward(first)
    own_forward = first.forward
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


EDITING = ["falcon", "led", "longformer", "roc_bert"]
"""Families that change the output of a layer in place; Falcon's layers have a forward of their own, besides."""


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "bart", *EDITING])
def test_taps_see_what_autograd_sees(kind: str, checkpointing: Any) -> None:
    """In every family, recomputed or not: dy^T x summed over tokens is the weight's own gradient."""
    model: Any = tiny(kind) if kind in EDITING else make_model(kind)
    ids = torch.arange(3, 3 + 2 * 11).reshape(2, 11)
    if kind == "bart":  # the last end of sequence is what its classifier reads
        ids = torch.cat([ids, torch.full((2, 1), 257)], dim=1)
    labels = torch.tensor([0, 2]) if type(model).__name__.endswith("SequenceClassification") else ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    microbatch = Microbatch(inputs, 1, 0, ())

    def backward() -> None:
        forward(model, microbatch, torch.device("cpu")).square().sum().backward()

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head"  # which is tied in most
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
        if module.weight.grad is None:  # LED's, as no token asks for global attention
            assert "_global" in name and gradients[name] == 0
            continue
        expected = module.weight.grad if isinstance(module, Conv1D) else module.weight.grad.T
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class Taker:
    """Counts what it is shown."""

    def __init__(self) -> None:
        self.num_tokens: list[int] = []

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        self.num_tokens.append(len(x_TN))


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_order_leaves_taps_where_the_next_microbatch_wants_them(checkpointing: Any, fails: bool) -> None:
    model, one, other = tiny("llama").train(), Taker(), Taker()
    down, head = "model.layers.0.mlp.down_proj", "lm_head"
    route = ModelOrder(model, causal_lm, sharding=alone(), checkpointing=checkpointing)
    shown = [([down], one), ([down], one), ([down], other), ([head], other), ([head], other), ([down], one)]
    batches, hooks = padded_microbatches(count=len(shown)), []
    try:
        for _ in range(2):
            with route.opened():
                for batch, (names, taker) in zip(batches, shown, strict=True):
                    with route.showing([batch], names, taker.observe) as take:
                        take(batch)
                    hooks.append([*model.get_submodule(down)._forward_hooks, *model.get_submodule(head)._forward_hooks])
                if fails:
                    raise KeyError
            assert model.training
    except KeyError:
        assert fails
    num_tokens, times = [batch.inputs["labels"].numel() for batch in batches], 1 if fails else 2
    assert one.num_tokens == times * [*num_tokens[:2], num_tokens[5]] and other.num_tokens == times * num_tokens[2:5]
    same = [before == after for before, after in itertools.pairwise(hooks[:6])]
    assert same == [True, False, False, True, False] and all(len(each) == 1 for each in hooks)
    assert model.training and not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
