"""Where a model's parameters lie in a checkpoint whose tensors have other names, or are parts of parameters.

transformers renames tensors and fuses experts when it loads a checkpoint. Here the same is done to where they lie.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from loraga_dist.errors import UserError
from loraga_dist.files.stored_tensors import Slot, StoredTensor, TransposedTensor


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """Where the parameters and buffers of a model lie in its checkpoint."""

    tensors: Mapping[str, StoredTensor]
    """By the model's own names, of a tied parameter by all that are stored; a shape may be another than the config
    says."""
    changed: Sequence[str]
    """Parameters and buffers that are not the elements of tensors one after the other."""
    lacking: Sequence[str]
    """Parameters and persistent buffers of which the checkpoint holds nothing."""
    tied: Mapping[str, str]
    """Names of tied parameters under which nothing is stored, each with the one under which they are."""

    @property
    def as_it_is(self) -> Mapping[str, StoredTensor] | None:
        """Where everything lies; None where transformers has to make values of the checkpoint's."""
        return None if self.changed or self.lacking else self.tensors

    def key_of(self, name: str) -> str:
        """The key of the one tensor that is this parameter, of targets and of modules that are trained whole. Raises
        UserError where there is none."""
        stored = self.tensors.get(name)
        if stored is not None and len(stored.slots) == 1 and not isinstance(stored, TransposedTensor):
            return stored.slots[0].name
        if name in self.tied:
            problem = f"is tied to {self.tied[name]}, under whose name alone the checkpoint holds it"
            instead = "leave its module out, or write a checkpoint that has both, with tie_word_embeddings: false"
            raise UserError("lora.modules_to_save", name, f"{problem}; {instead}")
        raise self._without_place(name, "leave the module out (lora.exclude_modules, lora.modules_to_save)")

    def tensor_of(self, name: str) -> StoredTensor:
        """Where this parameter lies. Raises UserError where it is not the elements of tensors of the checkpoint."""
        if (stored := self.tensors.get(name)) is None:
            raise self._without_place(name, "leave it out of lora.target_parameters")
        return stored

    def _without_place(self, name: str, instead: str) -> UserError:
        if name in self.changed or name in self.tensors:
            problem = "transformers makes it of other tensors of the checkpoint, where its residual cannot be written"
            return UserError("model.name_or_path", name, f"{problem}; {instead}")
        problem = "the checkpoint has no tensor of this name, so its residual cannot be written"
        again = "save the model again with this version of transformers"
        return UserError("model.name_or_path", name, f"{problem}; {again}, or {instead}")


def stored_model(meta_model: nn.Module, index: Mapping[str, Slot]) -> StoredModel:
    """Find where every parameter and buffer of a model lies, as transformers would load it.

    meta_model: not yet changed by PEFT. Raises UserError for a checkpoint that lacks some of a layer's experts.
    """
    names = [name for name, _ in [*meta_model.named_parameters(), *meta_model.named_buffers()]]
    sources = _sources(meta_model, index)
    parameters = dict(meta_model.named_parameters(remove_duplicate=False))
    made = {
        name: sources[name].converted(name, meta_model)
        for name in dict.fromkeys([*names, *parameters])
        if name in sources
    }
    needed = meta_model.state_dict().keys()  # with all names of tied parameters, without buffers of no file
    name_of = {parameter: name for name, parameter in parameters.items() if name in made}
    return StoredModel(
        tensors={name: stored for name, stored in made.items() if stored is not None},
        tied={name: name_of[it] for name, it in parameters.items() if name not in made and it in name_of},
        changed=[name for name in names if name in made and made[name] is None],
        lacking=[name for name in names if name in needed and name not in made],
    )


def require_whole(meta_model: nn.Module, stored: StoredModel) -> None:
    """Raise UserError for what the checkpoint lacks, or holds in another shape than the model's config says.

    transformers would read all the others first. meta_model: not yet changed by PEFT.
    """
    ignored = getattr(meta_model, "_keys_to_ignore_on_load_missing", None) or ()
    lacking = (name for name in stored.lacking if name not in stored.tied)
    require_found([name for name in lacking if not any(re.search(pattern, name) for pattern in ignored)])
    for name, tensor in meta_model.state_dict().items():
        if name in stored.tensors:
            stored_as(name, tensor.shape, stored.tensors)


