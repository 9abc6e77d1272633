"""Which weight matrices get an adapter: PEFT's own matching, tried on a copy of the model that holds no memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loraga_dist.config import LoraSection
from loraga_dist.errors import UserError, blame
from loraga_dist.files.stored_tensors import TransposedTensor
from loraga_dist.model.blocks import expert_lists
from loraga_dist.model.conversion import StoredModel
from loraga_dist.model.coverage import Coverage, Weights
from loraga_dist.model.injection import SELECTION_SECONDS, injected_by_peft, names_taken_for_experts
from loraga_dist.model.left_out import LeftOut, experts_left_out, routers_left_out, rows_left_out, towers_left_out
from loraga_dist.model.names import is_excluded, is_named, must_be_excluded, require_matches, with_end
from loraga_dist.model.products import find_routers, is_product, multiplies
from loraga_dist.model.stacks import (
    NOT_IN_INTERFACE,
    TO_ADD_EXPERTS,
    Stack,
    ends_of,
    find_stacks,
    untappable,
)
from loraga_dist.model.targets import (
    StackPlace,
    StoredRows,
    Target,
    peft_lora_config,
    saved_parameters,
    tied_parameters,
)
from loraga_dist.model.towers import text_model, tower_of


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What PEFT makes of the user's section on one model."""

    targets: list[Target]
    """In the model's module order."""
    saved_parameters: list[str]
    """Parameters of `modules_to_save`, which PEFT expects in the adapter file; it adds the heads of classifiers."""
    coverage: Coverage
    left_out: list[LeftOut]
    """By `all-linear`; who names experts' parameters knows which are left out."""


def select_targets(
    meta_model: nn.Module,
    lora: LoraSection,
    num_triplets: Callable[[int], int],
    *,
    any_rank: bool = False,
    in_files: StoredModel | None = None,
) -> Selection:
    """Let PEFT inject its layers into `meta_model` (which is consumed) and read off what it chose.

    num_triplets: how many singular triplets the scheme needs for rank r. any_rank: the targets' ranks are chosen later.
    in_files: None where there is no checkpoint.
    Raises UserError when nothing matches, or when a match is no matrix or stack of them, is tied to another parameter,
    or is too small for its rank (with any_rank, for rank 1).
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    tied = tied_parameters(meta_model)
    before = {name for name, _ in meta_model.named_modules()}
    weights = Weights.of(meta_model)
    stacks, lists = find_stacks(meta_model), tuple(f"{name}." for name in expert_lists(meta_model))
    taken_for_experts = names_taken_for_experts(meta_model)
    ends = ends_of(stacks)
    for_experts = TO_ADD_EXPERTS.format(", ".join(ends)) if ends else None
    _require_parameters(meta_model, for_experts, lora)
    instead = "write another pattern there, or in lora.exclude_modules"
    with blame("lora.target_modules", lora.target_modules, "not matched", instead, limit_seconds=SELECTION_SECONDS):
        require_matches(meta_model, lora, for_experts=for_experts)
    target_modules, left_out = lora.target_modules, list[LeftOut]()
    if target_modules == "all-linear":
        target_modules, left_out = _all_linear(meta_model, lora)
    injected = injected_by_peft(meta_model, lora, target_modules)
    targets: list[Target] = []
    matched: set[str] = set()
    for name, layer in injected.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        found = _targets_of(name, layer, stacks, before, taken_for_experts, lora)
        matched.add(found[0].parameter_name if isinstance(layer, ParamWrapper) else name)
        targets += found
    _require_untied(targets, tied, lora)
    if in_files is not None:
        targets = [with_places(target, in_files) for target in targets]
    _require_sizes(targets, lora, num_triplets, any_rank=any_rank)
    if not targets:
        raise UserError(
            "lora.target_modules", lora.target_modules, "matches no module; write names the model has, or all-linear"
        )
    targets = [replace(target, in_expert_list=target.name.startswith(lists)) for target in targets]
    for target in targets:
        if target.by_parameter:
            _require_nothing_of_inputs(lora, target.parameter_name)
    _check_patterns(lora, matched)
    saved = saved_parameters(injected)
    return Selection(
        targets=targets,
        saved_parameters=saved,
        coverage=weights.covered_by(targets, saved),
        left_out=left_out,
    )


def _require_parameters(model: nn.Module, for_experts: str | None, lora: LoraSection) -> None:
    """Raise UserError for parameters that are not there, which PEFT would pass over, or cannot be adapted."""
    from transformers.pytorch_utils import Conv1D

    instead = f"write {for_experts}" if for_experts else "leave it out"
    parameters, closed = dict(model.named_parameters(remove_duplicate=False)), untappable(model)
    for end in lora.target_parameters or ():
        found = with_end(parameters, end)
        if not found:
            raise UserError("lora.target_parameters", end, f"matches no parameter; {instead}")
        for module in closed:
            if any(name.startswith(f"{module}.") for name in found):
                problem = f"has experts that cannot be tapped, {NOT_IN_INTERFACE}"
                raise UserError("lora.target_parameters", module, f"{problem}; leave them out")
        for name in found:
            module_name = name.rpartition(".")[0]
            module = model.get_submodule(module_name)
            if parameters[name].ndim not in (2, 3):
                raise _no_matrix(name, module, lora)
            if isinstance(module, Conv1D):
                problem = "is of a Conv1D, which PEFT adapts by its module's name alone"
                instead = f"write {ends_of([module_name])[0]} in lora.target_modules"
                raise UserError("lora.target_parameters", name, f"{problem}; {instead}")
            _require_not_excluded(module_name, lora)
        _require_nothing_of_inputs(lora, found[0])


def _require_not_excluded(module: str, lora: LoraSection) -> None:
    """Raise UserError for what leaves modules out, and PEFT does not hold against their parameters."""
    if lora.layers_to_transform is not None:
        problem = "does not choose among parameters; name those of these layers in lora.target_parameters"
        raise UserError("lora.layers_to_transform", lora.layers_to_transform, problem)
    if is_excluded(module, lora):
        problem = f"matches {module}, of which parameters are asked for; leave them out of lora.target_parameters"
        raise UserError("lora.exclude_modules", lora.exclude_modules, problem)


def _no_matrix(parameter: str, module: nn.Module, lora: LoraSection) -> UserError:
    problem = f"{parameter} of {type(module).__name__} is neither a matrix of F.linear nor a stack of experts'"
    return UserError("lora.target_parameters", lora.target_parameters, f"{problem}; leave it out")


def _all_linear(model: nn.Module, lora: LoraSection) -> tuple[list[str], list[LeftOut]]:
    """The names that `all-linear` stands for, and what it leaves out: towers, experts, routers, and single rows."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    config = peft_lora_config(lora)
    _maybe_include_all_linear_layers(config, model)
    names, routers, text = sorted(config.target_modules or ()), find_routers(model), text_model(model)
    in_towers = [name for name in names if tower_of(name, text)]
    rows = [name for name in names if min(model.get_parameter(f"{name}.weight").shape) == 1]
    kept = sorted(set(names).difference(in_towers, rows, routers))

    def wanted(left: list[str]) -> list[str]:
        return [name for name in left if check_target_module_exists(config, name)]  # exclude_modules may have them

    left_out = towers_left_out(wanted(in_towers), kept, text) + rows_left_out(wanted(rows))
    if not lora.target_parameters:  # else who names some knows of the others
        of_text = [name for name in routers if not tower_of(name, text) and not is_excluded(name, lora)]
        left_out = experts_left_out(model) + routers_left_out(of_text) + left_out
    return kept, left_out


