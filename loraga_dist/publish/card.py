"""The model card of a start on the hub: which base it needs, how to load it, what goes wrong on another."""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import LORAGA_OFFSET
from loraga_dist.artifacts.report import Report
from loraga_dist.model.classes import loader_of
from loraga_dist.publish.rendering import render


def model_card(report: Report, repo_id: str) -> str:
    """README.md of the repository, with the metadata that the hub reads."""
    from huggingface_hub import ModelCardData

    config, name = report.config, report.config.model.name_or_path
    on_hub = not Path(name).is_absolute()  # a run writes local paths absolutely
    metadata = ModelCardData(
        base_model=name if on_hub else None,
        library_name="peft",
        tags=["lora", config.init.scheme.replace("_", "-")],
    )
    return render(
        "card.md.j2",
        report=report,
        metadata=yaml.safe_dump(metadata.to_dict(), sort_keys=False, width=math.inf).rstrip(),  # in ASCII, escaped
        base=name if on_hub else Path(name).name,
        revision=config.model.revision,
        loader=loader_of(config.model, config.lora.task_type),
        on_residual=LORAGA_OFFSET in Layout.of_report(report).directories,
        pushes_residual=config.output.push_residual_base,
        repo_id=repo_id,
    )
