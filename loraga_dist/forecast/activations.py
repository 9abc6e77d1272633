"""What one microbatch allocates: the real forward, loss and backward on tensors that have shapes but no memory.

The model's own code runs, with taps and checkpointing as in a sweep, so nothing about an architecture is assumed. A
parameter counts, with the other parameters of its module, for as long as an operation reads it: that is how ZeRO-3
gathers.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraga_dist.config import Checkpointing
from loraga_dist.data.losses import Loss
from loraga_dist.data.microbatches import PROBE_TOKENS, Microbatch
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.base import BaseModel

_BLOCKS_RUN = 3
"""Of a stack of equal blocks; the others are counted, not run."""
_WORTH_CUTTING = 8

Shapes = Mapping[str, tuple[int, ...]]
"""Of a microbatch's input tensors, all int64."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Peak bytes above the parameters' own, of one microbatch on one rank."""

    backward_bytes: int
    """Forward and backward: activations, gathered parameters, the loss, what the sink takes."""
    forward_bytes: int
    """A forward without gradients: what comparing logits takes."""
    probe_bytes: int
    """Logits that are kept to be compared, of one forward."""


def forecast_activations(
    base: BaseModel,
    shapes: Shapes,
    names: Sequence[str],
    *,
    loss: Loss,
    checkpointing: Checkpointing,
    gathers: bool,
    sink_bytes: Callable[[str], int],
) -> Activations | None:
    """Run one microbatch without memory, with taps on `names`, or a forward alone if there are none.

    None where the model's code depends on its tensors' values.

    gathers: parameters are sharded, so each module's are gathered for use.
    sink_bytes: what the engine takes while it observes a target, by name.
    """
    device = torch.device("cpu")
    try:
        with FakeTensorMode(), device, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model_class: Any = base.model_class
            model = model_class._from_config(copy.deepcopy(base.config), dtype=base.dtype)
            model.tie_weights()
            model.requires_grad_(False).eval()
            stack = _Stack.cut(model, names)
            microbatch = Microbatch(
                inputs={name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()},
                num_supervised_tokens=0,
                index=0,
                sample_ids=(),
            )
            gathered = _module_bytes(model) if gathers else {}
            unsharded = set() if gathers else set(_module_bytes(model))

            def sink(name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
                torch.empty(sink_bytes(stack.originals[name]), dtype=torch.uint8)

            with _Ledger(gathered, unsharded) as ledger, torch.no_grad():
                logits = forward(model, microbatch, device)
            probe_bytes = 4 * logits.shape[-1] * min(PROBE_TOKENS, math.prod(logits.shape[1:-1]))
            del logits
            forward_bytes = ledger.peak_bytes
            if not names:
                return Activations(backward_bytes=0, forward_bytes=forward_bytes, probe_bytes=probe_bytes)

            taps = tapped(model, list(stack.originals), sink, checkpointing=checkpointing)
            with _Ledger(gathered, unsharded) as ledger, stack.watched(ledger), taps:
                loss(forward(model, microbatch, device), microbatch.inputs["labels"]).backward()
            backward_bytes = ledger.peak_with(stack.num_left_out)
            return Activations(backward_bytes=backward_bytes, forward_bytes=forward_bytes, probe_bytes=probe_bytes)
    except (RuntimeError, TypeError, ValueError):  # data-dependent shapes, kernels without a shape function
        return None


class _Ledger(TorchDispatchMode):
    """Bytes of living tensors that operations made, and the most there ever were."""

    def __init__(self, gathered: Mapping[int, tuple[str, int]], ignored: set[int]) -> None:
        super().__init__()
        self._gathered = gathered
        self._ignored = ignored
        self._alive: dict[int, Any] = {}
        self._live_bytes = 0
        self.peak_bytes = 0
        self._before_top_bytes = 0
        self._entered_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        keys = (_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor))
        gathered = sum(dict(self._gathered[key] for key in keys if key in self._gathered).values())
        self.peak_bytes = max(self.peak_bytes, self._live_bytes + gathered)
        return out

    def enter_block(self, is_top: bool) -> None:
        self._entered_bytes.append(self._live_bytes)
        if is_top:
            self._before_top_bytes, self.peak_bytes = self.peak_bytes, self._live_bytes

    def peak_with(self, num_left_out: int) -> int:
        """The peak had `num_left_out` more blocks run, each of which keeps until backward what the last but one kept.

        From the top block's forward on they are all there.
        """
        if not num_left_out:
            return max(self.peak_bytes, self._before_top_bytes)
        kept_bytes = self._entered_bytes[-1] - self._entered_bytes[-2]
        return max(self._before_top_bytes, self.peak_bytes + num_left_out * kept_bytes)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or key in self._gathered or key in self._ignored:
            return
        num_bytes = storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self._live_bytes -= num_bytes

        self._alive[key] = weakref.ref(storage, freed)
        self._live_bytes += num_bytes


@dataclass(frozen=True)
class _Stack:
    """The model's one list of equal blocks, cut to a few that stand for those from the lowest target on: below it
    nothing is kept for backward. A model without such a list is run whole."""

    originals: dict[str, str]
    """The names to tap, and those that these targets have in the whole model."""
    blocks: Sequence[nn.Module] = ()
    """Those that are run, where others are left out."""
    num_left_out: int = 0

    @classmethod
    def cut(cls, model: nn.Module, names: Sequence[str]) -> _Stack:
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
        if len(blocks) <= _WORTH_CUTTING or len({_signature(block) for block in blocks}) > 1:
            return whole
        indices = {name: _block_index(prefix, name) for name in names}
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
    def watched(self, ledger: _Ledger) -> Iterator[None]:
        handles = [
            block.register_forward_pre_hook(lambda *_, is_top=block is self.blocks[-1]: ledger.enter_block(is_top))
            for block in self.blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _block_index(prefix: str, name: str) -> int | None:
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(found[1]) if found else None


def _signature(block: nn.Module) -> tuple[Any, ...]:
    return type(block), *((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _module_bytes(model: nn.Module) -> dict[int, tuple[str, int]]:
    """Per parameter storage: its module, and the bytes of all parameters that this module holds itself."""
    found = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        num_bytes = sum(parameter.nbytes for parameter in own)
        found |= {_key(parameter): (name, num_bytes) for parameter in own}
    return found


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
