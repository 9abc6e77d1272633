"""Does an output directory hold what its report says? Answered from the files alone, in bounded memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile, AdapterTarget, adapter_keys, saved_key
from loraga_dist.artifacts.manifest import OnBytes, TensorDigest, check_checksums, fingerprint, no_progress
from loraga_dist.artifacts.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHECKSUMS,
    FACTORS,
    FACTORS_INDEX,
    FACTORS_STEM,
    LORAGA_INIT,
    LORAGA_OFFSET,
    MODEL_CONFIG,
    README,
    RESIDUAL_BASE,
    RESOLVED_CONFIG,
)
from loraga_dist.artifacts.parallel import over_cores
from loraga_dist.artifacts.reading import Report, load_adapter, open_base, read_report
from loraga_dist.artifacts.residual import (
    CHUNK_ELEMENTS,
    chunks,
    digest_base,
    residual_dtype_of,
    rows_per_chunk,
    subtract_offset,
)
from loraga_dist.errors import LoragaError, RunError
from loraga_dist.safetensors_files import (
    TensorSlot,
    as_bytes,
    dtype_name,
    read_range,
    read_rows,
    scan_checkpoint,
)

_MAX_ORTHONORMALITY_ERROR = 1e-4
_EXPONENT_BITS = 0x7FF << 52
# the writer goes from float64 to 16 bits by way of float32, whose own rounding comes on top
_ROUNDING_TOLERANCE = 1 + 2**-12


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


def verify(directory: Path, *, base: Path | None = None, on_progress: OnBytes = no_progress) -> VerifyResult:
    """Check an output directory against its report, its checksums, PEFT's loader and the base model.

    base: the original model's directory; by default the one the report names. on_progress: told of bytes read; all the
    files once for their checksums, then the base's weights once. Never raises for what the files hold.
    """
    try:
        report = read_report(directory)
    except RunError as error:
        return VerifyResult([str(error)], 0, 0.0, residual_checked=False)

    problems = [*_missing_files(directory, report), *check_checksums(directory, on_progress)]
    max_units = opened_adapter = opened_base = None
    with _collected(problems, LORAGA_INIT):
        opened_adapter = load_adapter(directory / LORAGA_INIT, report)
        problems += _check_finite(*opened_adapter)
    with _collected(problems, LORAGA_OFFSET):
        if opened_adapter:
            problems += _check_offset(*opened_adapter, *load_adapter(directory / LORAGA_OFFSET, report))
    with _collected(problems, FACTORS):
        problems += _check_factors(directory, report)
    with _collected(problems, "base"):
        opened_base = open_base(report, base)
    with _collected(problems, LORAGA_INIT):
        if opened_adapter and opened_base:
            problems += _check_saved(opened_adapter[0], opened_base[1], report.saved_parameters)
    with _collected(problems, RESIDUAL_BASE):
        # where the report says none, materialize-base may have made it since
        if opened_base and report.config.output.residual_base == "none" and not (directory / RESIDUAL_BASE).exists():
            base_dir, index = opened_base
            problems += _check_base(report, base_dir, digest_base(index, index, on_progress))
        elif opened_base and opened_adapter:
            adapter, targets = opened_adapter
            found, max_units = check_residual(
                report, *opened_base, directory / RESIDUAL_BASE, targets, adapter, on_progress
            )
            problems += found
    return VerifyResult(
        list(dict.fromkeys(problems)), len(report.targets), max_units or 0.0, residual_checked=max_units is not None
    )


def bytes_to_verify(directory: Path) -> int:
    """About how many bytes `verify` reads: every file, and a base as large as the residual."""
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    return sum(sizes.values()) + sum(size for path, size in sizes.items() if path.parent.name == RESIDUAL_BASE)


@contextmanager
def _collected(problems: list[str], subject: str) -> Iterator[None]:
    """Turn a part that cannot be read into a problem, so that the other parts are still checked."""
    try:
        yield
    except LoragaError as error:
        problems.append(f"{subject}: {error}")


def _missing_files(directory: Path, report: Report) -> list[str]:
    wanted = [RESOLVED_CONFIG, README, CHECKSUMS, f"{FACTORS}/{FACTORS_INDEX}"]
    wanted += [f"{name}/{file}" for name in (LORAGA_INIT, LORAGA_OFFSET) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    if report.config.output.residual_base == "full":
        wanted.append(f"{RESIDUAL_BASE}/{MODEL_CONFIG}")
    return [f"{name}: is missing" for name in wanted if not (directory / name).is_file()]


def _check_finite(adapter: AdapterFile, targets: list[AdapterTarget]) -> list[str]:
    return [
        f"{LORAGA_INIT}: {key} has values that are not finite"
        for target in targets
        for key, factor in zip(adapter_keys(target.name), adapter.factors(target.name), strict=True)
        if not factor.isfinite().all()
    ]


def _check_saved(adapter: AdapterFile, index: Mapping[str, TensorSlot], saved: Mapping[str, str]) -> list[str]:
    problems = []
    for name, weight_key in saved.items():
        slot, base = adapter.slots[saved_key(name)], index.get(weight_key)
        same = (
            base is not None
            and slot.shape == base.shape
            and _same_bytes(read_range(slot, 0, slot.numel), read_range(base, 0, base.numel))
        )
        if not same:
            problems.append(f"{LORAGA_INIT}: {saved_key(name)} is not the base's {weight_key}")
    return problems


def _check_offset(
    init: AdapterFile, init_targets: list[AdapterTarget], offset: AdapterFile, offset_targets: list[AdapterTarget]
) -> list[str]:
    """The offset adapter is (A, -B) of the init adapter, bit by bit, under the same scaling."""
    problems = []
    for target, offset_target in zip(init_targets, offset_targets, strict=True):
        if target != offset_target:
            problems.append(f"{LORAGA_OFFSET}: {target.name} is scaled otherwise than in {LORAGA_INIT}")
        A_RN, B_MR = init.factors(target.name)
        stored = offset.factors(target.name)
        for key, factor, other in zip(adapter_keys(target.name), (A_RN, -B_MR), stored, strict=True):
            if not _same_bytes(factor, other):
                problems.append(f"{LORAGA_OFFSET}: {key} is not (A, -B) of {LORAGA_INIT}")
    return problems


def _check_factors(directory: Path, report: Report) -> list[str]:
    slots = scan_checkpoint(directory / FACTORS, FACTORS_STEM)
    expected = {f"{name}.{part}" for name in report.targets for part in ("U", "S", "Vh")}
    if slots.keys() != expected:
        return [f"{FACTORS}: {key} is missing or not of a target" for key in sorted(slots.keys() ^ expected)]
    problems = []
    for name, target in report.targets.items():
        M, N = target.shape
        U, S, Vh = (slots[f"{name}.{part}"] for part in ("U", "S", "Vh"))
        K = math.prod(S.shape)
        if (U.shape, S.shape, Vh.shape) != ((M, K), (K,), (K, N)) or {U.dtype, S.dtype, Vh.dtype} != {torch.float32}:
            problems.append(f"{FACTORS}: {name} is not U {M} x K, S K, Vh K x {N} in F32")
            continue
        S_K = read_rows(S, 0, K)
        if not (S_K.isfinite().all() and (S_K >= 0).all() and (S_K.diff() <= 0).all()):
            problems.append(f"{FACTORS}: {S.name} is not finite, nonnegative and descending")
        for slot, columns in ((U, read_rows(U, 0, M)), (Vh, read_rows(Vh, 0, K).T)):
            gram_KK = columns.T @ columns
            error = (gram_KK - torch.eye(K)).abs().max().item() if K else 0.0
            if not error <= _MAX_ORTHONORMALITY_ERROR:  # NaN must fail too
                problems.append(f"{FACTORS}: {slot.name} is not orthonormal (off by {error:.1e})")
    return problems


def _check_base(report: Report, base_dir: Path, digests: Mapping[str, TensorDigest]) -> list[str]:
    if fingerprint(digests) == report.base_fingerprint:
        return []
    return [f"base: {base_dir} is not the base of this output: its fingerprint is not the report's base_fingerprint"]


def _check_layout(
    report: Report,
    base_dir: Path,
    base: Mapping[str, TensorSlot],
    residual: Mapping[str, TensorSlot],
    target_of: Mapping[str, AdapterTarget],
) -> list[str]:
    """The residual base has the base's tensors, in the dtype that the config asks for, and the targets among them."""
    dtype = report.config.output.residual_dtype
    expected = {key: (residual_dtype_of(slot.dtype, dtype), slot.shape) for key, slot in base.items()}
    found = {key: (slot.dtype, slot.shape) for key, slot in residual.items()}
    problems = []
    differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if differing:
        key = differing[0]
        problems.append(
            f"{RESIDUAL_BASE}: {key} is {_described(found.get(key))}, and by the base {base_dir} and the report it is "
            f"{_described(expected.get(key))}; {len(differing)} such tensors"
        )
    for key, target in target_of.items():
        if key not in base or base[key].shape != target.stored_shape or not base[key].dtype.is_floating_point:
            problems.append(f"base: {key} is not the {target.M} x {target.N} matrix of {target.name}")
    return problems


