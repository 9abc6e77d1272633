"""Does an output directory hold what its report says? Answered from the files alone, in bounded memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from loraga_dist.artifacts.adapter import AdapterFile, adapter_keys, magnitude_key, saved_key
from loraga_dist.artifacts.compare import Comparison, OpenedOutput, compare, merge, same_bytes
from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import FACTORS, FACTORS_STEM, LORAGA_INIT, LORAGA_OFFSET, REPORT, RESIDUAL_BASE
from loraga_dist.artifacts.reading import load_adapter, open_base
from loraga_dist.artifacts.report import Report, read_report_text
from loraga_dist.artifacts.residual import start_magnitudes
from loraga_dist.artifacts.tensors import read_chunks
from loraga_dist.errors import LoragaError, RunError
from loraga_dist.files.checksums import OnBytes, check_checksums, fingerprint, no_progress
from loraga_dist.files.safetensors_io import scan_checkpoint
from loraga_dist.model.targets import Target, require_targets
from loraga_dist.ranks.world import World

_MAX_ORTHONORMALITY_ERROR = 1e-4
_MAX_MAGNITUDE_ERROR = 2**-23  # one rounding to float32, and float64 sums in another order


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found."""

    problems: list[str]
    """One line each, starting with the file or directory."""
    num_targets: int
    max_rounding_units: float
    """Largest |W - (W_res + s B A)|, where one rounding of W_res to its dtype may cost 1; 0 if not checked."""
    residual_checked: bool
    """Whether every target of the residual base was held against the base."""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    directory: Path, *, base: Path | None = None, world: World | None = None, on_progress: OnBytes = no_progress
) -> VerifyResult:
    """Check an output directory against its report, its checksums, PEFT's loader and the base model.

    base: the original model's directory; by default the one the report names. world: ranks that share the work, a
    collective then; each gets the whole result. on_progress: told of bytes read; all the files once for their
    checksums, then the base's weights once. Never raises for what the files hold.
    """
    world = world or World.alone()
    report, problems = _open_report(directory, world)
    if report is None:
        return VerifyResult(problems, 0, 0.0, residual_checked=False)
    layout = Layout.of_report(report)
    # where the report says none, materialize-base may have made it since
    has_residual = RESIDUAL_BASE in layout.directories or (
        report.scheme.changes_base and world.all_json((directory / RESIDUAL_BASE).exists())[0]
    )
    problems += check_checksums(directory, world, on_progress)
    output: OpenedOutput | None = None
    compared: Comparison | None = None
    with world.together():
        if world.is_main:
            problems += [f"{name}: is missing" for name in layout.missing_files(directory)]
        opened_adapter = None
        with _collected(problems, LORAGA_INIT):
            opened_adapter = load_adapter(directory / LORAGA_INIT, report)
        if opened_adapter and world.is_main:
            problems += _check_finite(*opened_adapter) + _check_budget(report)
            if LORAGA_OFFSET in layout.directories:
                with _collected(problems, LORAGA_OFFSET):
                    offset = load_adapter(directory / LORAGA_OFFSET, report, use_dora=False)
                    problems += _check_offset(*opened_adapter, *offset)
        if FACTORS in layout.directories:
            with _collected(problems, FACTORS):
                problems += _check_factors(directory, layout, world)
        with _collected(problems, "base"):
            base_dir, index = open_base(report, base)
            if opened_adapter:
                adapter, targets = opened_adapter
                output = OpenedOutput(report=report, adapter=adapter, targets=targets, base_dir=base_dir, base=index)
        if output and world.is_main:
            with _collected(problems, LORAGA_INIT):
                problems += _check_saved(output)
        with _collected(problems, RESIDUAL_BASE):
            if output:
                found, compared = compare(
                    output, directory / RESIDUAL_BASE if has_residual else None, world, on_progress
                )
                problems += found
        with _collected(problems, LORAGA_INIT):
            if compared and output and report.is_dora:
                compared.problems += _check_magnitudes(output, world)
    problems, whole = merge(problems, compared, world)
    max_units = None
    if whole is not None and output is not None:
        is_base = fingerprint(whole.base_digests) == report.base_fingerprint
        problems += whole.conclude(report, output.base_dir)
        max_units = whole.max_units if is_base and has_residual else None
    return VerifyResult(
        list(dict.fromkeys(problems)), len(report.targets), max_units or 0.0, residual_checked=max_units is not None
    )


def bytes_to_verify(directory: Path) -> int:
    """About how many bytes `verify` reads: every file, and a base as large as the residual."""
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    return sum(sizes.values()) + sum(size for path, size in sizes.items() if path.parent.name == RESIDUAL_BASE)


