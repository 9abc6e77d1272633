"""The autograd tap: hands a linear layer's (x, dy) to a sink during backward, while every weight stays frozen.

x travels through `save_for_backward`, so gradient checkpointing may drop and recompute it. A tap also *starts* the
graph: its output requires grad although nothing below does, so backward ends at the lowest tapped layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loraga_dist.config import Checkpointing
from loraga_dist.gradients.experts import Sink, experts_tapped
from loraga_dist.gradients.forward import forward_set
from loraga_dist.model.blocks import expert_lists
from loraga_dist.model.products import products_seen


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, anchor: torch.Tensor, x: torch.Tensor, sink: Sink, name: str
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.sink, ctx.name = sink, name
        return y.detach()  # no view, which nobody might change in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (dy,) = grad_outputs
        (x,) = ctx.saved_tensors
        ctx.sink(ctx.name, x.detach().flatten(0, -2), dy.detach().flatten(0, -2))
        return dy, None, None, None, None


@contextmanager
def tapped(model: nn.Module, names: Sequence[str], sink: Sink, *, checkpointing: Checkpointing) -> Iterator[None]:
    """Attach taps to the named matrices, in eval mode (no dropout), and restore the model on any exit.

    names: modules that compute y = W x (+ b) from their first argument, or go on from F.linear by their own weight, as
    routers do; or experts' matrices, `<parameter>.<expert>`.
    checkpointing: recompute transformers' decoder blocks in backward instead of keeping their activations.
    """
    modules = dict(model.named_modules())
    training = {name: module.training for name, module in modules.items()}
    anchor: dict[torch.device, torch.Tensor] = {}

    def anchor_on(device: torch.device) -> torch.Tensor:
        if device not in anchor:
            anchor[device] = torch.zeros((), device=device, requires_grad=True)
        return anchor[device]

    def tap(x: torch.Tensor, y: torch.Tensor, *, name: str) -> torch.Tensor:
        return _Tap.apply(y, anchor_on(y.device), x, sink, name)  # type: ignore[return-value]

    def begin(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # where no expert is called that has a tap, backward still goes as far as on other ranks
        return (_Tap.apply(args[0], anchor_on(args[0].device), args[0], lambda *_: None, ""), *args[1:])

    model.eval()
    try:
        with ExitStack() as exits:
            for name in names:
                if name in modules:
                    exits.enter_context(_product_tapped(modules[name], functools.partial(tap, name=name)))
            for caller in _callers_of(model, names):
                exits.callback(caller.register_forward_pre_hook(begin).remove)
            of_experts = [name for name in names if name not in modules]
            exits.enter_context(experts_tapped(model, of_experts, sink))
            exits.enter_context(_checkpointed_blocks(modules, checkpointing))
            yield
    finally:
        for name, module in modules.items():
            module.training = training[name]


def _callers_of(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """What calls experts that are modules, if some of these are among them."""
    lists = expert_lists(model)
    callers = {caller for experts, caller in lists.items() if any(name.startswith(f"{experts}.") for name in names)}
    return [model.get_submodule(caller) for caller in sorted(callers)]


@contextmanager
def _product_tapped(module: nn.Module, tap: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put tap(x, y) in the place of a module's y = W x: its output, or in a router what the output is made of."""
    if type(module).forward is nn.Linear.forward:

        def hook(_: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
            return tap(args[0], y)

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        return
    own, weight = module.forward, module.get_parameter("weight")

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen: list[torch.Tensor] = []

        def see(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return tap(x, y)

        with products_seen(weight, see):
            output = own(*args, **kwargs)
        return output if seen else tap(args[0], output)

    with forward_set(module, forward):
        yield


@contextmanager
def _checkpointed_blocks(modules: dict[str, nn.Module], checkpointing: Checkpointing) -> Iterator[None]:
    """Checkpoint the blocks transformers marks for it, without its switch: that one needs train mode, hence dropout."""
    if checkpointing == "none":
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    with ExitStack() as exits:
        for module in modules.values():
            if isinstance(module, GradientCheckpointingLayer):
                again = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
                exits.enter_context(forward_set(module, again))
        yield
