"""Which weight matrices get an adapter: PEFT's own matching, tried on a copy of the model that holds no memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraga_dist.config import LoraSection
from loraga_dist.errors import UserError, blame
from loraga_dist.files.safetensors_io import TensorSlot, dtype_name
from loraga_dist.model.base import WIDE_FLOATS

if TYPE_CHECKING:
    from peft import LoraConfig

SELECTION_SECONDS = 120
"""PEFT takes a few for the largest models; some regular expressions never end."""

_LEAVE_OUT = "leave it out with lora.exclude_modules"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One weight matrix W_MN (y = W x) and the rank and scaling PEFT gives its adapter."""

    name: str
    M: int
    N: int
    r: int
    lora_alpha: float
    scaling: float
    transposed: bool
    """The parameter is stored (N, M): GPT-2's Conv1D."""
    weight_key: str
    """Of the weight in the checkpoint; its parameter's name where the model is in memory."""

    @property
    def parameter_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def num_parameters(self) -> int:
        """Of A and B together."""
        return self.r * (self.M + self.N)

    @property
    def adapter_bytes(self) -> int:
        """Of A and B together, in float32."""
        return 4 * self.num_parameters

    @property
    def stored_shape(self) -> tuple[int, int]:
        return (self.N, self.M) if self.transposed else (self.M, self.N)


def peft_lora_config(lora: LoraSection) -> LoraConfig:
    """The user's section as PEFT's own config; raises UserError where PEFT refuses a value."""
    from peft import LoraConfig

    with blame("lora", lora.model_dump(exclude_defaults=True), "PEFT refuses it", "write what peft.LoraConfig takes"):
        return LoraConfig(**lora.model_dump())


def meta_copy(model_class: type[nn.Module], config: object) -> nn.Module:
    """The model's modules and shapes on the meta device, tied as transformers ties them."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(copy.deepcopy(config))
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What PEFT makes of the user's section on one model."""

    targets: list[Target]
    """In the model's module order."""
    saved_parameters: list[str]
    """Parameters of `modules_to_save`, which PEFT expects in the adapter file; it adds the heads of classifiers."""


def select_targets(
    meta_model: nn.Module,
    lora: LoraSection,
    num_triplets: Callable[[int], int],
    *,
    any_rank: bool = False,
    weight_key: Callable[[str], str] = str,
) -> Selection:
    """Let PEFT inject its layers into `meta_model` (which is consumed) and read off what it chose.

    num_triplets: how many singular triplets the scheme needs for rank r. any_rank: the targets' ranks are chosen later.
    weight_key: the checkpoint's key of a parameter; without a checkpoint the parameter's name.
    Raises UserError when nothing matches, or when a match is not a plain matrix, is tied to another parameter, or is
    too small for its rank (with any_rank, for rank 1).
    """
    from peft import get_peft_model
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    def refused(problem: str) -> UserError:
        return UserError("lora.target_modules", lora.target_modules, problem)

    tied = _tied_parameters(meta_model)
    before = {name for name, _ in meta_model.named_modules()}
    instead = "write names of nn.Linear modules, or all-linear"
    with (
        blame("lora.target_modules", lora.target_modules, "PEFT refuses it", instead, limit_seconds=SELECTION_SECONDS),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        peft_model: Any = get_peft_model(meta_model, peft_lora_config(lora), low_cpu_mem_usage=True)  # type: ignore[arg-type]

    targets: list[Target] = []
    saved_parameters: list[str] = []
    for name, layer in peft_model.base_model.model.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            saved_parameters += [f"{name}.{inner}" for inner, _ in layer.original_module.named_parameters()]
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
        if name not in before or type(layer) is not LoraLinear or getattr(base, "weight", torch.empty(0)).ndim != 2:
            raise refused(f"{name} ({type(base).__name__}) is not a plain matrix; add it to lora.exclude_modules")
        M, N = tuple(base.weight.shape)[::-1] if transposed else tuple(base.weight.shape)  # type: ignore[union-attr]
        r = layer.r["default"]
        if f"{name}.weight" in tied:
            raise refused(
                f"{name}.weight is tied to {tied[f'{name}.weight']}; changing one would change both; "
                "add it to lora.exclude_modules"
            )
        if num_triplets(1 if any_rank else r) > min(M, N):
            fitting = max(rank for rank in range(min(M, N) + 1) if num_triplets(rank) <= min(M, N))
            raise UserError(
                "lora.r" if r == lora.r else "lora.rank_pattern",
                r,
                f"{name} is {M} x {N} and needs {num_triplets(r)} singular directions; "
                + (f"write {fitting} or less, there alone with lora.rank_pattern" if fitting else _LEAVE_OUT),
            )
        targets.append(
            Target(
                name=name,
                M=M,
                N=N,
                r=r,
                lora_alpha=layer.lora_alpha["default"],
                scaling=layer.scaling["default"],
                transposed=transposed,
                weight_key=weight_key(f"{name}.weight"),
            )
        )
    if not targets:
        raise refused("matches no module; write names the model has, or all-linear")
    check_patterns(lora, targets)
    return Selection(targets=targets, saved_parameters=saved_parameters)


def check_patterns(lora: LoraSection, targets: Sequence[Target]) -> None:
    """Raise UserError for a rank or alpha pattern that matches no target."""
    from peft.utils.other import get_pattern_key

    for key, patterns in (("lora.rank_pattern", lora.rank_pattern), ("lora.alpha_pattern", lora.alpha_pattern)):
        used = {get_pattern_key(list(patterns), target.name) for target in targets}
        for pattern in patterns:
            if pattern not in used:
                raise UserError(
                    key, pattern, "matches no target; write a target's name or the end of one, or remove it"
                )


def _tied_parameters(model: nn.Module) -> dict[str, str]:
    """Every parameter name that shares its tensor, with the name of another holder."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in holders.values()
        if len(names) > 1
        for name in names
    }


def require_targets(index: Mapping[str, TensorSlot], targets: Iterable[Target]) -> None:
    """Raise UserError unless the checkpoint holds every target as a plain floating matrix of the expected shape."""
    for target in targets:
        slot = index.get(target.weight_key)
        if slot is None:
            problem = f"is not in the checkpoint, but {target.name} is a target"
        elif slot.dtype not in WIDE_FLOATS:
            problem = f"is stored as {dtype_name(slot.dtype)}; write the path of an unquantized checkpoint"
        elif slot.shape != target.stored_shape:
            problem = f"has shape {slot.shape} in the checkpoint and {target.stored_shape} in the model"
        else:
            continue
        raise UserError("model.name_or_path", target.weight_key, problem)
