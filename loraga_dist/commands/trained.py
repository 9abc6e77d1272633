"""What training made of `loraga_init`: the update of every weight of the original model, from two adapter files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile, adapter_entries, adapter_keys, magnitude_key, saved_key
from loraga_dist.artifacts.names import ADAPTER_WEIGHTS, LORAGA_INIT, REPORT, RESIDUAL_BASE
from loraga_dist.artifacts.reading import keys_passed_over, load_start, read_lora_config, targets_under
from loraga_dist.artifacts.report import Report
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.disk import BrokenFileError
from loraga_dist.files.safetensors_io import Entries, TensorSlot, dtype_name
from loraga_dist.model.targets import Target

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."
_PICKLES = ("adapter_model.bin", "pytorch_model.bin")
_NOT_WHOLE = ("lora_", "trainable_tokens_", ".base_layer.")
"""Parts of keys that are no whole parameter which training replaced."""
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Update:
    """B A = s_t B_t A_t - s_0 B_0 A_0 per target, or s_t B_t A_t where the scheme left the base unchanged, and the
    parameters that were trained whole."""

    report: Report
    targets: dict[str, Target]
    """As trained."""
    saved: dict[str, TensorSlot]
    """Trained copies of whole parameters (`modules_to_save`, resized embeddings) by parameter name."""
    task_type: str | None
    modules_to_save: list[str] | None
    warnings: list[str]
    trained: AdapterFile
    init: AdapterFile
    init_targets: dict[str, Target]

    def factors(self, target: Target) -> tuple[Tensor, Tensor]:
        """[A_t; A_0] (2r, N) and [s_t B_t, -s_0 B_0] (M, 2r) in float64, whose product B A is the update; on an
        unchanged base A_t (r, N) and s_t B_t (M, r)."""
        name = target.name
        A_RN, B_MR = (factor.double() for factor in self.trained.factors(self.targets[name]))
        if not self.report.scheme.changes_base:
            return A_RN, self.targets[name].scaling * B_MR
        A0_RN, B0_MR = (factor.double() for factor in self.init.factors(self.init_targets[name]))
        scaling, scaling0 = self.targets[name].scaling, self.init_targets[name].scaling
        return torch.cat([A_RN, A0_RN]), torch.cat([scaling * B_MR, -scaling0 * B0_MR], dim=1)

    @property
    def full_rank(self) -> int:
        """The smallest rank that holds every target's update."""
        return max(self.rank_of(name) for name in self.targets)

    def rank_of(self, name: str) -> int:
        """Columns that `factors` gives."""
        return self.targets[name].r * (2 if self.report.scheme.changes_base else 1)


def open_update(init: Path, trained: Path) -> Update:
    """Read and check both adapters; raises UserError, naming `--init` or `--trained`, for what does not fit together.

    init: `loraga_init` in its output directory, whose report says what the adapter belongs to.
    trained: a directory with the adapter that a trainer saved. Keys may carry the adapter's name, as in a plain state
    dict; any floating dtype.
    """
    report, init_adapter, init_targets = _open_init(init)
    refuse = partial(UserError, "--trained", str(trained))
    if not (trained / ADAPTER_WEIGHTS).is_file():
        raise refuse(_nothing_trained(trained))
    try:
        config, adapter = read_lora_config(trained), _TrainedFile(trained)
        targets = targets_under(config, report)
    except RunError as error:
        raise refuse(f"{error}; write an adapter trained from {init}") from error
    if config.use_dora != report.is_dora:
        raise refuse(f"has use_dora {config.use_dora} and {init} has {report.is_dora}; train {init} as it is")
    for key in ("lora_bias", "alora_invocation_tokens", "layer_replication"):
        if getattr(config, key, None):
            raise refuse(f"has {key}, which a plain LoRA cannot hold; train without it")
    if config.bias != "none":
        raise refuse(f"has bias {config.bias!r}; train with bias 'none'")
    expected = adapter_entries(targets, use_dora=report.is_dora, saved={})
    if problem := _problem_of_tensors(init, adapter, expected, targets, report):
        raise refuse(problem)
    if problem := _problem_of_values(adapter, init_adapter, targets, report.is_dora):
        raise refuse(problem)
    return Update(
        report=report,
        targets={target.name: target for target in targets},
        saved={key.removeprefix(_PREFIX): slot for key, slot in sorted(adapter.slots.items()) if key not in expected},
        task_type=config.task_type,
        modules_to_save=sorted(config.modules_to_save) if config.modules_to_save else None,
        warnings=_find_warnings(trained, config, init, [adapter.slots[key] for key in expected], report),
        trained=adapter,
        init=init_adapter,
        init_targets={target.name: target for target in init_targets},
    )