def require_found(missing: Sequence[str]) -> None:
    """Raise UserError for parameters and buffers that the checkpoint lacks, which would start at random."""
    if missing:
        lacked = "it" if len(missing) == 1 else f"it and {len(missing) - 1} more"
        problem = f"the checkpoint lacks {lacked}; write one that holds the whole model"
        raise UserError("model.name_or_path", missing[0], problem)


def stored_as(name: str, shape: Sequence[int], stored: Mapping[str, StoredTensor]) -> StoredTensor:
    """Where the elements of this name lie. Raises UserError unless they have this shape."""
    tensor = stored[name]
    if tensor.shape != tuple(shape):
        problem = f"{name} has shape {tensor.shape}, the model's config says {tuple(shape)}"
        instead = "mend its config.json, or write another model"
        raise UserError("model.name_or_path", str(tensor.slots[0].path), f"{problem}; {instead}")
    return tensor


def require_ties(meta_model: nn.Module, stored: StoredModel, dtype: torch.dtype) -> None:
    """Raise UserError for a tied parameter of which the checkpoint holds several, unequal in this dtype: transformers
    would not tie them. Reads nothing of one that is stored once; raises RunError on a short read."""
    held: defaultdict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in meta_model.named_parameters(remove_duplicate=False):
        if name in stored.tensors:
            held[parameter].append(name)
    for first, *others in held.values():
        for other in others:
            if not _are_equal(stored.tensors[first], stored.tensors[other], dtype):
                problem = f"is another tensor in the checkpoint than {first}, and its config.json ties them"
                instead = "write tie_word_embeddings: false there, or take one of the two out of the checkpoint"
                raise UserError("model.name_or_path", other, f"{problem}; {instead}")


_COMPARED_AT_ONCE = 2**24
"""Elements."""


def _are_equal(a: StoredTensor, b: StoredTensor, dtype: torch.dtype) -> bool:
    if a.shape != b.shape:
        return False
    for start in range(0, a.numel, _COMPARED_AT_ONCE):
        parts = [torch.empty(min(_COMPARED_AT_ONCE, a.numel - start), dtype=dtype) for _ in range(2)]
        for tensor, part in zip((a, b), parts, strict=True):
            tensor.read_into(start, part)
        if not torch.equal(*parts):
            return False
    return True


