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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores

import torch
import torch.nn.functional as F
from convergence_methods import FAIR, LONGER, METHODS, ROWS, Batch, Inputs, R, alignment, best_cosine, full_gradients
from convergence_report import FEW_SHOT, MARKERS, Results, tables, task_name, write_plots
from rate_search import Journal, best_rate, finer_rate, run_lines, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loraga_dist.errors import LoragaError, RunError, UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the method that decides what a run gives; a results file belongs to one of these."""

    tasks: tuple[str, ...] = ("help", "headers")
    seeds: tuple[int, ...] = (0, 1, 2)
    """Learning rates are chosen on the first."""
    steps: int = 50
    batch_size: int = 4
    sequence_length: int = 128
    check_every_steps: int = 10
    heldout_windows: int = 32
    calibration_batches: int = 32
    """What LoRA-GA, LoRA-One and PEFT's lora_ga see of the training text beforehand."""
    gradient_batches: int = 64
    """Evenly over the training text: the full gradient that first updates are compared with."""
    common_lr: float = 0.001
    r: int = R
    more_steps: int = 60
    """As many as take what a calibration and its factorizations take: 6.1 to 6.7 s of a core on an AMD EPYC for RRR,
    where a step takes 0.11 s."""
    lengths: tuple[int, ...] = (20, 300)
    """Other numbers of steps, of the fair comparison."""
    longest: int = 1000
    """The same, on the last task alone."""
    few_shot_windows: int = 32
    """Of training text, and as many for validation."""
    few_shot_steps: int = 100
    few_shot_more_steps: int = 18
    """The same of a calibration on these windows, 2.1 s."""


QUICK = Settings(
    tasks=("help",), seeds=(0, 1), steps=6, batch_size=2, sequence_length=64, check_every_steps=3, heldout_windows=8,
    calibration_batches=4, gradient_batches=4, common_lr=0.008, more_steps=3, lengths=(3,), longest=9,
    few_shot_windows=8, few_shot_steps=9, few_shot_more_steps=3,
)  # fmt: skip


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
    try:
        if options.markdown:
            MARKERS.split(options.markdown)  # a mistake there is told before the runs, not after
        for name in options.parts or ():
            if name not in parts:
                raise UserError("--parts", name, f"is none of {', '.join(parts)}")
        journal = Journal(options.json, settings)
        for name, part in parts.items():
            if options.parts is None or name in options.parts:
                run_part(options.model, settings, part, options.methods or ROWS, journal, options.workers)
        results = Results(journal.read())
        if options.markdown:
            MARKERS.write(options.markdown, tables(results))
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
    start = _Start(_bench(model, settings, trial.text, trial.few_shot), trial, method, seed)
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


class Bench:
    """One text and the pretrained model."""

    validation_loss: Callable[[nn.Module], float] | None = None

    def __init__(self, model: str, settings: Settings, text: str) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        training, heldout = [], []
        for index, document in enumerate(TEXTS[text]()):
            (heldout if index % 8 == 0 else training).append(document + tokenizer.eos_token)
        self.training_ids, self.heldout_ids = (
            torch.tensor(tokenizer("".join(documents)).input_ids) for documents in (training, heldout)
        )

    def training_batches(self, count: int, seed: int) -> Iterator[Batch]:
        """Random windows, int64 [batch, sequence]; all tokens are supervised."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            last = len(self.training_ids) - self.settings.sequence_length
            starts_B = torch.randint(last + 1, (self.settings.batch_size,), generator=generator)
            yield self._windows(self.training_ids, starts_B)

    def calibration_batches(self, seed: int) -> list[Batch]:
        return list(self.training_batches(self.settings.calibration_batches, seed))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return model(**batch).loss

    @functools.cached_property
    def gradients(self) -> dict[str, Tensor]:
        starts = self._spread(self.training_ids, self.settings.gradient_batches * self.settings.batch_size)
        batches = [self._windows(self.training_ids, starts_B) for starts_B in starts.split(self.settings.batch_size)]
        return full_gradients(self.model, batches)

    def heldout_loss(self, model: nn.Module) -> float:
        """Mean nats per token over evenly spaced windows of the held-out documents."""
        starts = self._spread(self.heldout_ids, self.settings.heldout_windows)
        return self._mean_loss(model, self.heldout_ids, starts)

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, ids: Tensor, starts: Tensor) -> float:
        losses = []
        for starts_B in starts.split(16):
            ids_BS = self._windows(ids, starts_B)["input_ids"]
            # not the model's own loss: AdaLoRA adds its regularization to it
            logits_BSV = model(input_ids=ids_BS).logits
            losses.append(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()) * len(ids_BS))
        return (torch.stack(losses).sum() / len(starts)).item()

    def _spread(self, ids: Tensor, count: int) -> Tensor:
        return torch.linspace(0, len(ids) - self.settings.sequence_length, count).long()

    def _windows(self, ids: Tensor, starts_B: Tensor) -> Batch:
        ids_BS = ids[starts_B[:, None] + torch.arange(self.settings.sequence_length)]
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS}


class FewShot(Bench):
    """The same with a few windows of the training text, and as many of what lies between them for validation."""

    def __init__(self, model: str, settings: Settings, text: str) -> None:
        super().__init__(model, settings, text)
        starts = self._spread(self.training_ids, 2 * settings.few_shot_windows)
        self.training_starts, self.validation_starts = starts[::2], starts[1::2]
        assert len(self.training_ids) >= 2 * settings.few_shot_windows * settings.sequence_length, "windows overlap"

    def training_batches(self, count: int, seed: int) -> Iterator[Batch]:
        """Each window once an epoch, in a random order."""
        generator = torch.Generator().manual_seed(seed)
        batches: list[Tensor] = []
        for _ in range(count):
            if not batches:
                order = torch.randperm(len(self.training_starts), generator=generator)
                batches = list(self.training_starts[order].split(self.settings.batch_size))
            yield self._windows(self.training_ids, batches.pop())

    def calibration_batches(self, seed: int) -> list[Batch]:
        return list(self.training_batches(len(self.training_starts) // self.settings.batch_size, seed))

    def validation_loss(self, model: nn.Module) -> float:
        return self._mean_loss(model, self.training_ids, self.validation_starts)


@functools.cache
def _bench(model: str, settings: Settings, text: str, few_shot: bool) -> Bench:
    return (FewShot if few_shot else Bench)(model, settings, text)


def _help_topics() -> Sequence[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _headers() -> Sequence[str]:
    root = Path(torch.__file__).parent / "include" / "c10"
    paths = sorted(root.rglob("*.h"))
    if not paths:
        raise RunError(f"{root} has no C++ headers; this torch was installed without them")
    return [path.read_text(encoding="utf-8") for path in paths]


TEXTS: dict[str, Callable[[], Sequence[str]]] = {"help": _help_topics, "headers": _headers}


if __name__ == "__main__":
    sys.exit(main())
