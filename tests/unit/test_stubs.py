"""Stubs in place of blocks: what they record, what they hand back, and that nothing of them stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import padded_microbatches, tiny
from handmade import set_own_forward
from torch import Tensor

from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.stubs import Call, Form, Stubs
from loraga_dist.model.blocks import find_blocks

CPU = torch.device("cpu")


def stubs_of(model: Any) -> Stubs:
    blocks = find_blocks(model)
    assert blocks is not None
    stubs = Stubs(model, blocks.of(model), CPU)
    stubs.form = Form(1 if model.config.model_type in ("mpt", "bloom") else None)
    return stubs


def test_hidden_states_come_first_or_by_name() -> None:
    hidden, other = torch.ones(2), torch.zeros(3)
    assert Call.split((hidden, other), {"a": 1}) == (hidden, Call((other,), {"a": 1}))
    assert Call.split((), {"hidden_states": hidden, "a": 1}) == (hidden, Call((), {"a": 1}))


def test_tensors_anywhere_in_a_call_are_mapped() -> None:
    one = torch.ones(())
    call = Call(((one, None), "x"), {"tables": {"a": [one]}, "flag": True}).map(lambda tensor: tensor + 1)
    assert call == Call(((one + 1, None), "x"), {"tables": {"a": [one + 1]}, "flag": True})


@pytest.mark.parametrize("output", ["tensor", "tuple", "tuple_of_one"])
def test_a_form_gives_back_what_blocks_give(output: str) -> None:
    hidden = torch.ones(2)
    given = {"tensor": hidden, "tuple": (hidden, torch.zeros(1), None), "tuple_of_one": (hidden,)}[output]
    form = Form.of(given)
    assert form.hidden(given) is hidden and form.hidden(form.wrap(hidden)) is hidden
    assert isinstance(form.wrap(hidden), tuple) == isinstance(given, tuple)
    assert not isinstance(given, tuple) or len(form.wrap(hidden)) == len(given)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "bloom"])
def test_blocks_called_as_recorded_are_the_model(kind: str) -> None:
    model, (microbatch, *_) = tiny(kind), padded_microbatches()
    stubs, own = stubs_of(model), []
    with torch.no_grad():
        logits = forward(model, microbatch, CPU)
        with stubs.installed():
            entry = stubs.enter(microbatch, {})
            hidden = entry.hidden
            for index, call in enumerate(entry.calls):
                hidden = stubs.form.hidden(stubs.run_block(index, hidden, call))
                own.append(hidden)
            assert torch.equal(stubs.leave(microbatch, hidden), logits)
    assert len(own) == 3 and not torch.equal(own[0], own[1])


def test_blocks_share_what_was_one_tensor() -> None:
    """Masks and tables of positions are not kept once for each block."""
    model, (microbatch, *_) = tiny("llama"), padded_microbatches()
    stubs = stubs_of(model)
    with torch.no_grad(), stubs.installed():
        calls = stubs.enter(microbatch, {}).calls
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert isinstance(masks[0], Tensor) and all(mask is masks[0] for mask in masks)


def test_heads_are_short_where_nobody_reads_logits() -> None:
    model: Any = tiny("llama")
    microbatch, *_ = padded_microbatches()
    stubs, seen = stubs_of(model), []
    handle = model.lm_head.register_forward_hook(lambda *hooked: seen.append(hooked[2].shape[1]))
    with torch.no_grad(), stubs.installed():
        stubs.enter(microbatch, {}, 1)
        stubs.enter(microbatch, {})
    handle.remove()
    assert seen == [1, microbatch.inputs["input_ids"].shape[1]]


def test_modules_that_run_early_are_named() -> None:
    model: Any = tiny("opt_projected")
    microbatch, *_ = padded_microbatches()
    behind = {name: model.get_submodule(name) for name in ("model.decoder.project_in", "model.decoder.project_out")}
    stubs = stubs_of(model)
    with torch.no_grad(), stubs.installed():
        assert stubs.enter(microbatch, behind).early == ["model.decoder.project_in"]
    assert not any(module._forward_pre_hooks for module in behind.values())


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_set_on_a_block_is_used_and_stays(fails: bool) -> None:
    model: Any = tiny("llama")
    first, second, *_ = model.model.layers
    calls = set_own_forward(first)
    own_forward = first.forward
    stubs, (microbatch, *_) = stubs_of(model), padded_microbatches()
    try:
        with torch.no_grad(), stubs.installed():
            entry = stubs.enter(microbatch, {})
            stubs.run_block(0, entry.hidden, entry.calls[0])
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert calls == [1] and first.forward is own_forward and "forward" not in vars(second)
