"""report.html: what loraga_report.json says, to look at rather than to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from loraga_dist.artifacts.names import PLOTS, REPORT_PAGE
from loraga_dist.artifacts.report import Report, TargetReport
from loraga_dist.errors import RunError
from loraga_dist.publish.plots import DASH, draw
from loraga_dist.publish.rendering import render
from loraga_dist.publish.text import budget_spent

_COLUMNS = (
    "target", "M × N", "r", "largest singular value", "numerical rank", "captured energy", "split-half cosine",
    "window capture", "offset ratio", "owner rank",
)  # fmt: skip


def write_report_page(directory: Path, report: Report) -> None:
    """Write report.html, whole in one file, and plots/*.png; without matplotlib only the page, which then says so.

    Raises RunError when a file cannot be written.
    """
    try:
        page = render(
            "report.html.j2",
            report=report,
            base=report.config.model.name_or_path,
            facts=_facts(report),
            drawings=draw(report, directory / PLOTS),
            columns=_COLUMNS,
            rows=list(_rows(report.targets)),
            versions=", ".join(f"{package} {version}" for package, version in report.versions.items()),
        )
        (directory / REPORT_PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"write: {error.filename or directory} cannot be written ({error.strerror})") from error


def _facts(report: Report) -> dict[str, str]:
    config, check, scheme = report.config, report.identity_check, report.scheme
    model, init = config.model, config.init
    start = f"{init.scheme}, {init.direction}, {init.scale}" if init.scheme == "lora_ga" else init.scheme
    facts = {
        "base": model.name_or_path + (f" @ {model.revision}" if model.revision else ""),
        "start": start,
        "targets": str(len(report.targets)),
        "world size": str(report.world_size),
    }
    if scheme.source == "gradient":
        facts |= {
            "engine": str(report.engine),
            "sequences": _number(report.num_sequences, ","),
            "supervised tokens": _number(report.num_supervised_tokens, ","),
            "stopped by": str(report.stopped_by),
            "split-half cosine, median": _number(report.split_half_cosine, ".3f"),
            "mean loss": _number(report.mean_loss, ".4f"),
        }
    if report.rank_budget:
        facts["rank budget"] = budget_spent(report.rank_budget, ",")
    if check is not None:
        facts["identity check"] = (
            f"logits differ by {_number(check.max_abs_logit_diff, '.2e')} at most, "
            f"largest {_number(check.max_abs_logit, '.3g')} ({check.dtype})"
            + ("" if scheme.starts_at_model else f"; {scheme.title} starts off the model")
        )
    return facts


def _rows(targets: Mapping[str, TargetReport]) -> Iterator[tuple[str, ...]]:
    for name, target in targets.items():
        M, N = target.shape
        yield (
            name,
            f"{M} × {N}",
            str(target.r),
            _number(target.singular_values[0] if target.singular_values else None, ".3g"),
            _number(target.numerical_rank, "d"),
            _number(target.captured_energy, ".3f"),
            _number(target.split_half_cosine, ".3f"),
            _number(target.window_capture, ".3f"),
            _number(target.offset_ratio, ".3f"),
            str(target.owner_rank),
        )


def _number(value: float | None, spec: str) -> str:
    return DASH if value is None else format(value, spec)