def _targets_of(
    name: str,
    layer: Any,
    stacks: Mapping[str, Stack],
    before: Container[str],
    taken_for_experts: Container[str],
    lora: LoraSection,
) -> list[Target]:
    """Those that one of PEFT's layers adapts; raises UserError for a layer that is none of matrices.

    stacks: of experts, by parameter name. before: names of the model's own modules.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import ParamWrapper

    if isinstance(layer, ParamWrapper):
        return _of_parameter(name, layer, stacks, lora)
    base = layer.get_base_layer()
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    is_matrix = type(layer) is LoraLinear and getattr(base, "weight", torch.empty(0)).ndim == 2
    M, N = (tuple(base.weight.shape)[::-1] if transposed else tuple(base.weight.shape)) if is_matrix else (0, 0)
    if name not in before or not is_matrix or not is_product(base, M, N):
        instead = "add it to lora.exclude_modules"
        if is_matrix and multiplies(base):
            instead = f"leave it out, and for its adapter write lora.target_parameters: [{name}.weight]"
        problem = f"{name} ({type(base).__name__}) is not a plain matrix; {instead}"
        raise UserError("lora.target_modules", lora.target_modules, problem)
    by_parameter = name in taken_for_experts
    return [_target(layer, name, M, N, transposed=transposed, by_parameter=by_parameter)]


def _of_parameter(name: str, layer: Any, stacks: Mapping[str, Stack], lora: LoraSection) -> list[Target]:
    """Those that a layer adapts which PEFT puts around a parameter's module, or around another such layer."""
    base = layer.get_base_layer()
    module_name = re.sub(r"(\.base_layer)+$", "", name)
    parameter = f"{module_name}.{layer.parameter_name}"
    stack = stacks.get(parameter)
    if stack is None:
        if layer.parameter_name != "weight" or not multiplies(base):
            raise _no_matrix(parameter, base, lora)
        return [_target(layer, module_name, *base.weight.shape, by_parameter=True)]
    if stack.E == 1 and stack.transposed:
        problem = "holds one matrix, stored (in, out), to which PEFT adds its update as (out, in); leave it out"
        raise UserError("lora.target_parameters", parameter, problem)
    return [
        replace(
            _target(layer, expert_name, stack.M, stack.N, transposed=stack.transposed),
            weight_key=parameter,
            stack=StackPlace(parameter=parameter, index=index, size=stack.E, num_chosen=stack.num_chosen, layer=name),
        )
        for index, expert_name in enumerate(stack.names)
    ]


