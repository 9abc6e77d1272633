"""`residual_base/` for an output that was written without: from the original base and the adapter."""

from __future__ import annotations

from pathlib import Path

from loraga_dist.artifacts.compare import OpenedOutput, check_residual
from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import LORAGA_INIT, RESIDUAL_BASE
from loraga_dist.artifacts.reading import OriginalBase, load_start
from loraga_dist.artifacts.report import Report
from loraga_dist.artifacts.residual import write_model
from loraga_dist.artifacts.tensors import num_bytes_of
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checksums import write_checksums
from loraga_dist.files.staging import free_place, whole_directory
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.model.base import model_files
from loraga_dist.model.targets import require_targets
from loraga_dist.ranks.progress import phase
from loraga_dist.ranks.world import World


def materialize_base(
    directory: Path, *, to: Path | None = None, base: Path | None = None, show_progress: bool = False
) -> Path:
    """Write the residual base of an output directory, as `output.residual_base: full` does, and return its path.

    to: by default `residual_base/` in the output directory, where its adapter looks for it. base: the original model,
    if it is not where the report says. Streamed in bounded memory and held against base and adapter before it appears.
    Raises UserError for a directory or base that does not fit, RunError when writing or the check fails.
    """
    try:
        report = Report.read(directory)
        adapter, targets = load_start(directory / LORAGA_INIT, report)
    except RunError as error:
        raise UserError("directory", str(directory), f"{error}; write the directory of a finished run") from error
    if not report.scheme.changes_base:
        problem = f"was made by {report.config.init.scheme}, which leaves the base as it is"
        raise UserError(
            "directory", str(directory), f"{problem}; load {LORAGA_INIT} on {report.config.model.name_or_path}"
        )
    destination = free_place(to if to is not None else directory / RESIDUAL_BASE, "--to")
    original = OriginalBase.open(report, base)
    base_dir, index = original.directory, original.index
    model_files(base_dir)  # refuses what cannot be copied, before the work
    require_targets(index, targets)
    dtype = report.config.output.residual_dtype
    num_bytes = num_bytes_of(Layout.of_report(report, entries_of(index)).residual.values())
    output = OpenedOutput(report=report, adapter=adapter, targets=targets, base_dir=base_dir, base=index)
    with whole_directory(destination, num_bytes) as path:
        with phase("write", num_bytes, "B", shown=show_progress) as progress:
            digests = write_model(base_dir, index, targets, adapter.factors, path, dtype, on_progress=progress.advance)
        original.require_same(report, {key: read for key, (read, _) in digests.items()})
        with phase("verify", original.num_bytes, "B", shown=show_progress) as progress:
            problems = check_residual(output, path, progress.advance)
        if problems:
            raise RunError(f"verify: {'; '.join(problems[:5])}")
        write_checksums(path, World.alone())  # the output's own were written before
    return destination.path