@dataclass
class _Source:
    """The tensors of a checkpoint that one parameter is made of, in the order in which transformers meets them."""

    converter: Any = None
    """What makes the parameter of them; None where one of them is the parameter."""
    found: defaultdict[str | None, list[tuple[str, Slot]]] = field(default_factory=lambda: defaultdict(list))
    """By the converter's pattern, with the name that the pattern matched."""

    def converted(self, parameter: str, model: nn.Module) -> StoredTensor | None:
        """What transformers makes of them for this model; None where elements would change, or their order otherwise
        than by transposition."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        as_they_are = {
            pattern: [StoredTensor(slot.shape, (slot,)) for _, slot in found] for pattern, found in self.found.items()
        }
        if self.converter is None:
            return as_they_are[None][0]  # of several, transformers takes the first
        patterns = self.converter.source_patterns
        if not as_they_are.keys() <= set(patterns):
            return None
        operands = [as_they_are[pattern] for pattern in patterns if pattern in as_they_are]
        match self.converter.operations, operands:
            case [Transpose() as transpose], [[tensor]]:
                if transpose.check_dims and tensor.shape == model.get_parameter(parameter).shape:
                    return tensor
                return _transposed(tensor, transpose.dim0, transpose.dim1)
        for operation in self.converter.operations:
            if type(operation) is MergeModulelist and operation.dim == 0 and self._has_experts_in_order(parameter):
                results = [_stack(tensors) for tensors in operands]
            elif type(operation) is Concatenate:
                results = [_concatenate([tensor for tensors in operands for tensor in tensors], operation.dim)]
            else:
                return None
            operands = [[result] for result in results if result is not None]
            if len(operands) < len(results):
                return None
        return operands[0][0] if len(operands) == len(operands[0]) == 1 else None

    def _has_experts_in_order(self, parameter: str) -> bool:
        """Whether they are experts 0, 1, 2, ... for each pattern. Raises UserError for one that is missing."""
        numbers = {
            pattern: [_expert_number(str(pattern), name) for name, _ in found] for pattern, found in self.found.items()
        }
        if any(number is None for found in numbers.values() for number in found):
            return False
        expected = list(range(max(len(found) for found in numbers.values())))
        for pattern, found in numbers.items():
            missing = set(expected).difference(found)
            if missing:
                key = str(pattern).replace("*", str(min(missing))).replace("\\.", ".").strip(".")
                raise UserError(
                    "model.name_or_path",
                    parameter,
                    f"the checkpoint lacks {key} of it and holds other experts; copy or download it again",
                )
        return all(found == expected for found in numbers.values())


def _sources(meta_model: nn.Module, index: Mapping[str, Slot]) -> dict[str, _Source]:
    """What transformers' `convert_and_load_state_dict_in_model` collects, by the names of the model's state."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_converters,
        apply_renamings,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(meta_model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state: dict[str, Any] = dict(meta_model.state_dict())
    prefix: Any = getattr(meta_model, "base_model_prefix", "")

    sources: defaultdict[str, _Source] = defaultdict(_Source)
    for key in sorted(index, key=dot_natural_key):
        matched = apply_renamings(key, renamings)
        converted, pattern = apply_converters(matched, converters)
        name, _ = rename_source_key(converted, [], [], prefix, state)
        if name not in state and key in state:
            (name, _), pattern = rename_source_key(key, [], [], prefix, state), None
        if name in state:
            source = sources[name]
            source.found[pattern].append((matched, index[key]))
            source.converter = source.converter or (None if pattern is None else converter_of[pattern])
    for name, source in list(sources.items()):
        # transformers names the first of the parameters that a tensor is cut into
        first, *others = [""] if source.converter is None else source.converter.target_patterns
        for other in others:
            sources.setdefault(name.replace(first, other, 1), source)
    return dict(sources)


def _expert_number(pattern: str, name: str) -> int | None:
    """What stands in the name where the pattern has its one star."""
    if pattern.count("*.") != 1:
        return None
    match = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), name)
    return int(match["expert"]) if match else None


def _transposed(tensor: StoredTensor, *dims: int) -> StoredTensor | None:
    """A tensor with its last two axes exchanged; None for others."""
    rank = len(tensor.shape)
    if {dim % rank for dim in dims} != {rank - 2, rank - 1}:
        return None
    *outer, M, N = tensor.shape
    return TransposedTensor((*outer, N, M), tensor.slots)


def _stack(tensors: Sequence[StoredTensor]) -> StoredTensor | None:
    """Tensors of one shape, along a new first axis."""
    shape = tensors[0].shape
    if any(tensor.shape != shape for tensor in tensors):
        return None
    return StoredTensor((len(tensors), *shape), tuple(slot for tensor in tensors for slot in tensor.slots))


def _concatenate(tensors: Sequence[StoredTensor], dim: int) -> StoredTensor | None:
    """Tensors one after the other along an axis; None where that would cut a tensor of the checkpoint."""
    first = tensors[0].shape
    before, after = first[:dim], first[dim:][1:]
    if any((tensor.shape[:dim], tensor.shape[dim:][1:]) != (before, after) for tensor in tensors):
        return None
    runs = [_runs(tensor, math.prod(before)) for tensor in tensors]
    shape = (*before, sum(tensor.shape[dim] for tensor in tensors), *after)
    if any(run is None for run in runs):
        return None
    whole = [run for run in runs if run is not None]
    return StoredTensor(shape, tuple(slot for row in zip(*whole, strict=True) for part in row for slot in part))


def _runs(tensor: StoredTensor, count: int) -> list[tuple[Slot, ...]] | None:
    """The slots of `count` equal runs of elements; None where a slot reaches over two."""
    index_at = {start: index for index, start in enumerate(tensor.starts)}
    cuts = [index_at.get(run * tensor.numel // max(1, count)) for run in range(count + 1)]
    if any(cut is None for cut in cuts):
        return None
    return [tensor.slots[a:b] for a, b in pairwise(cuts)]
