"""Does a start converge faster? Every method at its own best learning rate, and all at the same one.

    make quickstart                                               # pretrains the model this trains on
    python benchmarks/convergence.py --json benchmarks/convergence.jsonl \\
        --markdown docs/BENCHMARKS.md --plots docs/plots
    python benchmarks/convergence.py --json benchmarks/convergence.jsonl --parts 300 --methods rslora rrr
    python benchmarks/convergence.py --quick --json quick.jsonl --markdown quick.md

Two kinds of text that the model has not learned: `help`, Python's English help topics, and `headers`, the C++ headers
that come with PyTorch; every eighth document is held out. AdamW without weight decay, warm-up over a twentieth of the
steps, then cosine to zero. Parts, which --parts chooses from, in this order:

    table     All methods. Learning rates are 0.001 times powers of two: on the first seed each method goes from 0.001
              to a neighbour with a lower held-out loss at the end, until both neighbours are worse, so that no best
              rate lies at the edge of a grid. The other seeds (order of the data, random parts of the start,
              calibration sample) are then run at this rate and at 0.001.
    longer    LoRA, rsLoRA and LoRA+ with more steps: as many as a calibration's compute buys.
    spread    Half and twice the best rate on all seeds: what a wrong rate costs. Of the fair comparison's rows.
    50        The fair comparison, of RRR with the rows of `longer` and what these train as: the search goes on to rates
              that are a square root of two away.
    20, 300, 1000, few-shot
              The same after so many steps; few-shot trains on 32 windows of the text, and stops where the loss on 32
              others is lowest.

Runs are appended to --json, one JSON object a line, as they end; the same command goes on where it was stopped. With
all runs there, or with no word after --parts, it only writes tables and plots: of the rows that are done.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores

import torch
from convergence_methods import FAIR, LONGER, METHODS, ROWS, Inputs, alignment, best_cosine
from convergence_report import FEW_SHOT, Results, markers_of, tables, task_name, write_plots
from convergence_tasks import QUICK, Bench, Settings, bench_of, require_same_model
from rate_search import Journal, best_rate, finer_rate, in_worker, run_lines, train
from torch import nn
from transformers.utils import logging

from loraga_dist.errors import LoragaError, UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/quickstart/model", help="made by launch/quickstart.py")
    parser.add_argument(
        "--json", type=Path, required=True, help="results, one JSON object a line; runs are added to it"
    )
    parser.add_argument(
        "--markdown", type=Path, help="write the tables: into a document with our markers, or a new one"
    )
    parser.add_argument("--plots", type=Path, help="directory for the plots")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a few steps on one task: shows that everything runs")
    parser.add_argument("--parts", nargs="*", help="what to run of the parts above; default: all")
    parser.add_argument("--methods", nargs="+", choices=ROWS, metavar="METHOD", help="rows to run; default: all")
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    parts = parts_of(settings)
    markers = markers_of(options.json)
    try:
        if options.markdown:
            markers.split(options.markdown)  # a mistake there is told before the runs, not after
        for name in options.parts or ():
            if name not in parts:
                raise UserError("--parts", name, f"is none of {', '.join(parts)}")
        journal = Journal(options.json, settings)
        chosen = [part for name, part in parts.items() if options.parts is None or name in options.parts]
        for text in sorted({tasks_of(settings)[task].text for part in chosen for task in part.tasks}):
            # before the workers, each of which would note it
            in_worker(text, require_same_model, options.model, settings, text, journal)
        for part in chosen:
            run_part(options.model, settings, part, options.methods or ROWS, journal, options.workers)
        results = Results(journal.read())
        if options.markdown:
            markers.write(options.markdown, tables(results))
        if options.plots:
            write_plots(results, options.plots)
    except LoragaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on, and for how long; results know it by a name."""

    text: str
    steps: int
    more_steps: int
    """Of the rows of LONGER."""
    few_shot: bool = False


