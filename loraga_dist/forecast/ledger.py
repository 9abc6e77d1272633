"""Tensors that have shapes but no memory, and a count of what they would take."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraga_dist.data.microbatches import Microbatch

Shapes = Mapping[str, tuple[int, ...]]
"""Of a microbatch's input tensors, all int64."""

DEVICE = torch.device("cpu")


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made in this context have no memory, and libraries do not complain."""
    with FakeTensorMode(), DEVICE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def microbatch_of(shapes: Shapes) -> Microbatch:
    return Microbatch(
        inputs={name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()},
        num_supervised_tokens=0,
        index=0,
        sample_ids=(),
    )


class Ledger(TorchDispatchMode):
    """Bytes of living tensors that operations made, and the most there ever were."""

    def __init__(self, model: nn.Module, *, gathers: bool = False) -> None:
        """gathers: a parameter counts, with the others of its module, while an operation reads it; else not at all."""
        super().__init__()
        modules = bytes_of_modules(model)
        self._gathered: Mapping[int, tuple[str, int]] = modules if gathers else {}
        self._ignored: Collection[int] = modules.keys()
        self._held_bytes = 0
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
        keys = (key_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor))
        gathered = sum(dict(self._gathered[key] for key in keys if key in self._gathered).values())
        self.peak_bytes = max(self.peak_bytes, self._live_bytes + gathered + self._held_bytes)
        return out

    def hold(self, num_bytes: int) -> None:
        """So much is taken beside from now on."""
        self._held_bytes += num_bytes

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
        if key in self._alive or key in self._ignored:
            return
        num_bytes = storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self._live_bytes -= num_bytes

        self._alive[key] = weakref.ref(storage, freed)
        self._live_bytes += num_bytes


def bytes_of_modules(model: nn.Module) -> dict[int, tuple[str, int]]:
    """Per parameter storage: its module, and the bytes of all parameters that this module holds itself."""
    found = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        num_bytes = sum(parameter.nbytes for parameter in own)
        found |= {key_of(parameter): (name, num_bytes) for parameter in own}
    return found


def key_of(tensor: torch.Tensor) -> int:
    """The same for all views of a tensor."""
    return tensor.untyped_storage()._cdata
