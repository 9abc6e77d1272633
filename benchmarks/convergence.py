"""Does a LoRA-GA start converge faster? Every method at its own best learning rate, and all at the same one.

    make quickstart                                               # pretrains the model this trains on
    python benchmarks/convergence.py --json benchmarks/convergence.jsonl \\
        --markdown docs/BENCHMARKS.md --plots docs/plots
    python benchmarks/convergence.py --quick --json quick.jsonl --markdown quick.md

Two tasks of text that the model has not learned: `help`, Python's English help topics, and `headers`, the C++ headers
that come with PyTorch; every eighth document is held out. AdamW without weight decay, warm-up over a twentieth of the
steps, then cosine to zero. Learning rates are 0.001 times powers of two. On the first seed each method goes from 0.001
to a neighbour with a lower held-out loss at the end, until both neighbours are worse: no best rate lies at the edge of
a grid. The other seeds (order of the data, random parts of the start, calibration sample) are then run at this rate and
at 0.001.

Runs are appended to --json, one JSON object a line, as they end; the same command goes on where it was stopped. With
all runs there it only writes tables and plots.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores

import torch
import torch.nn.functional as F
from convergence_methods import METHODS, Batch, Inputs, R, alignment, best_cosine, full_gradients
from convergence_report import MARKERS, Results, tables, write_plots
from rate_search import Journal, best_rate, run_lines, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loraga_dist.errors import LoragaError, RunError


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


QUICK = Settings(
    tasks=("help",), seeds=(0, 1), steps=6, batch_size=2, sequence_length=64, check_every_steps=3, heldout_windows=8,
    calibration_batches=4, gradient_batches=4, common_lr=0.008,
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
    options = parser.parse_args()
    settings = QUICK if options.quick else Settings()
    try:
        if options.markdown:
            MARKERS.split(options.markdown)  # a mistake there is told before the runs, not after
        journal = Journal(options.json, settings)
        already, started = len(journal.read()), time.monotonic()
        run_all(options.model, settings, journal, options.workers)
        if len(journal.read()) > already:
            journal.add({"kind": "session", "wall_seconds": round(time.monotonic() - started)})
        results = Results(journal.read())
        if options.markdown:
            MARKERS.write(options.markdown, tables(results))
        if options.plots:
            write_plots(results, options.plots)
    except LoragaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def run_all(model: str, settings: Settings, journal: Journal, workers: int) -> None:
    """Run what `journal` lacks, in `workers` processes of one thread each."""
    first_rates = {(task, method): settings.common_lr for task in settings.tasks for method in METHODS}
    run_lines(first_rates, settings.seeds, functools.partial(_run_seed, model, settings, journal), workers)


def _run_seed(
    model: str, settings: Settings, journal: Journal, task: str, method: str, seed: int, lr: float, *, search: bool
) -> float:
    """All runs of one seed: those of a search from `lr`, or at `lr` and the common rate. Returns the rate."""
    logging.set_verbosity_error()
    start = _Start(_bench(model, settings, task), method, seed)
    if not journal.has_alignment(task, method, seed):
        journal.add({"kind": "alignment", "task": task, "method": method, "seed": seed, **start.alignment()})
    loss_at = journal.remembering(task, method, seed, start.train)
    if search:
        return best_rate(loss_at, lr)
    loss_at(lr)
    loss_at(settings.common_lr)
    return lr


class _Start:
    """A method's start for one seed; every learning rate trains a copy."""

    def __init__(self, bench: Bench, method: str, seed: int) -> None:
        self.bench, self.method, self.seed = bench, METHODS[method], seed

    @functools.cached_property
    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        settings = self.bench.settings
        batches = list(self.bench.training_batches(settings.calibration_batches, seed=1000 + self.seed))
        inputs = Inputs(batches=batches, seed=self.seed, steps=settings.steps)
        return self.method.start(copy.deepcopy(self.bench.model), inputs).train()

    @functools.cached_property
    def heldout_loss(self) -> float:
        return self.bench.heldout_loss(self.model)

    def alignment(self) -> dict[str, float]:
        found = alignment(self.model, self.bench.model, self.bench.gradients)
        return found | {"best_cosine": best_cosine(self.bench.gradients, 2 * self.bench.settings.r)}

    def train(self, lr: float) -> dict[str, Any]:
        settings = self.bench.settings
        return train(
            self.bench,
            copy.deepcopy(self.model),
            self.method,
            lr,
            seed=self.seed,
            steps=settings.steps,
            check_every_steps=settings.check_every_steps,
            loss_before=self.heldout_loss,
        )


class Bench:
    """One task and the pretrained model."""

    def __init__(self, model: str, settings: Settings, task: str) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        training, heldout = [], []
        for index, document in enumerate(TASKS[task]()):
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

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return model(**batch).loss

    @functools.cached_property
    def gradients(self) -> dict[str, Tensor]:
        starts = self._spread(self.training_ids, self.settings.gradient_batches * self.settings.batch_size)
        batches = [self._windows(self.training_ids, starts_B) for starts_B in starts.split(self.settings.batch_size)]
        return full_gradients(self.model, batches)

    @torch.no_grad()
    def heldout_loss(self, model: nn.Module) -> float:
        """Mean nats per token over evenly spaced windows of the held-out documents."""
        starts = self._spread(self.heldout_ids, self.settings.heldout_windows)
        losses = []
        for starts_B in starts.split(16):
            ids_BS = self._windows(self.heldout_ids, starts_B)["input_ids"]
            # not the model's own loss: AdaLoRA adds its regularization to it
            logits_BSV = model(input_ids=ids_BS).logits
            losses.append(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten()) * len(ids_BS))
        return (torch.stack(losses).sum() / self.settings.heldout_windows).item()

    def _spread(self, ids: Tensor, count: int) -> Tensor:
        return torch.linspace(0, len(ids) - self.settings.sequence_length, count).long()

    def _windows(self, ids: Tensor, starts_B: Tensor) -> Batch:
        ids_BS = ids[starts_B[:, None] + torch.arange(self.settings.sequence_length)]
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS}


_bench = functools.cache(Bench)


def _help_topics() -> Sequence[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _headers() -> Sequence[str]:
    root = Path(torch.__file__).parent / "include" / "c10"
    paths = sorted(root.rglob("*.h"))
    if not paths:
        raise RunError(f"{root} has no C++ headers; this torch was installed without them")
    return [path.read_text(encoding="utf-8") for path in paths]


TASKS: dict[str, Callable[[], Sequence[str]]] = {"help": _help_topics, "headers": _headers}


if __name__ == "__main__":
    sys.exit(main())
