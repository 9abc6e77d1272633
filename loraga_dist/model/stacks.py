"""Parameters that hold one matrix per expert, and the names of these matrices as targets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from loraga_dist.model.blocks import expert_lists, shape_of


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A parameter of shape (E, M, N), or (E, N, M) if transposed."""

    parameter_name: str
    E: int
    M: int
    N: int
    num_chosen: int
    """Experts that a token goes to."""
    transposed: bool
    """Each matrix is stored (N, M), and the module says so: y = x W."""
    swapped: bool
    """Each matrix is stored (in, out), and no flag says so: PEFT then takes M for in, N for out, so the target is the
    matrix as stored."""

    @property
    def names(self) -> list[str]:
        """Of its experts' matrices."""
        return [f"{self.parameter_name}.{expert}" for expert in range(self.E)]


TO_ADD_EXPERTS = "lora.target_parameters: [{}]"
NOT_IN_INTERFACE = "as they are not in transformers' experts interface"


def ends_of(names: Iterable[str]) -> tuple[str, ...]:
    """What comes after the number of the layer, each once."""
    return tuple(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names))


def split_name(name: str) -> tuple[str, int] | None:
    """The parameter's name and the expert's number in an expert's name; None where it cannot be one."""
    parameter_name, _, expert = name.rpartition(".")
    return (parameter_name, int(expert)) if parameter_name and expert.isdecimal() else None


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks whose experts can be tapped, by parameter name, in the model's module order.

    Of shapes alone: the model may be on the meta device, or its parameters in ZeRO-3's shards.
    """
    found = {}
    config = getattr(model, "config", None)
    for module_name, module in model.named_modules():
        for attribute in stacked_parameters(module):
            E, P, Q = shape_of(getattr(module, attribute))
            name = f"{module_name}.{attribute}"
            transposed = bool(getattr(module, "is_transposed", False))
            M, N = (Q, P) if transposed else (P, Q)
            found[name] = Stack(
                parameter_name=name,
                E=E,
                M=M,
                N=N,
                num_chosen=_num_chosen(config, E),
                transposed=transposed,
                swapped=is_llama4_experts(module),
            )
    return found


def stacked_parameters(module: nn.Module) -> list[str]:
    """Attributes of a module whose experts can be tapped, in the order of use; none for another module."""
    has_interface = all(hasattr(module, flag) for flag in _FLAGS) and not getattr(module, "_is_expert_parallel", False)
    if not has_interface and not is_llama4_experts(module):
        return []
    attributes = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    return attributes if all(_is_stack(module._parameters.get(attribute)) for attribute in attributes) else []


def untappable(model: nn.Module) -> list[str]:
    """Modules that hold matrices of experts in a way that cannot be tapped, in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if not stacked_parameters(module)
        and not type(module).__module__.startswith("torch.nn.")
        and _looks_like_experts(module)
    ]


def modules_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that run for these targets: themselves, or what an expert's matrix, or an expert, belongs to."""
    modules, found = dict(model.named_modules()), {}
    lists = expert_lists(model)
    for name in names:
        if name not in modules:
            assert (parts := split_name(name)) is not None, f"{name} is neither a module nor an expert's"
        owner = name if name in modules else parts[0].rpartition(".")[0]
        within = (caller for experts, caller in lists.items() if owner.startswith(f"{experts}."))
        found[name] = modules[next(within, owner)]
    return found


def is_llama4_experts(module: nn.Module) -> bool:
    """Whether a module is Llama4's, which has an interface of its own: as many rows for every expert."""
    return any(base.__name__ == "Llama4TextExperts" for base in type(module).__mro__)


_CHOICES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
"""Names that configurations have for the number of experts a token goes to."""

_FLAGS = ("has_gate", "has_bias", "is_transposed")
"""What transformers' `use_experts_implementation` sets."""


def _num_chosen(config: Any, E: int) -> int:
    """Where it is not known: all, so that a plan has room for them."""
    values = (getattr(config.get_text_config(), name, None) for name in _CHOICES) if config is not None else ()
    return min(next((value for value in values if isinstance(value, int)), E), E)


def _is_stack(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and len(shape_of(parameter)) == 3 and parameter.is_floating_point()


def _looks_like_experts(module: nn.Module) -> bool:
    own = [parameter for parameter in module.parameters(recurse=False) if len(shape_of(parameter)) > 1]
    named_so = re.search("expert", type(module).__name__, re.IGNORECASE) is not None
    return bool(own) and not isinstance(module, nn.Linear | nn.Embedding) and (named_so or _has_many(module, own))


def _has_many(module: nn.Module, own: Iterable[nn.Parameter]) -> bool:
    """Whether a module knows a number of experts, and has a stack of as many matrices."""
    counts = {value for name, value in vars(module).items() if "expert" in name and isinstance(value, int)}
    return any(len(shape := shape_of(parameter)) == 3 and shape[0] in counts for parameter in own)
