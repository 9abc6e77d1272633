"""What docs/MODELS.md says of a sample of architectures is what benchmarks/coverage.py finds now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from coverage import row
from coverage_check import WITH_LINE, WORKS, examine
from launching import ROOT
from ranks import run_on_ranks

SAMPLE = {
    "causal": [
        "bart", "cpmant", "deepseek_v4", "emu3", "falcon", "gpt2", "laguna", "llama", "mamba", "mixtral", "zamba",
    ],
    "seq2seq": ["led", "m2m_100", "t5", "voxtral"],
    "classifier": ["bart", "bert", "distilbert", "fnet", "llama"],
    "image": ["gemma3", "qwen3_vl"],
}  # fmt: skip


@pytest.mark.parametrize("kind", SAMPLE)
def test_sample(kind: str, tmp_path: Path) -> None:
    document = (ROOT / "docs" / "MODELS.md").read_text().splitlines()
    (found,) = run_on_ranks(examine_each, 1, kind, tmp_path, timeout_seconds=150)
    for outcome in found:
        assert outcome["outcome"] in (WORKS, WITH_LINE), outcome
        assert row(outcome) in document, "python benchmarks/coverage.py --markdown docs/MODELS.md"


def examine_each(kind: str, directory: Path) -> list[dict[str, Any]]:
    found = []
    for model_type in SAMPLE[kind]:
        (directory / model_type).mkdir()
        found.append(examine(kind, model_type, directory / model_type))
    return found
