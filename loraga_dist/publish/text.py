"""What a finished run says in words: the output directory's README.md, and the closing table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import LORAGA_INIT, LORAGA_OFFSET
from loraga_dist.artifacts.report import Report, TargetReport
from loraga_dist.errors import printable
from loraga_dist.model.targets import kind_of
from loraga_dist.publish.base_call import BaseCall
from loraga_dist.publish.rendering import render


def print_summary(report: Report, directory: str, verified: str) -> None:
    """The closing table: per kind of module, seconds per phase, memory per rank, files, what to do next."""
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 110)
    table = Table(title=printable(f"{report.scheme.title} start of {report.config.model.name_or_path}"))
    for column in ("module", "targets", "M x N", "r", "captured energy", "split-half cosine", "offset ratio"):
        table.add_column(column, justify="left" if column == "module" else "right")
    kinds: dict[tuple[Any, ...], list[TargetReport]] = {}
    for name, target in report.targets.items():
        kinds.setdefault((kind_of(name), *target.shape), []).append(target)
    for (kind, M, N), members in kinds.items():
        ranks = sorted({member.r for member in members})
        table.add_row(
            printable(kind),
            str(len(members)),
            f"{M} x {N}",
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            _spread([member.captured_energy for member in members]),
            _spread([member.split_half_cosine for member in members]),
            _spread([member.offset_ratio for member in members]),
        )
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {printable(warning)}", style="yellow", soft_wrap=True)
    text = render("summary.txt.j2", report=report, directory=directory, verified=verified)
    console.print(text, soft_wrap=True, end="")


def readme(report: Report) -> str:
    """README.md of the output directory: what is here and how to train, merge and serve from it."""
    directories = Layout.of_report(report).directories
    adapter, on_residual = f"{report.config.output.dir}/{LORAGA_INIT}", LORAGA_OFFSET in directories
    of_experts = [target.weight_key for target in report.targets.values() if target.stack is not None]
    base = BaseCall.of_residual(report) if on_residual else BaseCall.of_original(report)
    return render(
        "output.md.j2",
        report=report,
        directories=directories,
        on_residual=on_residual,
        adapter=adapter,
        base=base,
        has_experts=bool(of_experts),
        has_them_apart=len(of_experts) == len(set(of_experts)),
        trl=_TRL.get(report.loss or "", ("SFTTrainer", "SFTConfig")),
        trainers=_trainer_texts(base, adapter, report),
    )


_TRL = {"dpo": ("DPOTrainer", "DPOConfig"), "policy_gradient": ("GRPOTrainer", "GRPOConfig")}
"""What trains on the loss that a start was made for, where that is not `SFTTrainer`."""


def _trainer_texts(base: BaseCall, adapter: str, report: Report) -> dict[str, str]:
    """YAML by trainer; of language models, which these train."""
    configs = base.trainer_configs(adapter) if report.config.lora.task_type == "CAUSAL_LM" else {}
    rate = {"learning_rate": report.learning_rate}
    return {
        trainer: yaml.safe_dump(config | rate, sort_keys=False, width=math.inf) for trainer, config in configs.items()
    }


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} .. {high:.3f}"
