"""Each part of an output held against its report and against the other parts: one line for whatever differs."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile, adapter_keys, magnitude_key, saved_key, stored_config
from loraga_dist.artifacts.compare import OpenedOutput, same_bytes
from loraga_dist.artifacts.factors import read_triplets, triplet_entries, triplet_tensors
from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FACTORS,
    FACTORS_STEM,
    LORAGA_INIT,
    LORAGA_OFFSET,
    MODEL_STEM,
    PLOTS,
    REPORT,
    REPORT_PAGE,
    RESIDUAL_BASE,
    RESOLVED_CONFIG,
    TENSORBOARD,
)
from loraga_dist.artifacts.reading import adapter_fingerprint, read_lora_config
from loraga_dist.artifacts.report import Report
from loraga_dist.artifacts.residual import start_magnitudes
from loraga_dist.artifacts.tensors import read_chunks
from loraga_dist.config import load_config
from loraga_dist.files.checksums import CHECKSUMS, TensorDigest, sha256_of
from loraga_dist.files.disk import UNFINISHED_MARK
from loraga_dist.files.safetensors_io import TensorSlot, scan_checkpoint
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.model.base import DTYPES, factor_dtype
from loraga_dist.model.factors import make_factors, needs_weight
from loraga_dist.model.targets import Target, require_targets
from loraga_dist.ranks.world import World

_MAX_ORTHONORMALITY_ERROR = 1e-4
_MAX_MAGNITUDE_ERROR = 2**-23  # one rounding to float32, and float64 sums in another order
_OF_RANKS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
"""Keys of an adapter's config that each target's rank and scaling are compared by; a budget changes them."""
_OF_PEFT = {"peft_version", "auto_mapping"}


def check_kinds(directory: Path, layout: Layout) -> list[str]:
    """Everything of ours is a file or a directory. What a link leads to is of another place, and a pipe has no end."""
    problems = []
    for name in sorted({*_known_names(layout), *layout.all_directories}):
        path = directory / name
        for found in (path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())):
            shown = found.relative_to(directory).as_posix()
            if found.is_symlink():
                problems.append(f"{shown}: is a symbolic link, which is not followed")
            elif found.exists() and not (found.is_dir() or stat.S_ISREG(os.lstat(found).st_mode)):
                problems.append(f"{shown}: is neither a file nor a directory")
    return problems


def unknown_files(directory: Path, layout: Layout) -> list[str]:
    """What stands in an output directory and is not of an output; below its top, `check_names` looks."""
    known = {*_known_names(layout), *layout.directories, UNFINISHED_MARK}
    known |= {RESIDUAL_BASE} & set(layout.all_directories)
    return [f"{name} is not of this output" for name in sorted(os.listdir(directory)) if name not in known]


def check_names(directory: Path, name: str, report: Report) -> list[str]:
    """One directory of an output holds what it should and nothing that a loader would read beside it."""
    expected = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    if name in (FACTORS, RESIDUAL_BASE):
        stem = FACTORS_STEM if name == FACTORS else MODEL_STEM
        slots = scan_checkpoint(directory / name, stem)
        expected = {f"{stem}.safetensors.index.json", *(slot.path.name for slot in slots.values())}
    if name == RESIDUAL_BASE:
        if not report.model_files:  # an earlier version, which did not say
            return []
        expected |= {*report.model_files, CHECKSUMS}  # of materialize-base
    found = [path.relative_to(directory).as_posix() for path in (directory / name).rglob("*") if not path.is_dir()]
    return [f"{path}: is not of this output" for path in sorted(found) if path.removeprefix(f"{name}/") not in expected]


def _known_names(layout: Layout) -> set[str]:
    at_top = {name for name in layout.files if "/" not in name}
    return {*at_top, REPORT, REPORT_PAGE, PLOTS, TENSORBOARD}


def check_resolved_config(directory: Path, report: Report) -> list[str]:
    """`resolved_config.yaml`, which another run or `rebuild` starts from, is the configuration of the report."""
    config = load_config(directory / RESOLVED_CONFIG)
    # as the report would say it
    as_said = Report.parse(report.model_copy(update={"config": config}).model_dump_json()).config
    if as_said == report.config:
        return []
    theirs, ours = as_said.model_dump(), report.config.model_dump()
    differing = [key for key in ours if theirs[key] != ours[key]]
    return [f"{RESOLVED_CONFIG}: section {differing[0]} is not what {REPORT} says"]


def check_adapter_config(directory: Path, name: str, layout: Layout, report: Report) -> list[str]:
    """`adapter_config.json` is what a run of the report's configuration writes."""
    use_dora = report.is_dora and name == LORAGA_INIT
    expected = stored_config(layout.lora_config(name, report.config.lora), layout.targets, use_dora=use_dora)
    found, wanted = read_lora_config(directory / name).to_dict(), expected.to_dict()
    return [
        f"{name}: {ADAPTER_CONFIG} has {key} {str(found.get(key))[:100]!r}, and by {REPORT} it is {wanted[key]!r}"
        for key in sorted(wanted.keys() - _OF_RANKS - _OF_PEFT)
        if _plain(found.get(key)) != _plain(wanted[key])
    ]