class _TrainedFile(AdapterFile):
    """The file of a trainer, under the keys PEFT itself would write. Raises BrokenFileError."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        plain: dict[str, TensorSlot] = {}
        for key, slot in self.slots.items():
            if ".original_module." in key:  # the untrained copy beside one of modules_to_save
                continue
            name = re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", key)
            name = re.sub(r"\.lora_magnitude_vector\..+$", ".lora_magnitude_vector", name)
            name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
            if name in plain:
                raise BrokenFileError(f"{ADAPTER_WEIGHTS} holds several adapters ({plain[name].name}, {key})")
            plain[name] = slot
        # PEFT saves the base's own weight and bias of an output head that is a target
        layers = [name.removesuffix(".lora_A.weight") for name in plain if name.endswith(".lora_A.weight")]
        frozen = {f"{layer}.base_layer.{parameter}" for layer in layers for parameter in ("weight", "bias")}
        self.slots = {name: slot for name, slot in plain.items() if name not in frozen}


def _open_init(init: Path) -> tuple[Report, AdapterFile, list[Target]]:
    output = init.resolve().parent
    if not (output / REPORT).is_file():
        instead = init / LORAGA_INIT if (init / REPORT).is_file() else f"the {LORAGA_INIT} of an output directory"
        raise UserError("--init", str(init), f"has no {REPORT} beside it; write {instead}")
    try:
        report = Report.read(output)
        return report, *load_start(init, report)
    except RunError as error:
        raise UserError("--init", str(init), f"{error}; write the {LORAGA_INIT} of a verified output") from error


def _nothing_trained(directory: Path) -> str:
    if not directory.is_dir():
        return "is no directory; write the one the trainer saved the adapter to"
    if checkpoints := sorted(path.parent.name for path in directory.glob(f"*/{ADAPTER_WEIGHTS}")):
        return f"holds no {ADAPTER_WEIGHTS}, its subdirectories do; write one of {', '.join(checkpoints)}"
    if pickle := next((name for name in _PICKLES if (directory / name).is_file()), None):
        return f"holds a pickle only ({pickle}), which is never loaded; save with safe_serialization=True"
    return f"holds no {ADAPTER_WEIGHTS}; write the directory the trainer saved the adapter to"


def _problem_of_tensors(
    init: Path, adapter: AdapterFile, expected: Entries, targets: list[Target], report: Report
) -> str | None:
    """What keeps the trained file from being one of these targets. expected: its LoRA tensors."""
    for key, slot in adapter.slots.items():
        if not slot.numel:
            return (
                f"{key} is empty, shape {slot.shape}: ZeRO-3 shards were saved ungathered; save again with "
                "stage3_gather_16bit_weights_on_model_save true in the DeepSpeed config"
            )
        if not slot.dtype.is_floating_point or slot.dtype.itemsize == 1:
            return f"{key} is stored as {dtype_name(slot.dtype)}; save the adapter unquantized"
        if key not in expected and (not key.startswith(_PREFIX) or any(part in key for part in _NOT_WHOLE)):
            return f"{key} is of no target of {init}; write an adapter trained from there, as plain LoRA"
    for target in targets:
        r = report.targets[target.name].r
        if target.r != r:
            return f"{target.name} has rank {target.r} and {init} has {r}; write an adapter trained from there"
    for key, (_, shape) in expected.items():
        found = adapter.slots.get(key)
        if found is None or found.shape != shape:
            problem = "is missing" if found is None else f"has shape {found.shape} and {init} has {shape}"
            return f"{key} {problem}; write an adapter trained from there"
    for name in report.saved_parameters:
        if saved_key(name) not in adapter.slots:
            return f"{saved_key(name)} is missing, which modules_to_save trains; save the adapter with PEFT"
    return None


def _problem_of_values(adapter: AdapterFile, init: AdapterFile, targets: list[Target], is_dora: bool) -> str | None:
    changed = False
    for target in targets:
        keys, values, starts = [*adapter_keys(target.layer)], adapter.factors(target), init.factors(target)
        if is_dora:
            keys.append(magnitude_key(target.name))
            values, starts = (*values, adapter.magnitude(target.name)), (*starts, init.magnitude(target.name))
        for key, factor, start in zip(keys, values, starts, strict=True):
            if not factor.isfinite().all():
                return f"{key} has values that are not finite; write an earlier checkpoint"
            changed = changed or not torch.equal(factor, start.to(factor.dtype))
    if changed:
        return None
    return "is the start itself, nothing was trained; load loraga_init with is_trainable=True and train"


def _find_warnings(
    trained: Path, config: LoraConfig, init: Path, factors: Iterable[TensorSlot], report: Report
) -> list[str]:
    lines, trained_on = [], config.base_model_name_or_path
    if unknown := keys_passed_over(trained, config):
        lines.append(f"the trained adapter's config has {', '.join(unknown)}, which this version of PEFT passes over")
    if report.scheme.changes_base and trained_on:
        belongs_on = [str(init.resolve().with_name(RESIDUAL_BASE)), read_lora_config(init).base_model_name_or_path]
        if _same_place(trained_on, report.config.model.name_or_path):
            lines.append(
                f"the trained adapter names the original base {trained_on}; if it was not trained on residual_base, or "
                "with loraga_offset merged in, the result is wrong"
            )
        elif not any(place and _same_place(trained_on, place) for place in belongs_on):
            lines.append(
                f"the trained adapter names the base {trained_on}, and {init} belongs on {belongs_on[0]}; if it was "
                "trained from another start, the result is wrong"
            )
    coarse = sorted({dtype_name(slot.dtype) for slot in factors if slot.dtype in _SIXTEEN_BITS})
    if coarse:
        lines.append(
            f"the trained adapter is stored in {', '.join(coarse)}, whose rounding is large against a small update; "
            "save it in float32 to keep all of it"
        )
    return lines


def _same_place(left: str, right: str) -> bool:
    return left == right or Path(left).expanduser().resolve() == Path(right).expanduser().resolve()
