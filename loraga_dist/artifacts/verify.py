"""Does an output directory hold what its report says? Answered from the files alone, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loraga_dist.artifacts.checks import (
    check_adapter_config,
    check_adapter_fingerprint,
    check_budget,
    check_factors,
    check_finite,
    check_kinds,
    check_magnitudes,
    check_model_files,
    check_names,
    check_offset,
    check_resolved_config,
    check_saved,
    unknown_files,
)
from loraga_dist.artifacts.compare import Comparison, OpenedOutput, compare, merge
from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import (
    FACTORS,
    LORAGA_INIT,
    LORAGA_OFFSET,
    PLOTS,
    README,
    REPORT,
    REPORT_PAGE,
    RESIDUAL_BASE,
    RESOLVED_CONFIG,
)
from loraga_dist.artifacts.reading import OriginalBase, load_adapter
from loraga_dist.artifacts.report import Report, read_report_text
from loraga_dist.errors import LoragaError, RunError
from loraga_dist.files.checksums import OnBytes, TensorDigest, check_checksums, no_progress, shared_fingerprint
from loraga_dist.ranks.world import World


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found."""

    problems: list[str]
    """One line each, starting with the file or directory."""
    num_targets: int
    max_rounding_units: float | None = None
    """Largest |W - (W_res + s B A)|, where one rounding of W_res to its dtype may cost 1; None if not checked."""
    notes: list[str] = field(default_factory=list)
    """What is no problem, but was not looked at: one line each."""

    @property
    def residual_checked(self) -> bool:
        """Whether every target of the residual base was held against the base."""
        return self.max_rounding_units is not None

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
        return VerifyResult(problems, 0)
    layout = Layout.of_report(report)
    notes: list[str] = []
    if world.is_main:
        with _collected(problems, REPORT):
            problems += check_kinds(directory, layout)
            notes = unknown_files(directory, layout) + _not_said(report)
    problems, notes = world.of_main((problems, notes))
    if problems:
        return VerifyResult(problems, len(report.targets), notes=notes)
    # where the report says none, materialize-base may have made it since
    has_residual = RESIDUAL_BASE in layout.directories or (
        report.scheme.changes_base and world.of_main((directory / RESIDUAL_BASE).exists())
    )
    # a cut SHA256SUMS would say nothing of what nothing else guards
    listed_whole = {REPORT, REPORT_PAGE, RESOLVED_CONFIG, README, PLOTS, *layout.directories}
    problems += check_checksums(directory, world, on_progress, listed_whole=listed_whole)
    output: OpenedOutput | None = None
    compared: Comparison | None = None
    of_factors: dict[str, TensorDigest] = {}
    with world.together():
        if world.is_main:
            problems += _check_small_files(directory, layout, report, has_residual=has_residual)
        opened_adapter = None
        with _collected(problems, LORAGA_INIT):
            opened_adapter = load_adapter(directory / LORAGA_INIT, report)
        if opened_adapter and world.is_main:
            with _collected(problems, LORAGA_INIT):
                problems += check_finite(*opened_adapter) + check_budget(report)
                problems += check_adapter_fingerprint(opened_adapter[0], report)
            if LORAGA_OFFSET in layout.directories:
                with _collected(problems, LORAGA_OFFSET):
                    offset = load_adapter(directory / LORAGA_OFFSET, report, use_dora=False)
                    problems += check_offset(*opened_adapter, *offset)
        with _collected(problems, "base"):
            original = OriginalBase.open(report, base)
            if opened_adapter:
                adapter, targets = opened_adapter
                output = OpenedOutput(
                    report=report,
                    adapter=adapter,
                    targets=targets,
                    base_dir=original.directory,
                    base=original.index,
                )
        if FACTORS in layout.directories:
            with _collected(problems, FACTORS):
                found, of_factors = check_factors(directory, layout, report, output, world)
                problems += found
        if output and world.is_main:
            with _collected(problems, LORAGA_INIT):
                problems += check_saved(output)
        with _collected(problems, RESIDUAL_BASE):
            if output:
                found, compared = compare(
                    output, directory / RESIDUAL_BASE if has_residual else None, world, on_progress
                )
                problems += found
        with _collected(problems, LORAGA_INIT):
            if compared and output and report.is_dora:
                compared.problems += check_magnitudes(output, world)
    factors_fingerprint = shared_fingerprint(of_factors, world)
    problems, whole = merge(problems, compared, world)
    seen = any(problem.startswith(f"{FACTORS}:") for problem in problems)
    if not seen and report.factors_fingerprint not in (None, factors_fingerprint):
        problems.append(f"{FACTORS}: its fingerprint is not the report's factors_fingerprint")
    max_units = None
    if whole is not None and output is not None:
        problems += whole.conclude(report, output.base_dir)
        max_units = whole.max_units if has_residual and whole.is_of_base(report) else None
    return VerifyResult(list(dict.fromkeys(problems)), len(report.targets), max_units, notes)


def _check_small_files(directory: Path, layout: Layout, report: Report, *, has_residual: bool) -> list[str]:
    """Names, configurations and what stands beside the weights."""
    problems = [f"{name}: is missing" for name in layout.missing_files(directory)]
    for name in layout.all_directories:
        if (directory / name).is_dir():
            with _collected(problems, name):
                problems += check_names(directory, name, report)
    with _collected(problems, RESOLVED_CONFIG):
        problems += check_resolved_config(directory, report)
    for name in (LORAGA_INIT, LORAGA_OFFSET):
        if name in layout.directories:
            with _collected(problems, name):
                problems += check_adapter_config(directory, name, layout, report)
    if has_residual:
        with _collected(problems, RESIDUAL_BASE):
            problems += check_model_files(directory, report)
    return problems


def _not_said(report: Report) -> list[str]:
    """What an earlier version did not write into its report, so that nothing is held against it."""
    said = {"adapter_fingerprint": report.adapter_fingerprint is not None}
    if report.scheme.source == "gradient":
        said["factors_fingerprint"] = report.factors_fingerprint is not None
    if report.scheme.changes_base:
        said["model_files"] = bool(report.model_files)
    missing = [key for key, is_said in said.items() if not is_said]
    return [f"{REPORT} is of an earlier version and has no {', '.join(missing)}: not checked"] if missing else []


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
    text, problem = world.of_main((text, problem))
    if problem:
        return None, [problem]
    expected, *others = world.all_texts(digest)
    differing = [rank for rank, found in enumerate(others, start=1) if found != expected]
    problems = [f"{REPORT}: ranks {differing} see another one than rank 0"] if differing else []
    report = None
    with _collected(problems):
        report = Report.parse(text)
    return report, problems


@contextmanager
def _collected(problems: list[str], subject: str = "") -> Iterator[None]:
    """Turn a part that cannot be read into a problem, so that the other parts are still checked.

    subject: the part's name, where the errors of the block do not begin with it.
    """
    try:
        yield
    except LoragaError as error:
        problems.append(f"{subject}: {error}" if subject else str(error))
    except Exception as error:  # whatever a library makes of what the files hold is a finding, and the rest is checked
        first_line = str(error).strip().partition("\n")[0]
        problems.append(f"{subject or REPORT}: cannot be checked ({type(error).__name__}: {first_line[:200]})")
