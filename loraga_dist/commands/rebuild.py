"""Another rank, split, scale or scheme from the factors of a finished output: no gradient is taken, no model loaded."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile
from loraga_dist.artifacts.names import FACTORS, FACTORS_STEM, LORAGA_INIT, REPORT, RESIDUAL_BASE, RESOLVED_CONFIG
from loraga_dist.artifacts.reading import Report, open_base, read_report, targets_under
from loraga_dist.artifacts.report import finite, versions
from loraga_dist.artifacts.residual import CHUNK_ELEMENTS, chunks, num_residual_bytes, write_model, writes_residual
from loraga_dist.artifacts.warnings import find_warnings
from loraga_dist.config import InitConfig, OutputConfig, load_config
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checksums import fingerprint
from loraga_dist.files.safetensors_io import TensorSlot, read_range, read_rows, scan_checkpoint
from loraga_dist.files.staging import free_place, whole_directory
from loraga_dist.linalg import TruncatedSVD, numerical_rank
from loraga_dist.model.base import DTYPES, factor_dtype
from loraga_dist.model.rank_budget import planned_targets, spend, spent_budget
from loraga_dist.model.targets import Target, check_patterns, peft_lora_config, require_targets
from loraga_dist.ranks.progress import phase
from loraga_dist.ranks.world import World
from loraga_dist.run.writing import finish_directory, write_adapters
from loraga_dist.schemes import SCHEMES
from loraga_dist.start.factors import make_factors, needs_weight, product_norm

_CHANGEABLE = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout"}
"""Keys of the section `lora` that the gradients do not depend on; all of `init` and `output` are such too."""


_OF_INIT_ALONE = {"report_to": "none", "push_to_hub": "null", "push_residual_base": "false"}
"""Keys of the section `output`, and the words for nothing of them."""


@dataclass(frozen=True, kw_only=True)
class _Rebuild:
    """A new start from old factors: makes A0, B0 of one target at a time and notes what the report says of it."""

    config: InitConfig
    old: Mapping[str, Any]
    """The report of the output that the factors come from."""
    targets: dict[str, Target]
    slots: dict[str, TensorSlot]
    """Of `factors/`."""
    index: dict[str, TensorSlot]
    """Of the base's checkpoint."""
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.old["identity_check"]["dtype"]]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        target, scheme = self.targets[name], SCHEMES[self.config.init.scheme]
        weight = self.index[target.weight_key]
        U, S, Vh = (self.slots[f"{name}.{part}"] for part in ("U", "S", "Vh"))
        svd = TruncatedSVD(
            U_MK=read_rows(U, 0, U.shape[0]), S_K=read_rows(S, 0, S.shape[0]), Vh_KN=read_rows(Vh, 0, Vh.shape[0])
        )
        W = None
        if needs_weight(self.config.init):
            W = read_rows(weight, 0, weight.shape[0]).to(self.compute_dtype)
        dtype = factor_dtype(self.compute_dtype, weight.dtype, self.config.output.residual_dtype)
        made = make_factors(target, self.config.init, dtype, svd=svd, weight=W)
        before = self.old["targets"][name]
        singular_values = svd.S_K[: scheme.num_triplets(target.r)].tolist()
        more_energy = _energy(singular_values) / _energy(before["singular_values"])
        self.reports[name] = before | {
            "r": target.r,
            "lora_alpha": target.lora_alpha,
            "scaling": target.scaling,
            "singular_values": singular_values,
            "num_converged": _num_converged(before),
            "numerical_rank": numerical_rank(svd.S_K, target.M, target.N),
            "captured_energy": min(1.0, before["captured_energy"] * more_energy),
            "offset_ratio": target.scaling * product_norm(made) / max(_norm(weight), 1e-30),
        }
        return made.A_RN, made.B_MR


