"""What one microbatch allocates in block order: its entry, one block, the loss and one block's backward, each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loraga_dist.data.losses import Loss, cross_entropy_sum
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.engines.home import pinned_bytes
from loraga_dist.forecast.ledger import DEVICE, Ledger, key_of
from loraga_dist.gradients.experts import experts_tapped
from loraga_dist.gradients.head import Head
from loraga_dist.gradients.stubs import Call, Form, Stubs
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.blocks import Order


@dataclass(frozen=True)
class Shown:
    """A group of the plan as backward meets it."""

    observed: tuple[tuple[str, int], ...]
    """Targets, and the bytes that their engine takes for a moment to observe each."""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.observed]

    @cached_property
    def _bytes_of(self) -> dict[str, int]:
        return dict(self.observed)

    def take(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        """The sink of its taps."""
        torch.empty(self._bytes_of[name], dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class InBlocks:
    """Bytes of one microbatch on one rank, without parameters; what is done one after the other is not added up."""

    hidden_bytes: int
    """Of the states between two blocks, and of their gradient."""
    argument_bytes: int
    """What else blocks are called with, all of them together: masks, tables of positions."""
    forward_bytes: int
    """A block's forward, with a graph that shows what it depends on."""
    loss_bytes: int
    """From the last block's output to its gradient, for the tokens whose logits are there at a time."""
    backward_bytes: tuple[int, ...]
    """By group: forward with a graph and backward, of its block or of what comes after all blocks."""

    def kept_bytes(self, *, on_host: bool) -> int:
        """Of the states between two blocks while they wait in memory. on_host: for ranks that compute there."""
        return self.hidden_bytes if on_host else pinned_bytes(self.hidden_bytes)


def run_in_blocks(
    model: nn.Module, order: Order, microbatch: Microbatch, groups: Sequence[Shown], loss: Loss
) -> InBlocks:
    """Run a microbatch as block order does, on a model without memory; of blocks that are alike, one."""
    assert order.blocks is not None
    blocks = order.blocks.of(model)
    stubs = Stubs(model, blocks, DEVICE)
    with stubs.installed(), experts_tapped(model), torch.no_grad():
        stubs.run(microbatch, _finding_form(stubs))
        entry = stubs.enter(microbatch, {})
        hidden, calls = entry.hidden, entry.calls
        known = {key_of(tensor) for tensor in (hidden, *microbatch.inputs.values(), *model.parameters())}
        arguments = {
            key_of(tensor): tensor.untyped_storage().nbytes()
            for tensor in tree_leaves([vars(call) for call in calls])
            if isinstance(tensor, Tensor)
        }
        forward_bytes = 0
        for index in {signature(block): index for index, block in enumerate(blocks)}.values():
            # the first chunk's is one with a graph
            with Ledger(model) as ledger, torch.enable_grad():
                stubs.run_block(index, hidden.detach().requires_grad_(), calls[index])
            forward_bytes = max(forward_bytes, ledger.peak_bytes)

        stages = [order.stage_of(group.names[0]) for group in groups]
        found: dict[Any, int] = {}
        backward_bytes = []
        for group, stage in zip(groups, stages, strict=True):
            goes_on = stage > min(stages)
            prefix = f"{order.blocks.prefix}.{stage}."
            key = _what_it_is(group, prefix, blocks[stage] if stage < len(blocks) else None), goes_on
            if key not in found:
                with tapped(model, group.names, group.take, checkpointing="none"):
                    if stage == len(blocks):
                        found[key] = _leave(model, stubs, microbatch, hidden, loss)
                    else:
                        found[key] = _backward(model, stubs, stage, hidden, calls[stage], goes_on=goes_on)
            backward_bytes.append(found[key])
        return InBlocks(
            hidden_bytes=hidden.nbytes,
            argument_bytes=sum(num_bytes for key, num_bytes in arguments.items() if key not in known),
            forward_bytes=forward_bytes,
            loss_bytes=max(
                _leave(model, stubs, microbatch, hidden, loss), _compare(model, stubs, microbatch, hidden, loss)
            ),
            backward_bytes=tuple(backward_bytes),
        )


def signature(block: nn.Module) -> tuple[Any, ...]:
    """The same for blocks that are alike."""
    return type(block), *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _finding_form(stubs: Stubs) -> Any:
    def on_block(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = Call.split(args, kwargs)
        if index == 0:
            stubs.form = Form.of(stubs.run_block(0, hidden, call))
        return stubs.form.wrap(hidden)

    return on_block


def _what_it_is(group: Shown, prefix: str, block: nn.Module | None) -> Any:
    """The same for groups that take the same of alike blocks; prefix: of names in the block."""
    if block is None:
        return group
    return signature(block), tuple((name.removeprefix(prefix), num_bytes) for name, num_bytes in group.observed)


def _backward(model: nn.Module, stubs: Stubs, index: int, hidden: Tensor, call: Call, *, goes_on: bool) -> int:
    """goes_on: the gradient at the block's input is wanted, too."""
    entry, gradient = hidden.detach().requires_grad_(goes_on), torch.zeros_like(hidden)
    with Ledger(model) as ledger, torch.enable_grad():
        output = stubs.run_block(index, entry, call)
        stubs.form.hidden(output).backward(gradient)
    return ledger.peak_bytes


def _leave(model: nn.Module, stubs: Stubs, microbatch: Microbatch, hidden: Tensor, loss: Loss) -> int:
    part, predicted = _first_tokens(model, stubs, microbatch, hidden, loss)
    with Ledger(model) as ledger, torch.enable_grad():
        whole = torch.zeros_like(hidden)  # what the parts' gradients are put into
        leaf = part.detach().requires_grad_()
        cross_entropy_sum(stubs.leave(microbatch, leaf), predicted).backward()
        del whole
    return ledger.peak_bytes


def _compare(model: nn.Module, stubs: Stubs, microbatch: Microbatch, hidden: Tensor, loss: Loss) -> int:
    """The same loss by the model and by stubs, which is how block order knows the model."""
    part, predicted = _first_tokens(model, stubs, microbatch, hidden, loss)
    parts = [part] if part.shape == hidden.shape else part.split(-(-part.shape[1] // 2), dim=1)
    with Ledger(model) as ledger:
        logits = stubs.leave(microbatch, part)
        found = torch.cat([stubs.leave(microbatch, each) for each in parts], dim=1 if len(parts) > 1 else 0)
        for each in (logits, found):
            cross_entropy_sum(each, predicted)
    return ledger.peak_bytes


def _first_tokens(
    model: nn.Module, stubs: Stubs, microbatch: Microbatch, hidden: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """The states whose logits are there at a time, and what they are to predict."""
    predicted = loss.predicted(microbatch.inputs["labels"])
    num_tokens = Head(model, stubs, loss).tokens_at_once(microbatch)
    return (hidden, predicted) if num_tokens is None else (hidden[:, :num_tokens], predicted[:, :num_tokens])
