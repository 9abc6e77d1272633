"""The model card of a start on the hub: which base it needs, how to load it, what goes wrong on another."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import yaml

from loraga_dist.artifacts.layout import Layout
from loraga_dist.artifacts.names import LORAGA_OFFSET, RESIDUAL_BASE
from loraga_dist.artifacts.report import Report
from loraga_dist.publish.base_call import BaseCall
from loraga_dist.publish.rendering import render


def model_card(report: Report, repo_id: str) -> str:
    """README.md of the repository, with the metadata that the hub reads."""
    from huggingface_hub import ModelCardData

    config, original = report.config, BaseCall.of_original(report)
    on_residual = LORAGA_OFFSET in Layout.of_report(report).directories
    base = original
    if on_residual and config.output.push_residual_base:
        base = replace(original, name=repo_id, subfolder=RESIDUAL_BASE, revision=None)
    else:
        if original.is_local:
            base = replace(base, name="PATH_OF_THE_BASE")
        if on_residual and config.output.residual_dtype != "auto":
            base = replace(base, dtype=config.output.residual_dtype)  # what the offset is merged in
    metadata = ModelCardData(
        base_model=None if original.is_local else original.name,
        library_name="peft",
        tags=["lora", config.init.scheme.replace("_", "-")],
    )
    return render(
        "card.md.j2",
        report=report,
        metadata=yaml.safe_dump(metadata.to_dict(), sort_keys=False, width=math.inf).rstrip(),  # in ASCII, escaped
        name=Path(original.name).name if original.is_local else original.name,
        original=original,
        base=base,
        on_residual=on_residual,
        pushes_residual=config.output.push_residual_base,
        repo_id=repo_id,
    )
