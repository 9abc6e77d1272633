"""What tapping a model leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import make_model

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