def tasks_of(settings: Settings) -> dict[str, Task]:
    found = {}
    for text in settings.tasks:
        lengths = [settings.steps, *settings.lengths, *([settings.longest] if text == settings.tasks[-1] else [])]
        for steps in lengths:
            task = Task(text=text, steps=steps, more_steps=settings.more_steps)
            found[task_name(settings.steps, text, steps)] = task
        found[task_name(settings.steps, text, FEW_SHOT)] = Task(
            text=text, steps=settings.few_shot_steps, more_steps=settings.few_shot_more_steps, few_shot=True
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows on some tasks, and what is run of them beyond a search and all seeds at the rate that it finds."""

    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    at_common: bool = False
    """Begin at the common rate, and run all seeds there, too; else the search begins at a best rate that is known."""
    spread: bool = False
    """All seeds at half and twice the rate, too."""
    finer: bool = False
    """Go on to rates that are sqrt(2) away."""


def parts_of(settings: Settings) -> dict[str, Part]:
    main = settings.tasks
    parts = {
        "table": Part(tasks=main, rows=tuple(METHODS), at_common=True),
        "longer": Part(tasks=main, rows=tuple(LONGER)),
        "spread": Part(tasks=main, rows=FAIR, spread=True),
        str(settings.steps): Part(tasks=main, rows=FAIR, finer=True),
    }
    for length in (*settings.lengths, settings.longest, FEW_SHOT):
        names = (task_name(settings.steps, text, length) for text in main)
        tasks = tuple(name for name in names if name in tasks_of(settings))
        parts[str(length)] = Part(tasks=tasks, rows=FAIR, finer=True)
    return parts


def run_part(
    model: str, settings: Settings, part: Part, methods: Iterable[str], journal: Journal, workers: int
) -> None:
    """Run what `journal` lacks of a part's rows that are in `methods`, in `workers` processes of one thread each."""
    results = Results(journal.read())
    rows = [method for method in part.rows if method in methods]
    first_rates = {
        (task, method): settings.common_lr if part.at_common else _first_rate(settings, results, task, method)
        for method in rows
        for task in part.tasks
    }
    run_lines(first_rates, settings.seeds, functools.partial(_run_seed, model, settings, part, journal), workers)


def _first_rate(settings: Settings, results: Results, task: str, method: str) -> float:
    """The best one that is known for the row, or what it trains as, on the same text."""
    text = tasks_of(settings)[task].text
    for known in (method, ROWS[method].longer):
        if known and results.is_searched(text, known):
            return results.on_grid().best_lr(text, known)
    return settings.common_lr


def _run_seed(
    model: str,
    settings: Settings,
    part: Part,
    journal: Journal,
    task: str,
    method: str,
    seed: int,
    lr: float,
    *,
    search: bool,
) -> float:
    """All runs of one seed: those of a search from `lr`, or at `lr`, and what the part adds. Returns the rate.

    More than 7 parameters: the first four are the same for all calls.
    """
    logging.set_verbosity_error()
    trial = tasks_of(settings)[task]
    bench = bench_of(model, settings, trial.text, trial.few_shot)
    start = _Start(bench, trial, method, seed)
    if part.at_common and not journal.has_alignment(task, method, seed):
        journal.add({"kind": "alignment", "task": task, "method": method, "seed": seed, **start.alignment()})
    loss_at = journal.remembering(task, method, seed, start.train)
    if search:
        lr = best_rate(loss_at, lr)
        if part.finer:
            lr = finer_rate(loss_at, lr)
    loss_at(lr)
    if part.at_common:
        loss_at(settings.common_lr)
    if part.spread:
        loss_at(lr / 2)
        loss_at(lr * 2)
    return lr


class _Start:
    """A method's start for one seed; every learning rate trains a copy."""

    def __init__(self, bench: Bench, task: Task, method: str, seed: int) -> None:
        self.bench, self.method, self.seed = bench, ROWS[method], seed
        self.steps = task.steps + (task.more_steps if self.method.longer else 0)
        self.check_every_steps = max(bench.settings.check_every_steps, task.steps // 10)

    @functools.cached_property
    def timed(self) -> tuple[nn.Module, float]:
        """The start, and the seconds of a core that it took."""
        torch.manual_seed(self.seed)
        inputs = Inputs(batches=self.bench.calibration_batches(1000 + self.seed), seed=self.seed, steps=self.steps)
        model, began = copy.deepcopy(self.bench.model), time.process_time()
        started = self.method.start(model, inputs).train()
        return started, round(time.process_time() - began, 1)

    @property
    def model(self) -> nn.Module:
        return self.timed[0]

    @functools.cached_property
    def heldout_loss(self) -> float:
        return self.bench.heldout_loss(self.model)

    def alignment(self) -> dict[str, float]:
        found = alignment(self.model, self.bench.model, self.bench.gradients)
        return found | {"best_cosine": best_cosine(self.bench.gradients, 2 * self.bench.settings.r)}

    def train(self, lr: float) -> dict[str, Any]:
        run = train(
            self.bench,
            copy.deepcopy(self.model),
            self.method,
            lr,
            seed=self.seed,
            steps=self.steps,
            check_every_steps=self.check_every_steps,
            loss_before=self.heldout_loss,
            validation_loss=self.bench.validation_loss,
        )
        return run | {"start_cpu_seconds": self.timed[1]}


if __name__ == "__main__":
    sys.exit(main())