def _described(layout: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "missing" if layout is None else f"{dtype_name(layout[0])} {layout[1]}"


def check_residual(
    report: Report,
    base_dir: Path,
    base: Mapping[str, TensorSlot],
    residual_dir: Path,
    targets: list[AdapterTarget],
    adapter: AdapterFile,
    on_progress: OnBytes,
) -> tuple[list[str], float | None]:
    """Read base and residual base side by side; (problems, largest error in roundings or None if it means nothing)."""
    residual = scan_checkpoint(residual_dir)
    target_of = {target.weight_key: target for target in targets}
    problems = _check_layout(report, base_dir, base, residual, target_of)
    if problems:
        return problems, None

    def compare(key: str) -> tuple[list[TensorDigest], float]:
        slots = (base[key], residual[key])
        target = target_of.get(key)
        hashes = (hashlib.sha256(), hashlib.sha256())
        worst = 0.0
        pieces = _copied_pieces(*slots) if target is None else _target_pieces(*slots, target, adapter)
        for base_piece, residual_piece, units in pieces:
            hashes[0].update(as_bytes(base_piece))
            hashes[1].update(as_bytes(residual_piece))
            worst = max(worst, units)
            on_progress(base_piece.nbytes)
        digests = [
            TensorDigest(dtype_name(slot.dtype), slot.shape, digest.hexdigest())
            for slot, digest in zip(slots, hashes, strict=True)
        ]
        return digests, worst

    base_digests, residual_digests = {}, {}
    max_units = 0.0
    for key, (digests, worst) in zip(base, over_cores(compare, base), strict=True):
        base_digests[key], residual_digests[key] = digests
        if key in target_of:
            max_units = max(max_units, worst)
            if worst > _ROUNDING_TOLERANCE:
                problems.append(f"{RESIDUAL_BASE}: {key} is {worst:.3g} roundings away from W - s B A")
        elif worst > 0:
            problems.append(f"{RESIDUAL_BASE}: {key} is no target, but differs from the base")

    other_base = _check_base(report, base_dir, base_digests)
    if other_base:
        return other_base, None  # the differences found are those of another model
    if report.residual_fingerprint not in (None, fingerprint(residual_digests)):
        problems.append(f"{RESIDUAL_BASE}: its fingerprint is not the report's residual_fingerprint")
    return problems, max_units


def _copied_pieces(base: TensorSlot, residual: TensorSlot) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(base piece, residual piece, 0 if the one is the other cast, else infinity)."""
    for start, end in chunks(base.numel, CHUNK_ELEMENTS):
        base_piece, residual_piece = read_range(base, start, end), read_range(residual, start, end)
        same = _same_bytes(base_piece.to(residual.dtype), residual_piece)
        yield base_piece, residual_piece, 0.0 if same else math.inf


def _target_pieces(
    base: TensorSlot, residual: TensorSlot, target: AdapterTarget, adapter: AdapterFile
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(base piece, residual piece, the largest |W - (W_res + s B A)| among them in roundings)."""
    A_RN, B_MR = (factor.double() for factor in adapter.factors(target.name))
    # two machines' float64 products may differ by this much, which shows where W - s B A all but cancels
    product_error = 2**-52 * target.r**2 * target.scaling * (A_RN.abs().max() * B_MR.abs().max()).item()
    for row0, row1 in chunks(base.shape[0], rows_per_chunk(target)):
        base_piece, residual_piece = read_rows(base, row0, row1), read_rows(residual, row0, row1)
        exact = subtract_offset(target, base_piece, A_RN, B_MR, row0)
        error = (residual_piece - exact).abs_()
        units = error.div_(_one_rounding(exact, residual.dtype).add_(product_error)).max().item()
        yield base_piece, residual_piece, math.inf if math.isnan(units) else units


def _one_rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` around each value: the most that rounding to nearest costs."""
    info = torch.finfo(dtype)
    # a float64 without its sign and mantissa bits is the power of two below it
    binade = (exact.view(torch.int64) & _EXPONENT_BITS).view(torch.float64)
    return binade.clamp_(min=info.smallest_normal).mul_(info.eps / 2)


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    # not by value: NaN equals itself here, and 0 is not -0
    return torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))