def _open_report(directory: Path, world: World) -> tuple[Report | None, list[str]]:
    """Rank 0's report, on every rank, or what is wrong with it, and which ranks see another one; a collective."""
    text, problem = "", ""
    try:
        text = read_report_text(directory)
    except RunError as error:
        problem = str(error)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (text, problem, expected), *others = world.all_json((text, problem, digest) if world.is_main else ("", "", digest))
    if problem:
        return None, [problem]
    differing = [rank for rank, (_, _, digest) in enumerate(others, start=1) if digest != expected]
    problems = [f"{REPORT}: ranks {differing} see another one than rank 0"] if differing else []
    try:
        return Report.parse(text), problems
    except RunError as error:
        return None, [*problems, str(error)]


@contextmanager
def _collected(problems: list[str], subject: str) -> Iterator[None]:
    """Turn a part that cannot be read into a problem, so that the other parts are still checked."""
    try:
        yield
    except LoragaError as error:
        problems.append(f"{subject}: {error}")


def _check_finite(adapter: AdapterFile, targets: list[Target]) -> list[str]:
    return [
        f"{LORAGA_INIT}: {key} has values that are not finite"
        for target in targets
        for key, factor in zip(adapter_keys(target.name), adapter.factors(target.name), strict=True)
        if not factor.isfinite().all()
    ]


def _check_budget(report: Report) -> list[str]:
    """The ranks take what the report says they do, and no more than they may."""
    budget, taken = report.rank_budget, sum(target.r * sum(target.shape) for target in report.targets.values())
    if budget is None or budget.spent == taken <= budget.parameters:
        return []
    return [f"{REPORT}: ranks take {taken} parameters, rank_budget says {budget.spent} of {budget.parameters}"]


def _check_magnitudes(output: OpenedOutput, world: World) -> list[str]:
    """This rank's share of the targets: with DoRA's magnitudes, too, the start is that of the plain adapter."""
    require_targets(output.base, output.targets)
    problems = []
    for target in output.targets[world.rank :: world.size]:
        weight, stored_M = output.base[target.weight_key], output.adapter.magnitude(target.name).double()
        factors = output.adapter.factors(target.name)
        expected_M = start_magnitudes(weight, target, *factors, changes_base=output.report.scheme.changes_base)
        error = ((stored_M - expected_M).abs() / expected_M).max().item()
        if not error <= _MAX_MAGNITUDE_ERROR:  # NaN must fail too
            key = magnitude_key(target.name)
            problems.append(f"{LORAGA_INIT}: {key} is off by {error:.1e} from the norms of {target.weight_key}")
    return problems


def _check_saved(output: OpenedOutput) -> list[str]:
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


def _check_offset(
    init: AdapterFile, init_targets: list[Target], offset: AdapterFile, offset_targets: list[Target]
) -> list[str]:
    """The offset adapter is (A, -B) of the init adapter, bit by bit, under the same scaling."""
    problems = []
    for target, offset_target in zip(init_targets, offset_targets, strict=True):
        if target != offset_target:
            problems.append(f"{LORAGA_OFFSET}: {target.name} is scaled otherwise than in {LORAGA_INIT}")
        A_RN, B_MR = init.factors(target.name)
        stored = offset.factors(target.name)
        for key, factor, other in zip(adapter_keys(target.name), (A_RN, -B_MR), stored, strict=True):
            if not same_bytes(factor, other):
                problems.append(f"{LORAGA_OFFSET}: {key} is not (A, -B) of {LORAGA_INIT}")
    return problems


def _check_factors(directory: Path, layout: Layout, world: World) -> list[str]:
    """This rank's share of the targets' triplets: layout, order, orthonormality."""
    slots = scan_checkpoint(directory / FACTORS, FACTORS_STEM)
    if differing := slots.keys() ^ layout.factors.keys():
        return [f"{FACTORS}: {key} is missing or not of a target" for key in sorted(differing)]
    problems = []
    for target in layout.targets[world.rank :: world.size]:
        name, M, N = target.name, target.M, target.N
        U, S, Vh = (slots[f"{name}.{part}"] for part in ("U", "S", "Vh"))
        K = math.prod(S.shape)
        if (U.shape, S.shape, Vh.shape) != ((M, K), (K,), (K, N)) or {U.dtype, S.dtype, Vh.dtype} != {torch.float32}:
            problems.append(f"{FACTORS}: {name} is not U {M} x K, S K, Vh K x {N} in F32")
            continue
        S_K = S.read()
        if not (S_K.isfinite().all() and (S_K >= 0).all() and (S_K.diff() <= 0).all()):
            problems.append(f"{FACTORS}: {S.name} is not finite, nonnegative and descending")
        for slot, columns in ((U, U.read()), (Vh, Vh.read().T)):
            gram_KK = columns.T @ columns
            error = (gram_KK - torch.eye(K)).abs().max().item() if K else 0.0
            if not error <= _MAX_ORTHONORMALITY_ERROR:  # NaN must fail too
                problems.append(f"{FACTORS}: {slot.name} is not orthonormal (off by {error:.1e})")
    return problems