def _plain(value: Any) -> Any:
    """PEFT turns some lists into sets, when it reads them."""
    return sorted(value, key=str) if isinstance(value, set | list | tuple) else value


def check_model_files(directory: Path, report: Report) -> list[str]:
    """config.json, tokenizer and so on stand beside the residual base's weights as the report knows them."""
    problems = []
    for name, digest in report.model_files.items():
        path = directory / RESIDUAL_BASE / name
        if not path.is_file():
            problems.append(f"{RESIDUAL_BASE}/{name}: is missing")
        elif sha256_of(path) != digest:
            problems.append(f"{RESIDUAL_BASE}/{name}: is not what {REPORT} says")
    return problems


def check_adapter_fingerprint(adapter: AdapterFile, report: Report) -> list[str]:
    """The adapter's tensors are those of the run that wrote the report."""
    if report.adapter_fingerprint in (None, adapter_fingerprint(adapter)):
        return []
    return [f"{LORAGA_INIT}: its fingerprint is not the report's adapter_fingerprint"]


def check_finite(adapter: AdapterFile, targets: list[Target]) -> list[str]:
    return [
        f"{LORAGA_INIT}: {key} has values that are not finite"
        for target in targets
        for key, factor in zip(adapter_keys(target.layer), adapter.factors(target), strict=True)
        if not factor.isfinite().all()
    ]


def check_budget(report: Report) -> list[str]:
    """The ranks take what the report says they do, and no more than they may."""
    budget, taken = report.rank_budget, sum(target.r * sum(target.shape) for target in report.targets.values())
    if budget is None or budget.spent == taken <= budget.parameters:
        return []
    return [f"{REPORT}: ranks take {taken} parameters, rank_budget says {budget.spent} of {budget.parameters}"]


def check_magnitudes(output: OpenedOutput, world: World) -> list[str]:
    """This rank's share of the targets: with DoRA's magnitudes, too, the start is that of the plain adapter."""
    require_targets(output.base, output.targets)
    problems = []
    for target in output.targets[world.rank :: world.size]:
        stored_M = output.adapter.magnitude(target.name).double()
        added = None if output.report.scheme.changes_base else output.adapter.factors(target)
        expected_M = start_magnitudes(output.base, target, added)
        error = ((stored_M - expected_M).abs() / expected_M).max().item()
        if not error <= _MAX_MAGNITUDE_ERROR:  # NaN must fail too
            key = magnitude_key(target.name)
            problems.append(f"{LORAGA_INIT}: {key} is off by {error:.1e} from the norms of {target.weight_key}")
    return problems


def check_saved(output: OpenedOutput) -> list[str]:
    problems = []
    for name, weight_key in output.report.saved_parameters.items():
        slot, base = output.adapter.slots[saved_key(name)], output.base.get(weight_key)
        same = (
            base is not None
            and (slot.dtype, slot.shape) == (base.dtype, base.shape)
            and all(same_bytes(*pieces) for pieces in zip(read_chunks(slot), read_chunks(base), strict=True))
        )
        if not same:
            problems.append(f"{LORAGA_INIT}: {saved_key(name)} is not the base's {weight_key}")
    return problems


def check_offset(
    init: AdapterFile, init_targets: list[Target], offset: AdapterFile, offset_targets: list[Target]
) -> list[str]:
    """The offset adapter is (A, -B) of the init adapter, bit by bit, under the same scaling."""
    problems = []
    for target, offset_target in zip(init_targets, offset_targets, strict=True):
        if target != offset_target:
            problems.append(f"{LORAGA_OFFSET}: {target.name} is scaled otherwise than in {LORAGA_INIT}")
        A_RN, B_MR = init.factors(target)
        stored = offset.factors(offset_target)
        for key, factor, other in zip(adapter_keys(target.layer), (A_RN, -B_MR), stored, strict=True):
            if not same_bytes(factor, other):
                problems.append(f"{LORAGA_OFFSET}: {key} is not (A, -B) of {LORAGA_INIT}")
    return problems


