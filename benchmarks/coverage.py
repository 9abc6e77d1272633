"""docs/MODELS.md: init of every architecture that transformers has for a task, tiny and random, checked.

    python benchmarks/coverage.py --json build/coverage.jsonl --markdown docs/MODELS.md
    python benchmarks/coverage.py --json build/coverage.jsonl --only causal:llama image:qwen3_vl

Each runs in a process of its own, forked from one that has imported the libraries. Outcomes are added to the file as they
come; what is in it is not run again, but for what `--only` names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for directory in ("tests", "benchmarks"):
    sys.path.insert(0, str(ROOT / directory))
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
    "OMP_NUM_THREADS": "1",
    "LORAGA_DEBUG": "1",
}.items():
    os.environ.setdefault(name, value)

from coverage_check import CRASHED, NOT_BUILT, WITH_LINE, WORKS, Outcome, examine
from coverage_models import KINDS
from ranks import finish_on_ranks

TIMEOUT_SECONDS = 120.0


def outcome_of(kind: str, model_type: str, timeout_seconds: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """What became of an architecture, whatever happened to its process."""
    with tempfile.TemporaryDirectory(prefix="coverage-") as directory:
        (found,) = finish_on_ranks(examine, 1, kind, model_type, Path(directory), timeout_seconds=timeout_seconds)
    if found.value is not None:
        return found.value
    why = f"ended with {found.code}: {found.stderr[-2000:]}"
    return vars(Outcome(kind, model_type, KINDS[kind].classes[model_type], outcome=CRASHED, why=why))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "coverage.jsonl", help="a line for each outcome")
    parser.add_argument("--only", nargs="+", metavar="KIND[:MODEL_TYPE]", help="run these, again if need be")
    parser.add_argument("--failed", action="store_true", help="run what did not work again")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds for each")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    known = read(options.json)
    wanted = [(kind, model_type) for kind, it in KINDS.items() for model_type in it.classes]
    if options.only:
        wanted = [(kind, it) for kind, it in wanted if {kind, f"{kind}:{it}", it} & set(options.only)]
    else:
        wanted = [each for each in wanted if each not in known]
    if options.failed:
        wanted = [each for each in wanted if each not in known or known[each]["outcome"] not in (WORKS, WITH_LINE)]
    options.json.parent.mkdir(parents=True, exist_ok=True)

    def run(each: tuple[str, str]) -> None:
        found = outcome_of(*each, options.timeout)
        with options.json.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{found['kind']:10} {found['model_type']:24} {found['outcome']}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, wanted))


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last outcome of each architecture."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(found["kind"], found["model_type"]): found for found in map(json.loads, lines)}


if __name__ == "__main__":
    main()
