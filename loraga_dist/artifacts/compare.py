"""Base and residual base side by side: what each weight is off by, and the fingerprints of both."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile
from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import RESIDUAL_BASE
from loraga_dist.artifacts.report import Report
from loraga_dist.artifacts.residual import digest_base, subtract_offset
from loraga_dist.artifacts.tensors import Region, read_chunks, regions_by_key
from loraga_dist.files.checksums import OnBytes, TensorDigest, fingerprint, no_progress
from loraga_dist.files.parallel import over_cores, shares
from loraga_dist.files.safetensors_io import TensorSlot, as_bytes, dtype_name, scan_checkpoint
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.model.targets import Target, holds_rows
from loraga_dist.ranks.world import World

_EXPONENT_BITS = 0x7FF << 52
# the writer goes from float64 to 16 bits by way of float32, whose own rounding comes on top
_ROUNDING_TOLERANCE = 1 + 2**-12


@dataclass
class Comparison:
    """What holding a share of the base's tensors against the residual base gave."""

    problems: list[str] = field(default_factory=list)
    base_digests: dict[str, TensorDigest] = field(default_factory=dict)
    residual_digests: dict[str, TensorDigest] = field(default_factory=dict)
    max_units: float = 0.0
    """Largest |W - (W_res + s B A)| in roundings of W_res."""

    def is_of_base(self, report: Report) -> bool:
        """Tell, once it is of all tensors, whether the base is the report's."""
        return fingerprint(self.base_digests) == report.base_fingerprint

    def conclude(self, report: Report, base_dir: Path) -> list[str]:
        """The problems that a comparison of all tensors shows."""
        if not self.is_of_base(report):
            # the differences found to another model than the base mean nothing
            problem = "its fingerprint is not the report's base_fingerprint"
            return [f"base: {base_dir} is not the base of this output: {problem}"]
        if self.residual_digests and report.residual_fingerprint not in (None, fingerprint(self.residual_digests)):
            return [*self.problems, f"{RESIDUAL_BASE}: its fingerprint is not the report's residual_fingerprint"]
        return self.problems


@dataclass(frozen=True, kw_only=True)
class OpenedOutput:
    """The parts of an output that a comparison reads, opened and fitting together."""

    report: Report
    adapter: AdapterFile
    targets: list[Target]
    base_dir: Path
    base: Mapping[str, TensorSlot]


def check_residual(output: OpenedOutput, residual_dir: Path, on_progress: OnBytes = no_progress) -> list[str]:
    """What is wrong with a residual base, wherever it lies, one line each. Raises BrokenFileError for its files."""
    problems, compared = compare(output, residual_dir, World.alone(), on_progress)
    return problems if compared is None else problems + compared.conclude(output.report, output.base_dir)


def merge(problems: list[str], compared: Comparison | None, world: World) -> tuple[list[str], Comparison | None]:
    """All ranks' findings, a collective; no comparison where one rank could not make its own."""
    parts = world.all_json([problems, None if compared is None else asdict(compared)])
    everyone = [problem for found, _ in parts for problem in found]
    if any(part is None for _, part in parts):
        return everyone, None
    whole = Comparison()
    for _, part in parts:
        whole.problems += part["problems"]
        whole.base_digests |= {key: TensorDigest.of_json(it) for key, it in part["base_digests"].items()}
        whole.residual_digests |= {key: TensorDigest.of_json(it) for key, it in part["residual_digests"].items()}
        whole.max_units = max(whole.max_units, part["max_units"])
    return everyone, whole


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same bit by bit: NaN equals itself here, and 0 is not -0."""
    return torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))


def compare(
    output: OpenedOutput, residual_dir: Path | None, world: World, on_progress: OnBytes
) -> tuple[list[str], Comparison | None]:
    """Read this rank's share of base and residual base side by side; problems instead when their tensors do not fit.

    residual_dir: None if there is none; the base alone is read then, for its fingerprint.
    """
    base = output.base
    share = shares(base, lambda key: base[key].num_bytes, world.size)[world.rank]
    if residual_dir is None:
        return [], Comparison(base_digests=digest_base(base, share, on_progress))
    residual = scan_checkpoint(residual_dir)
    if problems := _check_tensors(output, residual):
        return problems, None
    regions_of_key = regions_by_key(output.targets)

    def compare_one(key: str) -> tuple[list[TensorDigest], float]:
        slots = (base[key], residual[key])
        regions = regions_of_key.get(key)
        hashes = (hashlib.sha256(), hashlib.sha256())
        worst = 0.0
        pieces = _copied_pieces(*slots) if regions is None else _target_pieces(*slots, regions, output.adapter)
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

    found = Comparison()
    for key, (digests, worst) in zip(share, over_cores(compare_one, share), strict=True):
        found.base_digests[key], found.residual_digests[key] = digests
        if key in regions_of_key:
            found.max_units = max(found.max_units, worst)
            if worst > _ROUNDING_TOLERANCE:
                found.problems.append(f"{RESIDUAL_BASE}: {key} is {worst:.3g} roundings away from W - s B A")
        elif worst > 0:
            found.problems.append(f"{RESIDUAL_BASE}: {key} is no target, but differs from the base")
    return [], found


def _check_tensors(output: OpenedOutput, residual: Mapping[str, TensorSlot]) -> list[str]:
    """The residual base has the base's tensors, in the dtype that the config asks for, and the targets among them."""
    base, problems = output.base, []
    expected = Layout.of_report(output.report, entries_of(base)).residual
    found = entries_of(residual)
    differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if differing:
        key = differing[0]
        problems.append(
            f"{RESIDUAL_BASE}: {key} is {_described(found.get(key))}, and by the base {output.base_dir} and the report "
            f"it is {_described(expected.get(key))}; {len(differing)} such tensors"
        )
    for target in output.targets:
        for rows in target.stored_rows:
            slot = base.get(rows.key)
            if slot is None or not holds_rows(slot, rows, target) or not slot.dtype.is_floating_point:
                problems.append(f"base: {rows.key} is not the {target.M} x {target.N} matrix of {target.name}")
    return problems


def _described(entry: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "missing" if entry is None else f"{dtype_name(entry[0])} {entry[1]}"


def _copied_pieces(base: TensorSlot, residual: TensorSlot) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(base piece, residual piece, 0 if the one is the other cast, else infinity)."""
    for base_piece, residual_piece in zip(read_chunks(base), read_chunks(residual), strict=True):
        same = same_bytes(base_piece.to(residual.dtype), residual_piece)
        yield base_piece, residual_piece, 0.0 if same else math.inf


def _target_pieces(
    base: TensorSlot, residual: TensorSlot, regions: Sequence[Region], adapter: AdapterFile
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(base piece, residual piece, the largest |W - (W_res + s B A)| among them in roundings)."""
    for region in regions:
        target = region.target
        A_RN, B_MR = (factor.double() for factor in adapter.factors(target))
        # two machines' float64 products may differ by this much, which shows where W - s B A all but cancels
        product_error = 2**-52 * target.r**2 * target.scaling * (A_RN.abs().max() * B_MR.abs().max()).item()
        for row0, (base_piece, residual_piece) in region.chunks(base, residual):
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