def check_factors(
    directory: Path, layout: Layout, report: Report, output: OpenedOutput | None, world: World
) -> tuple[list[str], dict[str, TensorDigest]]:
    """This rank's share of the targets' triplets, and their digests: layout, order, orthonormality, and that A0 and B0
    are made of them. output: None where adapter or base could not be opened."""
    slots = scan_checkpoint(directory / FACTORS, FACTORS_STEM)
    if differing := slots.keys() ^ layout.factors.keys():
        return [f"{FACTORS}: {key} is missing or not of a target" for key in sorted(differing)], {}
    problems: list[str] = []
    digests: dict[str, TensorDigest] = {}
    targets = layout.targets if output is None else output.targets
    for target in targets[world.rank :: world.size]:
        found = _read_triplets(target, slots)
        if isinstance(found, str):
            problems.append(found)
            continue
        digests |= {key: TensorDigest.of(tensor) for key, tensor in triplet_tensors(target.name, found).items()}
        wrong = _check_triplets(target, found, report)
        if not wrong and output is not None:
            wrong = _check_made_of(target, found, output)
        problems += wrong
    return problems, digests


def _read_triplets(target: Target, slots: Mapping[str, TensorSlot]) -> TruncatedSVD | str:
    """The triplets of one target, or why they are none."""
    name, M, N = target.name, target.M, target.N
    expected = triplet_entries(name, M, slots[f"{name}.S"].numel, N)
    if any((slots[key].dtype, slots[key].shape) != entry for key, entry in expected.items()):
        return f"{FACTORS}: {name} is not U {M} x K, S K, Vh K x {N} in F32"
    return read_triplets(name, slots)


def _check_triplets(target: Target, svd: TruncatedSVD, report: Report) -> list[str]:
    problems = []
    name, S_K, K = target.name, svd.S_K, svd.width
    if not (S_K.isfinite().all() and (S_K >= 0).all() and (S_K.diff() <= 0).all()):
        problems.append(f"{FACTORS}: {name}.S is not finite, nonnegative and descending")
    orthonormal = [("U", svd.U_MK)]
    if not report.scheme.whitens:
        orthonormal.append(("Vh", svd.Vh_KN.T))
    elif not svd.Vh_KN.isfinite().all():  # orthonormal for white inputs, which files know nothing of
        problems.append(f"{FACTORS}: {name}.Vh is not finite")
    for part, columns in orthonormal:
        gram_KK = columns.T @ columns
        error = (gram_KK - torch.eye(K)).abs().max().item() if K else 0.0
        if not error <= _MAX_ORTHONORMALITY_ERROR:  # NaN must fail too
            problems.append(f"{FACTORS}: {name}.{part} is not orthonormal (off by {error:.1e})")
    said = report.targets[name].singular_values
    if not problems and said is not None and S_K[: len(said)].tolist() != said:
        problems.append(f"{FACTORS}: {name}.S is not what {REPORT} says")
    return problems


def _check_made_of(target: Target, svd: TruncatedSVD, output: OpenedOutput) -> list[str]:
    """A0 and B0 are what the scheme makes of these triplets, to rounding."""
    report, init = output.report, output.report.config.init
    if report.identity_check is None:
        return []
    if report.scheme.num_triplets(target.r) > svd.width:
        return [f"{FACTORS}: {target.name} has {svd.width} triplets, too few for rank {target.r}"]
    compute, weight = DTYPES[report.identity_check.dtype], output.base.get(target.weight_key)
    # a quantized one may have another name
    dtype = factor_dtype(compute, weight, report.config.output.residual_dtype)
    # one that depends on the weight's own spectrum multiplies all of A and B by one number
    scaled = needs_weight(init)
    made = make_factors(
        target, init.model_copy(update={"scale": "unit"}) if scaled else init, torch.float32, svd=svd, weight=None
    )
    problems = []
    keys, stored = adapter_keys(target.layer), output.adapter.factors(target)
    for key, *both in zip(keys, stored, (made.A_RN, made.B_MR), strict=True):
        found, expected = (factor.double() for factor in both)
        if scaled:
            expected *= (found * expected).sum() / expected.square().sum().clamp_min(1e-30)
        if not _rounds_to(expected, found, dtype):
            problems.append(f"{LORAGA_INIT}: {key} is not made of {FACTORS}")
    return problems


def _rounds_to(exact: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element is a neighbour in `dtype`, and what is zero is zero; both in float64."""
    info = torch.finfo(dtype)
    return bool(((found - exact).abs() <= 2 * info.eps * exact.abs() + info.smallest_normal * (exact != 0)).all())
