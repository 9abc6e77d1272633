"""Training at every method's own best learning rate: the search, the loop, and the results file it goes on from."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from convergence_methods import Batch, Method
from torch import Tensor

from loraga_dist.artifacts.report import versions
from loraga_dist.errors import LoragaError, RunError, UserError

Line = tuple[str, str]
"""A task and a method: what has a best learning rate."""


class Journal:
    """The results file: a header with the settings, then runs and other entries, each appended in one write.

    Settings that the benchmark got later than the file began are noted where they first came up.
    """

    def __init__(self, path: Path, settings: Any) -> None:
        self.path = path
        wanted = json.loads(json.dumps(asdict(settings)))
        if path.exists() and (text := path.read_text(encoding="utf-8")):
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # a line that a kill cut off
                path.write_text(whole, encoding="utf-8")
            known = settings_of(self.read())
            if any(known.get(key, value) != value for key, value in wanted.items()):
                raise UserError("--json", str(path), "holds results of other settings; name a new file")
            if later := {key: value for key, value in wanted.items() if key not in known}:
                self.add({"kind": "settings", "settings": later})
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

    def remembering(
        self, task: str, method: str, seed: int, train: Callable[[float], dict[str, Any]]
    ) -> Callable[[float], float]:
        """The last loss at a learning rate: of the run that stands here, or of a new one, which is added."""
        losses = self.runs(task, method, seed)

        def loss_at(lr: float) -> float:
            if lr not in losses:
                run = train(lr)
                self.add({"kind": "run", "task": task, "method": method, "seed": seed, **run})
                losses[lr] = math.inf if run["final_loss"] is None else run["final_loss"]
                print(f"{task:<8} {method:<15} seed {seed}  lr {lr:<9g} loss {losses[lr]:.4f}", flush=True)
            return losses[lr]

        return loss_at


def settings_of(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a results file, those that came later with them."""
    found: dict[str, Any] = {}
    for entry in entries:
        if entry["kind"] in ("header", "settings"):
            found |= entry["settings"]
    return found


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


def finer_rate(loss_at: Callable[[float], float], best: float) -> float:
    """The best of `best`, of best_rate, and of what is sqrt(2) away."""
    # of six digits, so that the same rate is the same number from above and from below
    neighbours = [float(f"{best * factor:.6g}") for factor in (1 / math.sqrt(2), math.sqrt(2))]
    return min((best, *neighbours), key=loss_at)


class RunSeed(Protocol):
    def __call__(self, task: str, method: str, seed: int, lr: float, *, search: bool) -> float:
        """All runs of one seed: at `lr`, or those of a search that begins there. Returns the rate."""
        ...


def run_lines(first_rates: Mapping[Line, float], seeds: Sequence[int], run_seed: RunSeed, workers: int) -> None:
    """Search on the first seed from each line's first rate, then run the other seeds at what was found.

    In `workers` processes of one thread each; all searches come before other seeds. run_seed: can be pickled.
    """
    with _pool(workers) as pool:

        def submit(task: str, method: str, seed: int, lr: float, *, search: bool) -> Future[float]:
            where = f"{task}, {method}, seed {seed}"
            return pool.submit(_in_words, where, run_seed, task, method, seed, lr, search=search)

        searches: dict[Future[float], Line] = {
            submit(task, method, seeds[0], lr, search=True): (task, method)
            for (task, method), lr in first_rates.items()
        }
        open_: set[Future[float]] = set(searches)
        try:
            while open_:
                done, open_ = wait(open_, return_when=FIRST_COMPLETED)
                for future in done:
                    lr = future.result()
                    if future in searches:
                        task, method = searches[future]
                        open_ |= {submit(task, method, seed, lr, search=False) for seed in seeds[1:]}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def in_worker(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The same for one call: what it returns. where: begins the words of what goes wrong."""
    with _pool(1) as pool:
        return pool.submit(_in_words, where, function, *arguments).result()


def _pool(workers: int) -> ProcessPoolExecutor:
    # forked: this process has imported the libraries, and computes nothing itself
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, mp_context=fork, initializer=_end_with, initargs=(os.getpid(),))


def _end_with(parent: int) -> None:
    """Workers would wait for more work when the process that started them is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_words(where: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    torch.set_num_threads(1)
    try:
        return function(*arguments, **named)
    except LoragaError as error:  # whose arguments do not survive the way between processes
        raise RunError(f"{where}: {error}") from error


class Bench(Protocol):
    """What is trained on, and what a model is worth."""

    def training_batches(self, count: int, seed: int) -> Iterator[Batch]: ...

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """What training makes small."""
        ...

    def heldout_loss(self, model: Any) -> float: ...


def train(
    bench: Bench,
    model: Any,
    method: Method,
    lr: float,
    *,
    seed: int,
    steps: int,
    check_every_steps: int,
    loss_before: float,
    validation_loss: Callable[[Any], float] | None = None,
) -> dict[str, Any]:
    """Train a method's start; the run as results hold it. More than 7 parameters: one each of what a run depends on.

    validation_loss: the final loss is the held-out one at the check where this was lowest, else the last.
    """
    started = time.process_time()
    optimizer = method.optimizer(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
    curve = [(0, loss_before)]
    validation = [validation_loss(model)] if validation_loss else []
    for step, batch in enumerate(bench.training_batches(steps, seed=seed), start=1):
        bench.loss(model, batch).backward()
        optimizer.step()
        if method.after_step:
            method.after_step(model, step)
        optimizer.zero_grad()
        schedule.step()
        if step % check_every_steps == 0 or step == steps:
            loss = bench.heldout_loss(model)
            if not math.isfinite(loss):
                curve = []
                break
            curve.append((step, loss))
            if validation_loss:
                validation.append(validation_loss(model))
    stop = validation.index(min(validation)) if validation and curve else -1
    return {
        "lr": lr,
        "final_loss": curve[stop][1] if curve else None,
        "curve": [(step, round(loss, 5)) for step, loss in curve],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def _lr_factor(step: int, steps: int) -> float:
    warmup_steps = max(1, steps // 20)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
