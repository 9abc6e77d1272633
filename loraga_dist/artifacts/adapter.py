"""The adapter directories: plain PEFT LoRA, written and read one target at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraga_dist.artifacts.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loraga_dist.artifacts.tensors import read_chunks
from loraga_dist.files.disk import naming_write_errors
from loraga_dist.files.parallel import MAX_THREADS
from loraga_dist.files.safetensors_io import Entries, SafetensorsWriter, TensorSlot, read_header
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.model.factors import join, split
from loraga_dist.model.targets import Target, layers_of
from loraga_dist.schemes import LoraFactors, lora_scaling

if TYPE_CHECKING:
    from peft import LoraConfig


_STACKS_AT_HAND = 2 * MAX_THREADS
"""Each thread of a comparison is in another file, and may be at two stacks in turn."""


def adapter_keys(layer: str) -> tuple[str, str]:
    """The keys of A_RN and B_MR of one of PEFT's layers in an adapter file."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


def magnitude_key(name: str) -> str:
    """The key of a target's magnitudes (M,) in the file of a DoRA adapter."""
    return f"base_model.model.{name}.lora_magnitude_vector"


def saved_key(parameter_name: str) -> str:
    """The key of a parameter that `modules_to_save` copies into an adapter file."""
    return f"base_model.model.{parameter_name}"


def adapter_entries(targets: Iterable[Target], *, use_dora: bool, saved: Entries) -> Entries:
    """The tensors of an adapter file in their order: A, B and DoRA's magnitudes of every layer, fp32, and copies.

    saved: dtypes and shapes of the parameters that `modules_to_save` copies, by parameter name.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer, (first, *others) in layers_of(targets).items():
        a_key, b_key = adapter_keys(layer)
        all_ranks = first.r * (1 + len(others))
        entries[a_key] = (torch.float32, (all_ranks, first.N))
        entries[b_key] = (torch.float32, (first.M, all_ranks))
        if use_dora:
            entries[magnitude_key(first.name)] = (torch.float32, (first.M,))
    widest_first = sorted(saved.items(), key=lambda item: -item[1][0].itemsize)
    return entries | {saved_key(name): entry for name, entry in widest_first}


def write_adapter(
    directory: Path,
    peft_config: LoraConfig,
    targets: Sequence[Target],
    factors: Callable[[Target], LoraFactors],
    *,
    negate_b: bool = False,
    magnitudes: Callable[[Target, Tensor, Tensor], Tensor] | None = None,
    saved: Mapping[str, TensorSlot] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32), asking for one target's factors at a time.

    factors: of a target, fp32 or castable without a thought. negate_b: write -B (the offset adapter).
    magnitudes: of a DoRA adapter, (target, A_RN, B_MR as written) -> (M,); without, the adapter is none.
    saved: checkpoint tensors of the parameters that `modules_to_save` copies into the adapter.
    The config is the given one with the target modules spelled out, `inference_mode` and `init_lora_weights` true,
    so that loading takes the stored factors and nothing else. Raises RunError when the files cannot be written.
    """
    copies = {saved_key(name): slot for name, slot in (saved or {}).items()}
    entries = adapter_entries(targets, use_dora=magnitudes is not None, saved=entries_of(saved or {}))
    with SafetensorsWriter(directory / ADAPTER_WEIGHTS, entries) as writer:
        for layer, members in layers_of(targets).items():
            joined = join([_on_host(target, factors(target)) for target in members])
            written = joined.A_RN, -joined.B_MR if negate_b else joined.B_MR
            for key, factor in zip(adapter_keys(layer), written, strict=True):
                writer.append(key, factor)
            if magnitudes is not None:
                (target,) = members
                writer.append(magnitude_key(target.name), magnitudes(target, joined.A_RN, joined.B_MR).float())
        for key in entries:
            if key in copies:
                for chunk in read_chunks(copies[key]):
                    writer.append(key, chunk)

    with naming_write_errors(directory / ADAPTER_CONFIG):
        stored_config(peft_config, targets, use_dora=magnitudes is not None).save_pretrained(str(directory))


def _on_host(target: Target, factors: LoraFactors) -> LoraFactors:
    A_RN, B_MR = (factor.detach().to("cpu", torch.float32) for factor in (factors.A_RN, factors.B_MR))
    assert A_RN.shape == (target.r, target.N) and B_MR.shape == (target.M, target.r), target
    return LoraFactors(A_RN=A_RN, B_MR=B_MR)


def stored_config(peft_config: LoraConfig, targets: Sequence[Target], *, use_dora: bool) -> LoraConfig:
    """What `write_adapter` writes as `adapter_config.json`."""
    config = copy.copy(peft_config)
    config.use_dora = use_dora
    config.target_modules = sorted(target.name for target in targets if target.pattern_name == target.name)
    by_parameter = {target.parameter_name for target in targets if target.pattern_name != target.name}
    config.target_parameters = sorted(by_parameter) or None
    for target in targets:
        # patterns may have been held against the module's name; the first that matches decides
        if rank_and_scaling(config, target.pattern_name) != (target.r, target.lora_alpha, target.scaling):
            pattern = f"^{re.escape(target.pattern_name)}"
            config.rank_pattern = {pattern: target.r} | (config.rank_pattern or {})
            config.alpha_pattern = {pattern: target.lora_alpha} | (config.alpha_pattern or {})
    config.fan_in_fan_out = any(target.transposed for target in targets if target.stack is None)
    config.inference_mode = True
    config.init_lora_weights = True
    for key, value in vars(config).items():
        if isinstance(value, set):  # PEFT would write them in the order of their hashes, new in each process
            setattr(config, key, sorted(value))
    return config


class AdapterFile:
    """The factors of an adapter directory as stored, read when asked for. Raises BrokenFileError if not whole."""

    def __init__(self, directory: Path) -> None:
        self.slots: dict[str, TensorSlot] = read_header(directory / ADAPTER_WEIGHTS)
        # experts are asked for one after the other, by several threads
        self._stack = lru_cache(maxsize=_STACKS_AT_HAND)(self._read_stack)

    def factors(self, target: Target) -> LoraFactors:
        """A_RN and B_MR of one target; raises RunError on a short read."""
        if target.stack is None:
            a_key, b_key = adapter_keys(target.layer)
            return LoraFactors(A_RN=self.slots[a_key].read(), B_MR=self.slots[b_key].read())
        return self._stack(target.layer, target.stack.size)[target.stack.index]

    def _read_stack(self, layer: str, size: int) -> list[LoraFactors]:
        a_key, b_key = adapter_keys(layer)
        found = split(LoraFactors(A_RN=self.slots[a_key].read(), B_MR=self.slots[b_key].read()), size)
        return [factors._replace(B_MR=factors.B_MR.contiguous()) for factors in found]

    def magnitude(self, name: str) -> Tensor:
        """The magnitudes (M,) of one target of a DoRA adapter; raises RunError on a short read."""
        return self.slots[magnitude_key(name)].read()


def rank_and_scaling(config: LoraConfig, pattern_name: str) -> tuple[int, float, float]:
    """(r, lora_alpha, scaling) that PEFT gives what has this name for patterns when it loads such an adapter."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), pattern_name), config.r)
    lora_alpha = alphas.get(get_pattern_key(list(alphas), pattern_name), config.lora_alpha)
    return r, lora_alpha, lora_scaling(lora_alpha, r, config.use_rslora)
