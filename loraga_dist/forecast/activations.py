"""What one microbatch allocates: the real forward, loss and backward on tensors that have shapes but no memory.

The model's own code runs, with taps and checkpointing as in calibration, so nothing about an architecture is assumed.
In model order a parameter counts, with the other parameters of its module, for as long as an operation reads it: that
is how ZeRO-3 gathers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from loraga_dist.config import Checkpointing
from loraga_dist.data.losses import Loss
from loraga_dist.data.microbatches import PROBE_TOKENS, Microbatch
from loraga_dist.forecast.in_blocks import InBlocks, Shown, run_in_blocks, signature
from loraga_dist.forecast.ledger import DEVICE, Ledger, Shapes, microbatch_of, without_memory
from loraga_dist.gradients.experts import experts_tapped
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.stubs import OutOfTurn
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.base import BaseModel
from loraga_dist.model.blocks import Blocks, Order, pieces_of
from loraga_dist.model.stacks import is_llama4_experts
from loraga_dist.sharding.base import without_values

_BLOCKS_RUN = 3
"""Of a list of equal blocks; the others are counted, not run."""
_WORTH_CUTTING = 8


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Peak bytes above the parameters' own, of one microbatch on one rank."""

    forward_bytes: int
    """A forward without gradients: what comparing logits takes, with the pieces that are gathered for it."""
    probe_bytes: int
    """Logits that are kept to be compared, of one forward."""
    backward_bytes: int = 0
    """In model order: activations, gathered parameters, the loss, what the sink takes."""
    in_blocks: InBlocks | None = None
    """In block order."""


def forecast_activations(
    base: BaseModel,
    shapes: Shapes,
    groups: Sequence[Shown],
    order: Order,
    *,
    loss: Loss,
    checkpointing: Checkpointing,
    gathers: bool,
) -> Activations | None:
    """Run one microbatch without memory: a forward, and in its order what calibration does.

    None where the model's code depends on its tensors' values.

    groups: of the plan. In model order the first is shown, whose backward goes deepest. Without groups there is none.
    checkpointing: of model order. gathers: parameters are sharded, so those in use are gathered.
    """
    try:
        with without_memory():
            model, microbatch = without_values(base).requires_grad_(False).eval(), microbatch_of(shapes)
            in_blocks = None
            if order.blocks is not None and groups:
                in_blocks = run_in_blocks(model, order, microbatch, groups, loss)
            cut = _CutBlocks.cut(model, groups[0].names if groups and in_blocks is None else [])
            forward_bytes, probe_bytes = _forward(model, microbatch, gathers=gathers)
            backward_bytes = 0
            if groups and in_blocks is None:
                backward_bytes = _backward(model, microbatch, cut, groups[0], loss, checkpointing, gathers)
            return Activations(
                forward_bytes=forward_bytes,
                probe_bytes=probe_bytes,
                backward_bytes=backward_bytes,
                in_blocks=in_blocks,
            )
    except (AssertionError, OutOfTurn, KeyError, RuntimeError, TypeError, ValueError):
        # data-dependent shapes, kernels without a shape function, blocks that are called another way
        return None


def _forward(model: nn.Module, microbatch: Microbatch, *, gathers: bool) -> tuple[int, int]:
    """Bytes of a forward whose pieces are held for the time of theirs, and of the logits that are kept of it."""
    with Ledger(model) as ledger, _experts_with_shapes(model), torch.no_grad():
        if gathers:
            for piece in pieces_of(model):
                num_bytes = sum(parameter.nbytes for parameter in piece.parameters)
                piece.module.register_forward_pre_hook(lambda *_, num_bytes=num_bytes: ledger.hold(num_bytes))
                piece.module.register_forward_hook(lambda *_, num_bytes=num_bytes: ledger.hold(-num_bytes))
        logits = forward(model, microbatch, DEVICE)
    return ledger.peak_bytes, 4 * logits.shape[-1] * min(PROBE_TOKENS, math.prod(logits.shape[1:-1]))


def _experts_with_shapes(model: nn.Module) -> AbstractContextManager[None]:
    """Grouped products, which most experts run by themselves, have a shape function in bfloat16 alone; else ours, which
    take about as much."""
    is_bfloat16 = all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    has_shapes = is_bfloat16 or any(map(is_llama4_experts, model.modules()))
    return nullcontext() if has_shapes else experts_tapped(model)


def _backward(
    model: nn.Module,
    microbatch: Microbatch,
    cut: _CutBlocks,
    group: Shown,
    loss: Loss,
    checkpointing: Checkpointing,
    gathers: bool,
) -> int:
    def sink(name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        group.take(cut.originals[name], x_TN, dy_TM)

    taps = tapped(model, list(cut.originals), sink, checkpointing=checkpointing)
    with Ledger(model, gathers=gathers) as ledger, cut.watched(ledger), taps:
        loss(forward(model, microbatch, DEVICE), microbatch.inputs["labels"]).backward()
    return ledger.peak_with(cut.num_left_out)


@dataclass(frozen=True)
class _CutBlocks:
    """The model's one list of equal blocks, cut to a few that stand for those from the lowest target on: below it
    nothing is kept for backward. A model without such a list is run whole."""

    originals: dict[str, str]
    """The names to tap, and those that these targets have in the whole model."""
    blocks: Sequence[nn.Module] = ()
    """Those that are run, where others are left out."""
    num_left_out: int = 0

    @classmethod
    def cut(cls, model: nn.Module, names: Sequence[str]) -> _CutBlocks:
        from transformers.modeling_layers import GradientCheckpointingLayer

        lists = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and any(isinstance(child, GradientCheckpointingLayer) for child in module)
        }
        whole = cls({name: name for name in names})
        if len(lists) != 1:
            return whole
        ((prefix, blocks),) = lists.items()
        if len(blocks) <= _WORTH_CUTTING or len({signature(block) for block in blocks}) > 1:
            return whole
        uncut = Blocks(prefix=prefix, count=len(blocks))
        indices = {name: uncut.index_of(name) for name in names}
        first = min((index for index in indices.values() if index is not None), default=0)
        num_in_graph = len(blocks) - first
        del blocks[min(_BLOCKS_RUN, num_in_graph) :]
        originals = {}
        for name, index in indices.items():
            if index is None:
                originals[name] = name
            elif index - first < len(blocks):
                originals[name.replace(f"{prefix}.{index}.", f"{prefix}.{index - first}.", 1)] = name
        num_left_out = num_in_graph - len(blocks)
        return cls(originals, list(blocks) if num_left_out else (), num_left_out)

    @contextmanager
    def watched(self, ledger: Ledger) -> Iterator[None]:
        handles = [
            block.register_forward_pre_hook(lambda *_, is_top=block is self.blocks[-1]: ledger.enter_block(is_top))
            for block in self.blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
