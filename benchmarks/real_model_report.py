"""Tables of benchmarks/real_model.py's results: of the rows that are done."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rate_report import DASH, Markers, Results, mean, rates_table, table
from real_model_methods import ROWS

MARKERS = Markers("benchmarks/real_model.py")


def tables(entries: Sequence[dict[str, Any]]) -> str:
    results = Results(entries, ROWS)
    parts = []
    if found := [entry for entry in entries if entry["kind"] == "accuracy"]:
        parts.append(_accuracy_table(found))
    tasks = [f"r = {r}" for r in results.settings["ranks"]]
    for task in tasks:
        done = [method for method in results.methods if results.is_done(task, method)]
        if "lora" in done:
            parts.append(_task_table(results, task, done))
    parts += [rates_table(results, task) for task in tasks if any(key[0] == task for key in results.runs)]
    parts.append(_how(results))
    return "\n\n".join(parts) + "\n"


def _accuracy_table(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [str(e["r"]), str(e["K"]), f"{e['mean']:.5f}", f"{e['worst']:.5f}", f"{e['captured_energy_error']:.4f}"]
        for e in entries
    ]
    head = ["r", "K", "efficiency, mean over targets", "worst", "captured energy off by"]
    return "The sketch against the exact gradient, one pass:\n\n" + table(head, rows)


def _task_table(results: Results, task: str, methods: Sequence[str]) -> str:
    lora = results.final_losses(task, "lora", results.best_lr(task, "lora"))
    rows = []
    for method in methods:
        lr = results.best_lr(task, method)
        runs = [results.runs[task, method, seed, lr] for seed in results.seeds]
        losses = [run["final_loss"] for run in runs]
        if None in losses:
            shown = ["diverged", DASH]
        else:
            differences = [loss - base for loss, base in zip(losses, lora, strict=True)] if lora else []
            compared = mean(differences, sign="+") if differences and method != "lora" else ""
            shown = [mean(losses), compared]
        rates = results.rates(task, method)
        neighbours = [rates[lr / 2], rates[lr * 2]]
        best = rates[lr]
        assert best is not None, "the best rate did not diverge"
        worse = (
            "diverged" if None in neighbours else f"{max(loss - best for loss in neighbours if loss is not None):+.3f}"
        )
        matches = [run["exact_matches"] for run in runs if run["exact_matches"] is not None]
        rows.append(
            [
                ROWS[method].label,
                ROWS[method].scaling,
                f"{lr:g}",
                *shown,
                worse.replace("-", "−"),
                f"{statistics.fmean(run['start_cpu_seconds'] for run in runs):.0f}",
                mean(matches) if matches else DASH,
            ]
        )
    start = results.runs[task, "lora", results.seeds[0], results.best_lr(task, "lora")]["curve"][0][1]
    head = ["", "s", "best rate", "loss at its best rate", "− LoRA", "worse of half and twice", "start, s of a core"]
    head += ["exact matches"]
    return f"{task}, loss {start:.3f} before training:\n\n" + table(head, rows)


def _how(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    done = ""
    if results.runs:
        seconds = statistics.fmean(run["cpu_seconds"] for run in results.runs.values())
        done = (
            f"{len(results.runs)} runs of {results.settings['steps']} steps or more, {seconds:.0f} s of a core each. "
        )
    where = f"{results.settings['device']}, {results.hardware['cores']} cores"
    return f"{done}Hardware: {where}. Versions: {versions}."
