"""One pass over calibration data for some targets: forward, backward, taps, and all ranks in step."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraga_dist.config import Checkpointing
from loraga_dist.data.losses import LossSum
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.engines import GradientEngine
from loraga_dist.engines.group import EngineGroup
from loraga_dist.errors import RunError, UserError
from loraga_dist.gradients.taps import tapped
from loraga_dist.ranks.memory import return_freed_memory
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import Sharding


@dataclass(frozen=True)
class LossTotals:
    """The loss and the supervised tokens of all ranks' microbatches."""

    loss_sum: float = 0.0
    num_tokens: int = 0

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(self.loss_sum + other.loss_sum, self.num_tokens + other.num_tokens)


@contextmanager
def one_pass(
    model: nn.Module,
    names: Sequence[str],
    engine: GradientEngine | EngineGroup,
    *,
    sharding: Sharding,
    loss_sum: LossSum,
    checkpointing: Checkpointing,
) -> Iterator[Callable[[Microbatch], LossTotals]]:
    """Show the engine every (x, dy) of the named modules, for each of this rank's microbatches that is given.

    Gives a function to call with one microbatch after the other, as many on every rank; it returns all ranks' loss and
    tokens. It raises RunError, on every rank, when a loss or a gradient is not finite, naming batch and layer. The end
    of the context raises UserError when a module took no part in the loss.
    """
    world = sharding.world
    monitor = _Monitor(engine, names, world.device)

    def take(microbatch: Microbatch) -> LossTotals:
        engine.begin_microbatch(microbatch.index)
        logits = forward(model, microbatch, world.device)
        return_freed_memory()  # holes that blocks left; the logits and their loss are often the peak
        loss = loss_sum(logits, microbatch.inputs["labels"])
        del logits
        loss.backward()
        sharding.release()
        tokens_here = torch.tensor(microbatch.num_supervised_tokens, dtype=torch.float64, device=world.device)
        sums = torch.stack([loss.detach().double(), monitor.failures(), tokens_here])
        loss_value, failures, tokens = world.sum_(sums).tolist()
        if failures or not math.isfinite(loss_value):
            _name_the_culprit(model, microbatch, loss.item(), monitor, world, sharding)
        engine.end_microbatch(world)
        return LossTotals(loss_value, int(tokens))

    with tapped(model, names, monitor.observe, checkpointing=checkpointing), full_float32_matmul():
        yield take
    with world.together():
        if missing := monitor.missing():
            raise UserError(
                "lora.exclude_modules",
                missing,
                "took no part in the loss, so there is no gradient to start from; list these here",
            )


def forward(model: nn.Module, microbatch: Microbatch, device: torch.device) -> torch.Tensor:
    """The model's logits. Its own loss, a mean over this rank's tokens, is never computed."""
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in microbatch.inputs.items()}
    labels = inputs.pop("labels")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    # a classifier has one label per sequence, which no decoder could read
    if base.config.is_encoder_decoder and labels.dim() == 2:
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs).logits


@contextmanager
def full_float32_matmul() -> Iterator[None]:
    """No TF32 or bf16 shortcuts in float32 products while the context lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Monitor:
    """Stands between taps and engine: which modules were seen, and whose gradients were not finite, without syncs."""

    def __init__(self, engine: GradientEngine | EngineGroup, names: Sequence[str], device: torch.device) -> None:
        self._engine = engine
        self._row = {name: row for row, name in enumerate(names)}
        self._seen: set[str] = set()
        self._failed = torch.zeros(len(names), dtype=torch.bool, device=device)

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        self._seen.add(name)
        # a sum is finite exactly when its terms are, as float32 and bfloat16 hold any sum of a gradient's entries;
        # summing bfloat16 as it is is many times faster than as float32
        dtype = torch.float32 if dy_TM.dtype == torch.float16 else None
        self._failed[self._row[name]] |= ~dy_TM.sum(dtype=dtype).isfinite()
        self._engine.observe(name, x_TN, dy_TM)

    def failures(self) -> torch.Tensor:
        return self._failed.sum().double()

    def topmost_failure(self) -> str | None:
        """The failed module nearest the loss: the others inherited its gradient."""
        failed = [name for name, row in self._row.items() if self._failed[row]]
        return failed[-1] if failed else None

    def missing(self) -> list[str]:
        return [name for name in self._row if name not in self._seen]


def _name_the_culprit(
    model: nn.Module, microbatch: Microbatch, loss: float, monitor: _Monitor, world: World, sharding: Sharding
) -> None:
    """Raise RunError on all ranks. Every rank runs its forward once more, since sharded weights come by collectives."""
    layer = first_nonfinite_module(model, microbatch, world.device)
    sharding.release()
    batch = f"microbatch {microbatch.index} (data rows {list(microbatch.sample_ids)}) on rank {world.rank}"
    with world.together():
        if not math.isfinite(loss):
            where = f"first in the output of {layer}" if layer else "although every module's output is finite"
            raise RunError(f"calibrate: the loss is {loss} in {batch}, {where}")
        culprit = monitor.topmost_failure()
        if culprit is not None:
            raise RunError(
                f"calibrate: the gradient of {culprit} is not finite in {batch}; with float16, try model.dtype bfloat16"
            )


def first_nonfinite_module(model: nn.Module, microbatch: Microbatch, device: torch.device) -> str | None:
    """Name of the first module in forward order whose output holds a NaN or an infinity that its input did not."""
    found: list[str] = []

    def check(module: nn.Module, args: Any, output: Any, *, name: str) -> None:
        if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(name)

    handles = [
        module.register_forward_hook(functools.partial(check, name=name))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        with torch.no_grad():
            forward(model, microbatch, device)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
