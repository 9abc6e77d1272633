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
import json
import math
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores

import torch
import torch.nn.functional as F
from convergence_methods import METHODS, Batch, Inputs, R, alignment, best_cosine, full_gradients
from convergence_report import Results, split_document, write_plots, write_tables
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from loraga_dist.artifacts.report import versions
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
            split_document(options.markdown)  # a mistake there is told before the runs, not after
        journal = Journal(options.json, settings)
        already, started = len(journal.read()), time.monotonic()
        run_all(options.model, settings, journal, options.workers)
        if len(journal.read()) > already:
            journal.add({"kind": "session", "wall_seconds": round(time.monotonic() - started)})
        results = Results(journal.read())
        if options.markdown:
            write_tables(results, options.markdown)
        if options.plots:
            write_plots(results, options.plots)
    except LoragaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


class Journal:
    """The results file: a header with the settings, then runs and alignments, each appended in one write."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        wanted = json.loads(json.dumps(asdict(settings)))
        if path.exists() and (text := path.read_text(encoding="utf-8")):
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # a line that a kill cut off
                path.write_text(whole, encoding="utf-8")
            header = self.read()[0]
            if any(header["settings"].get(key) != value for key, value in wanted.items()):
                raise UserError("--json", str(path), "holds results of other settings; name a new file")
        else:
            hardware = {"machine": platform.machine(), "cores": os.cpu_count()}
            self.add({"kind": "header", "settings": wanted, "hardware": hardware, "versions": versions()})

    def add(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def runs(self, task: str, method: str, seed: int) -> dict[float, float]:
        """The last held-out loss by learning rate; a run that diverged has an infinite one."""
        return {
            entry["lr"]: math.inf if entry["final_loss"] is None else entry["final_loss"]
            for entry in self.read()
            if entry["kind"] == "run" and (entry["task"], entry["method"], entry["seed"]) == (task, method, seed)
        }

    def has_alignment(self, task: str, method: str, seed: int) -> bool:
        return any(
            entry["kind"] == "alignment" and (entry["task"], entry["method"], entry["seed"]) == (task, method, seed)
            for entry in self.read()
        )


def run_all(model: str, settings: Settings, journal: Journal, workers: int) -> None:
    """Run what `journal` lacks, in `workers` processes of one thread each."""
    start = functools.partial(_run_seed, model, settings, journal)
    lines = [(task, method) for task in settings.tasks for method in METHODS]
    # forked: this process has imported the libraries, and computes nothing itself
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=fork, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        searches: dict[Future[float], tuple[str, str]] = {
            pool.submit(start, task, method, settings.seeds[0], None): (task, method) for task, method in lines
        }
        open_: set[Future[float]] = set(searches)
        try:
            while open_:
                done, open_ = wait(open_, return_when=FIRST_COMPLETED)
                for future in done:
                    lr = future.result()
                    if future in searches:
                        task, method = searches[future]
                        open_ |= {pool.submit(start, task, method, seed, lr) for seed in settings.seeds[1:]}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with(parent: int) -> None:
    """Workers would wait for more work when the process that started them is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_seed(
    model: str, settings: Settings, journal: Journal, task: str, method: str, seed: int, lr: float | None
) -> float:
    """All runs of one seed: at `lr` and the common rate, or, without `lr`, those of the search. Returns the rate."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        return _runs_of_seed(_bench(model, settings, task), journal, task, method, seed, lr)
    except LoragaError as error:  # whose arguments do not survive the way between processes
        raise RunError(f"{task}, {method}, seed {seed}: {error}") from error


def _runs_of_seed(bench: Bench, journal: Journal, task: str, method: str, seed: int, lr: float | None) -> float:
    start = _Start(bench, method, seed)
    losses = journal.runs(task, method, seed)
    if not journal.has_alignment(task, method, seed):
        journal.add({"kind": "alignment", "task": task, "method": method, "seed": seed, **start.alignment()})

    def loss_at(lr: float) -> float:
        if lr not in losses:
            run = start.train(lr)
            journal.add({"kind": "run", "task": task, "method": method, "seed": seed, **run})
            losses[lr] = math.inf if run["final_loss"] is None else run["final_loss"]
            print(f"{task:<8} {method:<15} seed {seed}  lr {lr:<9g} loss {losses[lr]:.4f}", flush=True)
        return losses[lr]

    if lr is None:
        return best_rate(loss_at, bench.settings.common_lr)
    loss_at(lr)
    loss_at(bench.settings.common_lr)
    return lr


def best_rate(loss_at: Callable[[float], float], first: float) -> float:
    """The rate `first` * 2^k with neighbours on both sides that are no better, going down the slope from `first`."""
    best = first
    while math.isinf(loss_at(best)):  # diverged
        best /= 2
    while True:
        if loss_at(best * 2) < loss_at(best):
            best *= 2
        elif loss_at(best / 2) < loss_at(best):
            best /= 2
        else:
            return best


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
        started = time.process_time()
        settings = self.bench.settings
        model = copy.deepcopy(self.model)
        optimizer = self.method.optimizer(model, lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, settings.steps))
        curve = [(0, self.heldout_loss)]
        for step, batch in enumerate(self.bench.training_batches(settings.steps, seed=self.seed), start=1):
            model(**batch).loss.backward()
            optimizer.step()
            if self.method.after_step:
                self.method.after_step(model, step)
            optimizer.zero_grad()
            schedule.step()
            if step % settings.check_every_steps == 0:
                loss = self.bench.heldout_loss(model)
                if not math.isfinite(loss):
                    curve = []
                    break
                curve.append((step, loss))
        return {
            "lr": lr,
            "final_loss": curve[-1][1] if curve else None,
            "curve": [(step, round(loss, 5)) for step, loss in curve],
            "cpu_seconds": round(time.process_time() - started, 1),
        }


def _lr_factor(step: int, steps: int) -> float:
    warmup_steps = max(1, steps // 20)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


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
