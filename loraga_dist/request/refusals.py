"""What does not fit together in a request: settings, model, and targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from loraga_dist.config import InitConfig, LoraSection, MethodConfig
from loraga_dist.data.microbatches import MicrobatchSharder
from loraga_dist.errors import UserError
from loraga_dist.model.base import DTYPES
from loraga_dist.model.blocks import Order
from loraga_dist.model.names import pattern_of, to_leave_out
from loraga_dist.model.stacks import Stack
from loraga_dist.model.targets import Target
from loraga_dist.model.towers import tower_of
from loraga_dist.schemes import SCHEMES


def require_base_left_alone(quantization: str, config: InitConfig) -> None:
    """Raise UserError for a start that would change quantized weights, or copy what was made of them."""
    held = f"and those of the checkpoint are quantized ({quantization})"
    if SCHEMES[config.init.scheme].changes_base:
        others = ", ".join(name for name, scheme in SCHEMES.items() if not scheme.changes_base)
        problem = f"changes the base's weights, {held}; write rrr, or another that leaves them alone ({others})"
        raise UserError("init.scheme", config.init.scheme, problem)
    if config.lora.use_dora:
        raise UserError("lora.use_dora", True, f"starts from norms of the base's weights, {held}; write false")


def require_gradients_of_text(lora: LoraSection, targets: Iterable[Target], text: str) -> None:
    """Raise UserError for targets beside the language model `text`."""
    tower_by_name = {target.pattern_name: tower_of(target.name, text) for target in targets}
    if names := [name for name, tower in tower_by_name.items() if tower is not None]:
        towers = dict.fromkeys(tower for tower in tower_by_name.values() if tower is not None)
        problem = f"takes in matrices of {' and '.join(towers)}, which text gives no gradient"
        key, value, instead = to_leave_out(names, lora, rf"{pattern_of(towers)}(\..*)?")
        raise UserError(key, value, f"{problem}; {instead}")


def require_inputs_of_a(config: MethodConfig, targets: Sequence[Target], stacks: Mapping[str, Stack]) -> None:
    """Raise UserError for a regression on inputs where what PEFT calls A is not on the inputs' side."""
    for target in targets:
        if target.stack is not None and stacks[target.stack.parameter].swapped:
            parameter, others = target.stack.parameter, [name for name, it in SCHEMES.items() if not it.whitens]
            problem = f"regresses on inputs, and PEFT's A of {parameter} is on the side of its outputs"
            instead = f"write {', '.join(others)}, or leave it out of lora.target_parameters"
            raise UserError("init.scheme", config.init.scheme, f"{problem}; {instead}")


def require_alike(data: MicrobatchSharder | None, order: Order, key: str, world_size: int) -> None:
    """Raise UserError where some ranks would gather a tower for their images, and others not. key: of the data."""
    if world_size > 1 and order.blocks is None and data is not None and data.mixes_images:
        problem = "some samples have images and some have none, and ranks go through this model together"
        raise UserError(key, data.num_samples, f"{problem} ({order.why}); leave the ones or the others out")


def require_unquantized(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise UserError for targets that a model in memory does not hold in floating point."""
    parameters = dict(model.named_parameters())
    for target in targets:
        weight = parameters.get(target.parameter_name)
        if weight is None or weight.dtype not in DTYPES.values():
            held = "no weight" if weight is None else f"a weight in {str(weight.dtype).removeprefix('torch.')}"
            raise UserError("model", target.name, f"holds {held}; load the model in {', '.join(DTYPES)}")