def _target(layer: Any, name: str, M: int, N: int, *, transposed: bool = False, by_parameter: bool = False) -> Target:
    """With the rank and scaling that the layer has."""
    return Target(
        name=name,
        M=M,
        N=N,
        r=layer.r["default"],
        lora_alpha=layer.lora_alpha["default"],
        scaling=layer.scaling["default"],
        transposed=transposed,
        weight_key=f"{name}.weight",
        by_parameter=by_parameter,
    )


def with_places(target: Target, in_files: StoredModel) -> Target:
    """The target with its place in the checkpoint. Raises UserError where it has none."""
    if target.stack is None:
        return replace(target, weight_key=in_files.key_of(target.parameter_name))
    place, expected = in_files.tensor_of(target.parameter_name), (target.stack.size, *target.parameter_shape)
    if place.shape != expected:
        problem = f"has shape {place.shape} in the checkpoint, the model's config says {expected}"
        raise UserError("model.name_or_path", target.parameter_name, problem)
    stack = replace(target.stack, turned_in_files=isinstance(place, TransposedTensor))
    target = replace(target, stack=stack)
    first, row_numel = target.first_element, target.stored_shape[1]
    pieces = place.pieces(first, first + target.M * target.N)
    # tensors that a stack is made of hold whole rows of it
    rows = tuple(StoredRows(slot.name, start // row_numel, (end - start) // row_numel) for slot, start, end in pieces)
    return replace(target, weight_key=rows[0].key, stack=replace(stack, rows=rows))


def _left_out(target: Target, lora: LoraSection) -> str:
    asked = is_named(target.parameter_name, lora)
    return "leave it out of lora.target_parameters" if asked else "add it to lora.exclude_modules"


def _require_untied(targets: Iterable[Target], tied: Mapping[str, str], lora: LoraSection) -> None:
    found = {
        target.parameter_name if is_named(target.parameter_name, lora) else target.name: tied[target.parameter_name]
        for target in targets
        if target.parameter_name in tied
    }
    if found:
        other = next(iter(found.values()))
        what = f"tied to other parameters ({other}), so that changing one would change both"
        raise must_be_excluded([*found], what, lora)


def _require_sizes(
    targets: Iterable[Target], lora: LoraSection, num_triplets: Callable[[int], int], *, any_rank: bool
) -> None:
    """Raise UserError for the smallest of the matrices that have fewer singular directions than their rank takes."""

    def directions(target: Target) -> int:
        return min(target.M, target.N)

    small = (target for target in targets if num_triplets(1 if any_rank else target.r) > directions(target))
    if (target := min(small, key=directions, default=None)) is None:
        return
    smallest = directions(target)
    fitting = max(rank for rank in range(smallest + 1) if num_triplets(rank) <= smallest)
    instead = f"write {fitting} or less, there alone with lora.rank_pattern" if fitting else _left_out(target, lora)
    raise UserError(
        "lora.r" if target.r == lora.r else "lora.rank_pattern",
        target.r,
        f"{target.name} is {target.M} x {target.N} and needs {num_triplets(target.r)} singular directions; {instead}",
    )


def _require_nothing_of_inputs(lora: LoraSection, parameter: str) -> None:
    """Raise UserError for what PEFT has no place for where it adds an adapter to a parameter's value."""
    problem = f"PEFT adapts {parameter} by its value, without"
    if lora.lora_dropout:
        raise UserError("lora.lora_dropout", lora.lora_dropout, f"{problem} its inputs; write 0.0")
    if lora.use_dora:
        raise UserError("lora.use_dora", True, f"{problem} magnitudes; write false")


def _check_patterns(lora: LoraSection, names: Collection[str]) -> None:
    """Raise UserError for a rank or alpha pattern that decides about none of the names that PEFT held them against."""
    from peft.utils.other import get_pattern_key

    for key, patterns in (("lora.rank_pattern", lora.rank_pattern), ("lora.alpha_pattern", lora.alpha_pattern)):
        used = {get_pattern_key(list(patterns), name) for name in names}
        for pattern in patterns:
            if pattern not in used:
                taken = sorted(name for name in names if get_pattern_key([pattern], name) == pattern)
                if taken:
                    first = get_pattern_key(list(patterns), taken[0])
                    problem = f"{first} stands before it and matches {taken[0]}, too; write {pattern} first"
                    raise UserError(key, pattern, problem)
                instead = "write a target's name or the end of one, of experts their parameter's, or remove it"
                raise UserError(key, pattern, f"matches no target; {instead}")
