"""docs/MODELS.md: init of every architecture that transformers has for a task, tiny and random, checked.

    python benchmarks/coverage.py --jobs 2 --markdown docs/MODELS.md
    python benchmarks/coverage.py --only causal:llama image

Each runs in a process of its own, forked from one that has imported the libraries. Outcomes are added to the file of
`--json` as they come. What is in it already is not run again, unless `--only` names it; `--failed` runs only what did
not work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from coverage_check import CRASHED, NOT_BUILT, REFUSED, WITH_LINE, WORKS, WRONG, Outcome, examine
from coverage_models import KINDS
from ranks import finish_on_ranks

from loraga_dist.artifacts.report import versions

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 120.0
_INTRODUCTION = """# Models

What `init` makes of every architecture that transformers has for a task: `python benchmarks/coverage.py --markdown
docs/MODELS.md` builds each of them tiny and random, saves it with a tokenizer, and runs `init` on one batch of four
texts, in float32 and one process, with `lora.r: 2`, the exact engine and defaults. Where a line of `init` says what to
write, that is written, four times at most. An architecture works where, then,

- stock PEFT loads the adapter on the residual base and gives the original model's logits, and
- the start is of the gradient that plain autograd has of the model's own loss, each text alone,

both within 1e-4, relative. `all-linear` leaves towers, projectors, routers and experts out, and says so.

"""


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
    parser.add_argument("--failed", action="store_true", help="run what did not work, again")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds for each")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.json)

    def is_wanted(kind: str, model_type: str) -> bool:
        named = options.only and {kind, f"{kind}:{model_type}"} & set(options.only)
        found = known.get((kind, model_type))
        if options.failed:
            return bool(named or not options.only) and (found is None or found["outcome"] not in (WORKS, WITH_LINE))
        return bool(named) if options.only else found is None

    def run(each: tuple[str, str]) -> None:
        found = outcome_of(*each, options.timeout)
        with options.json.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{found['kind']:10} {found['model_type']:24} {found['outcome']}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, [(kind, it) for kind in KINDS for it in KINDS[kind].classes if is_wanted(kind, it)]))
    if options.markdown is not None:
        options.markdown.write_text(markdown(read(options.json).values()))


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last outcome of each architecture."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(found["kind"], found["model_type"]): found for found in map(json.loads, lines)}


def markdown(outcomes: Iterable[dict[str, Any]]) -> str:
    """All of docs/MODELS.md."""
    of_kind: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for found in outcomes:
        of_kind[found["kind"]][found["model_type"]] = found
    counted, tables = [], []
    for kind, found in of_kind.items():
        each = [it["outcome"] for it in found.values()]
        counts = [each.count(outcome) for outcome in (WORKS, WITH_LINE, REFUSED)] + [
            each.count(WRONG) + each.count(CRASHED)
        ]
        counted.append(
            f"| {KINDS[kind].title} | {sum(counts)} | {' | '.join(map(str, counts))} | {each.count(NOT_BUILT)} |"
        )
        tables += [f"## {KINDS[kind].title}\n", "| model type | class | | |", "|---|---|---|---|"]
        tables += [row(found[model_type]) for model_type in KINDS[kind].classes if model_type in found]
        tables.append("")
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if version is not None)
    heads = "| | counted | works | works with a line | refused in one line | fails | not counted |\n" + "|---" * 7 + "|"
    return "\n".join([f"{_INTRODUCTION}With {used}:\n", heads, *counted, "", *tables])


def row(found: dict[str, Any]) -> str:
    """Of an architecture, in its task's table."""
    said = list(found["notes"])
    if found["outcome"] == WITH_LINE:
        said = [f"`{key}: {_any_layer(value)}`" for key, value in found["settings"].items()] + said
    elif found["outcome"] == REFUSED:
        said = [found["lines"][-1]]
    elif found["outcome"] != WORKS:
        said = [found["why"].splitlines()[0] if found["why"] else found["outcome"]]
    cells = [f"`{found['model_type']}`", found["model_class"], found["outcome"], "; ".join(said).replace("|", "\\|")]
    return f"| {' | '.join(cells)} |"


def _any_layer(value: Any) -> str:
    """A value as a user writes it, for any number of layers."""
    return re.sub(r"\((\d+\|)+\d+\)", r"\\d+", value) if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
