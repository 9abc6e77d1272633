"""The tap on experts: transformers' experts interface with products of our own, which multiply and tap at once.

No gradient of a weight is formed, and the graph keeps no weight: it is looked up in its parameter when a product needs
it, so that whoever gathers parameters may free them after forward and gather them again for backward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from loraga_dist.gradients.forward import forward_set
from loraga_dist.model.stacks import is_llama4_experts, split_name, stacked_parameters

Sink = Callable[[str, Tensor, Tensor], None]
"""sink(name, x_TN, dy_TM): one call per tapped layer and backward; of an expert, where it has rows, with these."""

_IMPLEMENTATION = "loraga_dist"
"""Our name in transformers' interface."""


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """A parameter of experts' matrices, and who is told of what goes through them."""

    parameter: nn.Parameter
    bias: nn.Parameter | None
    is_in_out: bool
    """Stored (in, out), y = x W; else (out, in), y = x W^T."""
    swapped: bool
    """The target is the matrix as stored (in, out), so x and dy change places."""
    names: Mapping[int, str]
    """Of the tapped experts."""
    sink: Sink | None


_Rows = Sequence[tuple[int, slice]]
"""Experts that have rows, and where these are."""


class _Multiply(torch.autograd.Function):
    """Rows sorted by expert, each times its expert's matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, stack: _Stack, rows: _Rows) -> Tensor:
        if stack.names:
            ctx.save_for_backward(x)  # which checkpointing may drop
        ctx.stack, ctx.rows = stack, rows
        return _product(x, stack.parameter, rows, is_in_out=stack.is_in_out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (dy,), stack = grad_outputs, ctx.stack
        if stack.names:
            x = ctx.saved_tensors[0].detach()  # sinks may keep rows, but no graph with them
            for expert, own in ctx.rows:
                if expert in stack.names:
                    shown = (dy[own], x[own]) if stack.swapped else (x[own], dy[own])
                    stack.sink(stack.names[expert], *shown)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, stack.parameter, ctx.rows, is_in_out=not stack.is_in_out)
        return dx, None, None, None


def _product(x: Tensor, weight_EPQ: Tensor, rows: _Rows, *, is_in_out: bool) -> Tensor:
    y = x.new_zeros(len(x), weight_EPQ.shape[2 if is_in_out else 1])  # for rows that skip all experts
    for expert, own in rows:
        y[own] = x[own] @ (weight_EPQ[expert] if is_in_out else weight_EPQ[expert].T)
    return y


def _linear(x: Tensor, stack: _Stack, experts: Tensor | None, rows: _Rows) -> Tensor:
    """experts: of every row, for the bias."""
    # a tap starts the graph, where nothing below does
    anchor = torch.zeros((), device=x.device, requires_grad=True) if stack.names else None
    y: Any = _Multiply.apply(x.to(stack.parameter.dtype), anchor, stack, rows)
    return y if stack.bias is None else y + stack.bias[experts]


def _rows(ends_E: Tensor, num_rows: int, stacks: Sequence[_Stack]) -> _Rows:
    """ends_E: where each expert's rows end. stacks: that they go through."""
    if isinstance(ends_E, FakeTensor):  # for a forecast, as many for each; what one takes, all take one by one
        count, shown = -(-num_rows // len(ends_E)), {next(iter(stack.names), 0) for stack in stacks}
        return [(expert, slice(0, count)) for expert in sorted(shown)]
    ends = ends_E.tolist()
    return [(expert, slice(*own)) for expert, own in enumerate(itertools.pairwise([0, *ends])) if own[0] < own[1]]


_up_and_down: WeakKeyDictionary[nn.Module, list[_Stack]] = WeakKeyDictionary()
"""The stacks of modules that are run here."""


def _run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' interface asks of an implementation."""
    up, down = _up_and_down[module]
    num_tokens, num_choices = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(len(up.parameter), device=experts.device)
    rows = _rows(torch.searchsorted(experts, numbers, right=True), len(experts), (up, down))
    y = _linear(hidden_states[order // num_choices], up, experts, rows)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _linear(y, down, experts, rows)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(num_tokens, num_choices, -1).sum(1).to(hidden_states.dtype)


def _run_llama4(module: Any, hidden_states: Tensor) -> Tensor:
    """Llama4 gives every expert all tokens, as zeros where they are another's: these come out as zeros, gradients too,
    and are left out."""
    up, down = _up_and_down[module]
    given_ET = hidden_states.detach().view(len(up.parameter), -1, hidden_states.shape[-1]).any(-1)
    if isinstance(given_ET, FakeTensor):  # for a forecast, one expert per token, as in all that were released
        where = torch.arange(given_ET.shape[1], device=hidden_states.device)
    else:
        where = given_ET.flatten().nonzero().squeeze(1)
    rows = _rows(given_ET.sum(1).cumsum(0), len(where), (up, down))
    gate, linear = _linear(hidden_states[where], up, None, rows).chunk(2, dim=-1)
    y = _linear(linear * module.act_fn(gate), down, None, rows)
    return torch.zeros_like(hidden_states).index_copy(0, where, y)


@contextmanager
def experts_tapped(model: nn.Module, names: Sequence[str] = (), sink: Sink | None = None) -> Iterator[None]:
    """Run all experts here, the named ones tapped, and restore the model's own implementation on any exit.

    names: of experts' matrices, `<parameter>.<expert>`.
    """
    tapped: dict[str, dict[int, str]] = {}
    for name in names:
        assert (parts := split_name(name)) is not None, f"{name} is no expert's"
        tapped.setdefault(parts[0], {})[parts[1]] = name
    with ExitStack() as exits:
        for module_name, module in model.named_modules():
            stacks = [
                _stack(module, attribute, tapped.pop(f"{module_name}.{attribute}", {}), sink)
                for attribute in stacked_parameters(module)
            ]
            if stacks:
                exits.enter_context(_running(module, stacks))
        assert not tapped, f"{[*tapped]} are no experts' parameters"
        yield


def _stack(module: Any, attribute: str, names: Mapping[int, str], sink: Sink | None) -> _Stack:
    is_llama4 = is_llama4_experts(module)
    return _Stack(
        parameter=getattr(module, attribute),
        bias=getattr(module, f"{attribute}_bias") if getattr(module, "has_bias", False) else None,
        is_in_out=is_llama4 or module.is_transposed,
        swapped=is_llama4,
        names=names,
        sink=sink,
    )


@contextmanager
def _running(module: Any, stacks: list[_Stack]) -> Iterator[None]:
    """Run a module here: by the name of our implementation in its config, or by a forward of its own."""
    before = _up_and_down.get(module)
    _up_and_down[module] = stacks
    try:
        if is_llama4_experts(module):
            with forward_set(module, functools.partial(_run_llama4, module)):
                yield
        else:
            with _implementation_set(module.config):
                yield
    finally:
        if before is None:
            del _up_and_down[module]
        else:
            _up_and_down[module] = before


@contextmanager
def _implementation_set(config: Any) -> Iterator[None]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _run)
    before = config._experts_implementation
    config._experts_implementation = _IMPLEMENTATION
    try:
        yield
    finally:
        config._experts_implementation = before