def refactor(
    source: Path,
    to: Path,
    overrides: Sequence[str] = (),
    *,
    base: Path | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> tuple[dict[str, Any], str]:
    """Write the output directory `to` from `factors/` of the output directory `source`, under other settings.

    overrides: `--section.key value` over the source's configuration; keys that the gradients depend on are refused.
    base: the original model, if it is not where the report says. With no overrides the adapters are the source's, bit
    by bit. Returns the report and what was verified. Raises UserError for settings that the factors do not allow, and
    RunError when writing or the verification fails.
    """
    started = time.monotonic()
    try:
        report = read_report(source)
        _require_gradient(report, source)
        slots = scan_checkpoint(source / FACTORS, FACTORS_STEM)
        old = json.loads((source / REPORT).read_bytes())
    except RunError as error:
        raise UserError("directory", str(source), f"{error}; write the directory of a finished run") from error
    config = _new_config(source, to, overrides, base)
    if SCHEMES[config.init.scheme].source != "gradient":
        problem = f"does not start from the gradients that {source} holds; run loraga-dist init with it"
        raise UserError("init.scheme", config.init.scheme, problem)
    base_dir, index = open_base(report, base)
    destination = free_place(to, "--to", marker=REPORT, overwrite=overwrite, inputs=[source, base_dir])
    targets = planned_targets(targets_under(peft_lora_config(config.lora), report), config.lora, config.init)
    check_patterns(config.lora, targets)
    require_targets(index, targets)
    lora = config.lora
    if config.init.rank_budget is not None:
        singular_values = {target.name: _singular_values(slots, target.name) for target in targets}
        targets, lora = spend(targets, singular_values, lora, config.init)
    _require_triplets(config, targets, slots)

    rebuild = _Rebuild(
        config=config, old=old, targets={target.name: target for target in targets}, slots=slots, index=index
    )
    num_bytes = _num_bytes(config, targets, slots, index)
    with whole_directory(destination, "--to", num_bytes, overwrite=overwrite) as directory:
        saved = {name: index[key] for name, key in report.saved_parameters.items()}
        write_adapters(directory, config, lora, targets, rebuild.factors, saved, index)
        shutil.copytree(source / FACTORS, directory / FACTORS)
        residual_fingerprint = None
        if writes_residual(config):
            num_bytes = num_residual_bytes(index, config.output.residual_dtype)
            with phase("write", num_bytes, "B", shown=show_progress) as progress:
                digests = write_model(
                    base_dir,
                    index,
                    targets,
                    AdapterFile(directory / LORAGA_INIT),
                    directory / RESIDUAL_BASE,
                    config.output.residual_dtype,
                    on_progress=progress.advance,
                )
            residual_fingerprint = fingerprint({key: found for key, (_, found) in digests.items()})
        new = finite(
            {
                **old,
                "config": config.model_dump(),
                "residual_fingerprint": residual_fingerprint,
                "versions": versions(),
                "targets": rebuild.reports,
                "rank_budget": spent_budget(config.init.rank_budget, targets),
                # no model was loaded to compare logits
                "identity_check": old["identity_check"] | {"max_abs_logit_diff": None, "max_abs_logit": None},
                "warnings": find_warnings(
                    config.init,
                    rebuild.reports,
                    stopped_by=old["stopped_by"],
                    refine_passes=old["refine_passes"],
                )
                + _beyond_convergence(rebuild.reports),
                "refactored": {"from": str(source.resolve()), "seconds": time.monotonic() - started},
            }
        )
        verified = finish_directory(directory, config, new, World.alone())
    return new, verified


def _new_config(source: Path, to: Path, overrides: Sequence[str], base: Path | None) -> InitConfig:
    old = load_config(source / RESOLVED_CONFIG)
    # what was for init alone was done by it
    of_init = [word for key, value in _OF_INIT_ALONE.items() for word in (f"--output.{key}", value)]
    new = load_config(source / RESOLVED_CONFIG, [*of_init, *overrides, "--output.dir", str(to.resolve())])
    changed = {
        f"{section}.{key}": value
        for section in ("model", "calibration", "gradient", "lora")
        for key, value in getattr(new, section)
        if value != getattr(getattr(old, section), key) and not (section == "lora" and key in _CHANGEABLE)
    }
    for key in _OF_INIT_ALONE:
        if getattr(new.output, key) != OutputConfig.model_fields[key].default:
            problem = "is for loraga-dist init alone; upload the directory with `hf upload`, or leave this out"
            raise UserError(f"output.{key}", getattr(new.output, key), problem)
    if new.deepspeed != old.deepspeed:
        changed["deepspeed"] = new.deepspeed
    if changed:
        key, value = next(iter(changed.items()))
        raise UserError(key, value, f"is settled by the gradients of {source}; run loraga-dist init with it")
    if base is not None:
        model = new.model.model_copy(update={"name_or_path": str(base.resolve()), "revision": None})
        new = new.model_copy(update={"model": model})
    # what is written says what was done: nothing is pushed or tracked
    output = OutputConfig.model_validate(new.output.model_dump(exclude=set(_OF_INIT_ALONE)))
    return new.model_copy(update={"output": output})


def _require_gradient(report: Report, source: Path) -> None:
    if report.scheme.source != "gradient":
        problem = f"was made by {report.config.init.scheme} and holds no gradients; run loraga-dist init"
        raise UserError("directory", str(source), problem)


def _singular_values(slots: Mapping[str, TensorSlot], name: str) -> list[float]:
    slot = slots[f"{name}.S"]
    return read_rows(slot, 0, slot.shape[0]).tolist()


def _require_triplets(config: InitConfig, targets: Sequence[Target], slots: Mapping[str, TensorSlot]) -> None:
    num_triplets = SCHEMES[config.init.scheme].num_triplets
    held = {target.name: slots[f"{target.name}.S"].shape[0] for target in targets}
    largest = {name: max(r for r in range(K + 1) if num_triplets(r) <= K) for name, K in held.items()}
    for target in targets:
        if target.r > largest[target.name]:
            by_default = target.r == config.lora.r
            fitting = min(largest.values()) if by_default else largest[target.name]
            raise UserError(
                "lora.r" if by_default else "lora.rank_pattern",
                target.r,
                f"needs {num_triplets(target.r)} singular directions and factors/ holds {held[target.name]} of "
                f"{target.name}; write {fitting} or less, or run loraga-dist init",
            )


def _num_converged(report: Mapping[str, Any]) -> int:
    """Leading triplets that calibration was asked for; the rest of `factors/` is a by-product."""
    return report.get("num_converged", len(report["singular_values"]))


def _beyond_convergence(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    beyond = [name for name, report in reports.items() if len(report["singular_values"]) > _num_converged(report)]
    if not beyond:
        return []
    return [
        f"more singular directions than calibration was asked for in {len(beyond)} targets ({beyond[0]}, ...): the "
        "last of them are less accurate; run loraga-dist init with this lora.r where that matters"
    ]


def _energy(singular_values: Sequence[float]) -> float:
    return math.fsum(value**2 for value in singular_values)


def _norm(slot: TensorSlot) -> float:
    """||W||_F, in chunks."""
    squares = (read_range(slot, *ends).double().square().sum().item() for ends in chunks(slot.numel, CHUNK_ELEMENTS))
    return math.fsum(squares) ** 0.5


def _num_bytes(
    config: InitConfig,
    targets: Sequence[Target],
    slots: Mapping[str, TensorSlot],
    index: Mapping[str, TensorSlot],
) -> int:
    each = sum(4 * target.r * (target.M + target.N) for target in targets)
    adapters = 2 * each if SCHEMES[config.init.scheme].changes_base else each
    residual = num_residual_bytes(index, config.output.residual_dtype) if writes_residual(config) else 0
    return adapters + sum(slot.num_bytes for slot in slots.values()) + residual
