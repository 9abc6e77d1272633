"""The adapter directories: plain PEFT LoRA, written and read one target at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from loraga_dist.artifacts.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loraga_dist.artifacts.tensors import entries_of, read_chunks
from loraga_dist.files.disk import naming_write_errors
from loraga_dist.files.safetensors_io import Entries, SafetensorsWriter, TensorSlot, read_header
from loraga_dist.model.targets import Target
from loraga_dist.schemes import lora_scaling

if TYPE_CHECKING:
    from peft import LoraConfig


def adapter_keys(name: str) -> tuple[str, str]:
    """The keys of a target's A_RN and B_MR in an adapter file."""
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def magnitude_key(name: str) -> str:
    """The key of a target's magnitudes (M,) in the file of a DoRA adapter."""
    return f"base_model.model.{name}.lora_magnitude_vector"


def saved_key(parameter_name: str) -> str:
    """The key of a parameter that `modules_to_save` copies into an adapter file."""
    return f"base_model.model.{parameter_name}"


def adapter_entries(targets: Iterable[Target], *, use_dora: bool, saved: Entries) -> Entries:
    """The tensors of an adapter file in their order: A, B and DoRA's magnitudes of every target, fp32, and copies.

    saved: dtypes and shapes of the parameters that `modules_to_save` copies, by parameter name.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for target in targets:
        a_key, b_key = adapter_keys(target.name)
        entries[a_key] = (torch.float32, (target.r, target.N))
        entries[b_key] = (torch.float32, (target.M, target.r))
        if use_dora:
            entries[magnitude_key(target.name)] = (torch.float32, (target.M,))
    widest_first = sorted(saved.items(), key=lambda item: -item[1][0].itemsize)
    return entries | {saved_key(name): entry for name, entry in widest_first}


def write_adapter(
    directory: Path,
    peft_config: LoraConfig,
    targets: Sequence[Target],
    factors: Callable[[str], tuple[Tensor, Tensor]],
    *,
    negate_b: bool = False,
    magnitudes: Callable[[Target, Tensor, Tensor], Tensor] | None = None,
    saved: Mapping[str, TensorSlot] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32), asking for one target's factors at a time.

    factors: target name -> (A_RN, B_MR), fp32 or castable without a thought. negate_b: write -B (the offset adapter).
    magnitudes: of a DoRA adapter, (target, A_RN, B_MR as written) -> (M,); without, the adapter is none.
    saved: checkpoint tensors of the parameters that `modules_to_save` copies into the adapter.
    The config is the given one with the target modules spelled out, `inference_mode` and `init_lora_weights` true,
    so that loading takes the stored factors and nothing else. Raises RunError when the files cannot be written.
    """
    copies = {saved_key(name): slot for name, slot in (saved or {}).items()}
    entries = adapter_entries(targets, use_dora=magnitudes is not None, saved=entries_of(saved or {}))
    with SafetensorsWriter(directory / ADAPTER_WEIGHTS, entries) as writer:
        for target in targets:
            A_RN, B_MR = (factor.detach().to("cpu", torch.float32) for factor in factors(target.name))
            assert A_RN.shape == (target.r, target.N) and B_MR.shape == (target.M, target.r), target
            for key, factor in zip(adapter_keys(target.name), (A_RN, -B_MR if negate_b else B_MR), strict=True):
                writer.append(key, factor)
            if magnitudes is not None:
                writer.append(magnitude_key(target.name), magnitudes(target, A_RN, B_MR).float())
        for key in entries:
            if key in copies:
                for chunk in read_chunks(copies[key]):
                    writer.append(key, chunk)

    with naming_write_errors(directory / ADAPTER_CONFIG):
        stored_config(peft_config, targets, use_dora=magnitudes is not None).save_pretrained(str(directory))


def stored_config(peft_config: LoraConfig, targets: Sequence[Target], *, use_dora: bool) -> LoraConfig:
    """What `write_adapter` writes as `adapter_config.json`."""
    config = copy.copy(peft_config)
    config.use_dora = use_dora
    config.target_modules = sorted(target.name for target in targets)
    config.fan_in_fan_out = any(target.transposed for target in targets)
    config.inference_mode = True
    config.init_lora_weights = True
    for key, value in vars(config).items():
        if isinstance(value, set):  # PEFT would write them in the order of their hashes, new in each process
            setattr(config, key, sorted(value))
    return config


class FactorSource(Protocol):
    """What gives A_RN and B_MR of a target, one target at a time."""

    def factors(self, name: str) -> tuple[Tensor, Tensor]: ...


class AdapterFile:
    """The factors of an adapter directory as stored, read when asked for. Raises BrokenFileError if not whole."""

    def __init__(self, directory: Path) -> None:
        self.slots: dict[str, TensorSlot] = read_header(directory / ADAPTER_WEIGHTS)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A_RN and B_MR of one target; raises RunError on a short read."""
        a_key, b_key = adapter_keys(name)
        return self.slots[a_key].read(), self.slots[b_key].read()

    def magnitude(self, name: str) -> Tensor:
        """The magnitudes (M,) of one target of a DoRA adapter; raises RunError on a short read."""
        return self.slots[magnitude_key(name)].read()


def rank_and_scaling(config: LoraConfig, name: str) -> tuple[int, float, float]:
    """(r, lora_alpha, scaling) that PEFT gives the module of that name when it loads an adapter of this config."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    lora_alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return r, lora_alpha, lora_scaling(lora_alpha, r, config.use_rslora)
