"""What benchmarks that search learning rates show of their results: Markdown, between markers in a document."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convergence_methods import ROWS, Method
from rate_search import settings_of

from loraga_dist.errors import UserError

DASH = "–"


@dataclass(frozen=True)
class Markers:
    """The lines between which a script writes into a document."""

    script: str

    @property
    def begin(self) -> str:
        return f"<!-- written by {self.script} -->"

    end = "<!-- end of what it writes -->"

    def write(self, path: Path, text: str) -> None:
        """Replace what stands between the markers in `path`, or write a new file with nothing else."""
        before, after = self.split(path)
        path.write_text(f"{before}{self.begin}\n\n{text}\n{self.end}{after}", encoding="utf-8")

    def split(self, path: Path) -> tuple[str, str]:
        """What stands before and after the markers; raises UserError for a document without them."""
        text = path.read_text(encoding="utf-8") if path.exists() else f"{self.begin}\n{self.end}\n"
        before, begin, rest = text.partition(self.begin)
        _, end, after = rest.partition(self.end)
        if not (begin and end):
            problem = f"has no lines {self.begin!r} and {self.end!r}; add them, or name a new file"
            raise UserError("--markdown", str(path), problem)
        return before, after


class Results:
    """What a results file holds, by task, method, seed and learning rate."""

    def __init__(self, entries: Sequence[dict[str, Any]], methods: Mapping[str, Method] = ROWS) -> None:
        header = entries[0]
        self.settings = settings_of(entries)
        self.hardware: dict[str, Any] = header["hardware"]
        self.versions: dict[str, str] = header["versions"]
        self.seeds: list[int] = self.settings["seeds"]
        self.runs = {
            (entry["task"], entry["method"], entry["seed"], entry["lr"]): entry
            for entry in entries
            if entry["kind"] == "run"
        }
        self.table = methods
        self.methods = [method for method in methods if any(method == key[1] for key in self.runs)]
        self.alignments = {
            (entry["task"], entry["method"], entry["seed"]): entry for entry in entries if entry["kind"] == "alignment"
        }

    def rates(self, task: str, method: str) -> dict[float, float | None]:
        """The final loss at each learning rate of the search, None where the run diverged."""
        found = {
            lr: run["final_loss"]
            for (run_task, run_method, seed, lr), run in self.runs.items()
            if (run_task, run_method, seed) == (task, method, self.seeds[0])
        }
        return dict(sorted(found.items()))

    def best_lr(self, task: str, method: str) -> float:
        losses = {lr: loss for lr, loss in self.rates(task, method).items() if loss is not None}
        return min(losses, key=losses.__getitem__)

    def on_grid(self) -> Results:
        """The same with learning rates alone that are the common one times a power of two."""
        found = copy.copy(self)
        found.runs = {
            key: run for key, run in self.runs.items() if math.log2(key[3] / self.settings["common_lr"]).is_integer()
        }
        return found

    def is_searched(self, task: str, method: str) -> bool:
        """On the first seed a best rate was found, with worse ones at most twice as far on both sides."""
        rates = self.rates(task, method)
        if not any(loss is not None for loss in rates.values()):
            return False
        lr = self.best_lr(task, method)
        return any(0.49 * lr < rate < lr for rate in rates) and any(lr < rate < 2.01 * lr for rate in rates)

    def is_done(self, task: str, method: str) -> bool:
        """And every seed has run at this rate."""
        return self.is_searched(task, method) and self.has(task, method, self.best_lr(task, method))

    def has(self, task: str, method: str, lr: float) -> bool:
        """Every seed has run at this rate."""
        return all((task, method, seed, lr) in self.runs for seed in self.seeds)

    def final_losses(self, task: str, method: str, lr: float) -> list[float]:
        """Of every seed; empty if one of them diverged."""
        losses = [self.runs[task, method, seed, lr]["final_loss"] for seed in self.seeds]
        return [] if None in losses else losses

    def curves(self, task: str, method: str, lr: float) -> list[list[tuple[int, float]]]:
        return [self.runs[task, method, seed, lr]["curve"] for seed in self.seeds]


def mean(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}".replace("-", "−") + spread


def rates_table(results: Results, task: str) -> str:
    found_rates = {method: results.rates(task, method) for method in results.methods}
    searched = {
        method: found for method, found in found_rates.items() if any(loss is not None for loss in found.values())
    }
    rates = sorted({lr for found in searched.values() for lr in found})
    rows = []
    for method, found in searched.items():
        best = results.best_lr(task, method)
        cells = []
        for lr in rates:
            loss = found.get(lr)
            shown = ("diverged" if loss is None else f"{loss:.3f}") if lr in found else ""
            cells.append(f"**{shown}**" if lr == best else shown)
        rows.append([results.table[method].label, *cells])
    head = ["learning rate", *(f"{lr:g}" for lr in rates)]
    return f"The search, `{task}`, seed {results.seeds[0]}:\n\n" + table(head, rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)
