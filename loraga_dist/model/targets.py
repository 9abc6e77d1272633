"""A weight matrix that gets an adapter: its names, its shape, and where it is stored."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from loraga_dist.config import LoraSection
from loraga_dist.errors import UserError, blame
from loraga_dist.files.quantized import QuantizedSlot
from loraga_dist.files.safetensors_io import dtype_name
from loraga_dist.files.stored_tensors import Slot
from loraga_dist.model.base import WIDE_FLOATS

if TYPE_CHECKING:
    from peft import LoraConfig


class StoredRows(NamedTuple):
    """Rows of a checkpoint tensor, those of all matrices in it counted through."""

    key: str
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class StackPlace:
    """Where one matrix is in a parameter that holds many, an expert each."""

    parameter: str
    """Its name."""
    index: int
    size: int
    """E: matrices in it."""
    num_chosen: int
    """Those that a token goes to."""
    layer: str
    """PEFT's layer that adapts all of them; as it holds another one, its name may go on after the module's."""
    rows: tuple[StoredRows, ...] = ()
    """In the checkpoint, one after the other; none where the model is in memory."""
    turned_in_files: bool = False
    """These are rows of the transpose of the parameter's matrix: Qwen3-VL-MoE's."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One weight matrix W_MN (y = W x) and the rank and scaling PEFT gives its adapter."""

    name: str
    """The module's; an expert's is that of the parameter, and its number."""
    M: int
    N: int
    r: int
    lora_alpha: float
    scaling: float
    transposed: bool
    """The parameter holds the matrix as (N, M): GPT-2's Conv1D, gpt-oss's experts."""
    weight_key: str
    """Of the weight in the checkpoint, or of its first part; its parameter's name where the model is in memory."""
    stack: StackPlace | None = None
    """None for a matrix that is a parameter of its own."""
    by_parameter: bool = False
    """PEFT has to be told the weight's name: it would take the module's for one of experts."""
    in_expert_list: bool = False
    """It is of an expert that is a module."""

    @property
    def is_routed(self) -> bool:
        """Whether a microbatch, or a rank, may have no token for it."""
        return self.stack is not None or self.in_expert_list

    @property
    def row_share(self) -> float:
        """Of tokens that are multiplied with it, on average; all where that is not known."""
        return 1.0 if self.stack is None else self.stack.num_chosen / self.stack.size

    @property
    def parameter_name(self) -> str:
        return f"{self.name}.weight" if self.stack is None else self.stack.parameter

    @property
    def layer(self) -> str:
        """Name of PEFT's layer, in its model and in adapter files."""
        return self.name if self.stack is None else self.stack.layer

    @property
    def pattern_name(self) -> str:
        """What PEFT holds patterns of ranks and alphas against."""
        return self.parameter_name if self.stack is not None or self.by_parameter else self.name

    @property
    def first_element(self) -> int:
        """Of the matrix, in the flattened parameter."""
        return 0 if self.stack is None else self.stack.index * self.M * self.N

    @property
    def stored_rows(self) -> tuple[StoredRows, ...]:
        """Where the rows of the stored matrix are in the checkpoint, in their order."""
        if self.stack is None:
            return (StoredRows(self.weight_key, 0, self.stored_shape[0]),)
        return self.stack.rows

    @property
    def num_parameters(self) -> int:
        """Of A and B together."""
        return self.r * (self.M + self.N)

    @property
    def adapter_bytes(self) -> int:
        """Of A and B together, in float32."""
        return 4 * self.num_parameters

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """Of the matrix as the parameter holds it."""
        return (self.N, self.M) if self.transposed else (self.M, self.N)

    @property
    def stored_transposed(self) -> bool:
        """Whether the checkpoint holds the matrix as (N, M)."""
        return self.transposed != (self.stack is not None and self.stack.turned_in_files)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Of the matrix as the checkpoint holds it."""
        return (self.N, self.M) if self.stored_transposed else (self.M, self.N)


def kind_of(name: str) -> str:
    """What to call all targets like this one: the last part of its name; experts by their parameter."""
    *outer, last = name.split(".")
    return ".".join(outer[-2:]) if last.isdecimal() and outer else last


def layers_of(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """The targets by PEFT's layer: of a stack all, in their order, of another layer one."""
    layers: dict[str, list[Target]] = {}
    for target in targets:
        layers.setdefault(target.layer, []).append(target)
    return layers


def peft_lora_config(lora: LoraSection) -> LoraConfig:
    """The user's section as PEFT's own config; raises UserError where PEFT refuses a value."""
    from peft import LoraConfig

    with blame("lora", lora.model_dump(exclude_defaults=True), "PEFT refuses it", "write what peft.LoraConfig takes"):
        return LoraConfig(**lora.model_dump())


def lost_by_loading(peft_model: Any) -> list[str]:
    """Layers whose adapter PEFT would not find in its own file: some families' old names of modules are parts of the
    new ones, which it then renames once more."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    with warnings.catch_warnings(action="ignore"):
        missing = set_peft_model_state_dict(peft_model, state, low_cpu_mem_usage=True).missing_keys
    found = (re.fullmatch(r"base_model\.model\.(.+)\.lora_A\..+", key) for key in missing)
    return [match[1] for match in found if match]


def meta_copy(model_class: type[nn.Module], config: object) -> nn.Module:
    """The model's modules and shapes on the meta device, tied as transformers ties them."""
    from transformers.modeling_utils import set_zero3_state

    # in a script that loads under ZeRO-3, transformers would partition the models that this one is made of
    with set_zero3_state(), torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = model_class(copy.deepcopy(config))
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def tied_parameters(model: nn.Module) -> dict[str, str]:
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


def saved_parameters(model: nn.Module) -> list[str]:
    """Parameters that `modules_to_save` copies into the adapter, by their names in the model without PEFT's layers."""
    from peft.utils.other import ModulesToSaveWrapper

    return [
        f"{name}.{inner}"
        for name, layer in model.named_modules()
        if isinstance(layer, ModulesToSaveWrapper)
        for inner, _ in layer.original_module.named_parameters()
    ]


def require_targets(index: Mapping[str, Slot], targets: Iterable[Target]) -> None:
    """Raise UserError unless the checkpoint holds every target as a plain floating matrix of the expected shape."""
    for target in targets:
        for rows in target.stored_rows:
            slot = index.get(rows.key)
            if slot is None:
                problem = f"is not in the checkpoint, but {target.name} is a target"
            elif slot.dtype not in WIDE_FLOATS:
                problem = f"is stored as {dtype_name(slot.dtype)}; write the path of an unquantized checkpoint"
            elif not holds_rows(slot, rows, target):
                problem = f"has shape {slot.shape} in the checkpoint and {target.stored_shape} in the model"
            else:
                continue
            raise UserError("model.name_or_path", rows.key, problem)


def require_saved(index: Mapping[str, Slot], saved: Mapping[str, str]) -> None:
    """Raise UserError for a parameter that would be trained whole and is quantized. saved: checkpoint keys by name."""
    for name, key in saved.items():
        if isinstance(index.get(key), QuantizedSlot):
            raise UserError("lora.modules_to_save", name, "is quantized in the checkpoint; leave it out")


def holds_rows(slot: Slot, rows: StoredRows, target: Target) -> bool:
    if target.stack is None:
        return slot.shape == target.stored_shape
    *outer, row_numel = slot.shape
    return row_numel == target.stored_shape[1] and rows.first + rows.count <= math.prod(outer)
