"""Tables and plots of benchmarks/convergence.py's results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from convergence_methods import FAIR, LONGER, METHODS, ROWS, STARTS
from rate_report import DASH, Markers, Results, mean, rates_table, table

_STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#1f2328", "linestyle": "--"},
    "lora": {"color": "#1f4e9c", "linewidth": 2.2},
    "rslora": {"color": "#2f7ed8"},
    "dora": {"color": "#35a3c4"},
    "lora_plus": {"color": "#4fb286"},
    "adalora": {"color": "#8a9a2b"},
    "pissa": {"color": "#9b6bcc"},
    "lora_one": {"color": "#c65b9e"},
    "lora_ga_exact": {"color": "#c62f2f", "linewidth": 2.2},
    "lora_ga_gamma_64": {"color": "#f08a8a"},
    "lora_ga_sketch": {"color": "#e0732e", "linestyle": ":", "linewidth": 2.2},
    "peft_lora_ga": {"color": "#d4a012"},
    "random": {"color": "#8c959f", "linestyle": "-."},
    "eva": {"color": "#7a5c3e"},
    "orthonormal": {"color": "#8c959f", "linestyle": ":"},
    "rrr": {"color": "#0f7b3f", "linewidth": 2.2},
    "rrr_diagonal": {"color": "#0f7b3f", "linestyle": "--"},
    "rrr_none": {"color": "#0f7b3f", "linestyle": ":"},
    "rrr_budget": {"color": "#0f7b3f", "linestyle": "-."},
    "rrr_plus": {"color": "#5fae3a"},
    "rrr_step": {"color": "#0b4f6c", "linewidth": 2.2},
}
FEW_SHOT = "few-shot"


def markers_of(results_file: Path) -> Markers:
    """A document may have the tables of several results files, each of another model."""
    return Markers(f"benchmarks/convergence.py from {results_file.name}")


def task_name(main_steps: int, text: str, length: int | str) -> str:
    """By which results know what is trained on. length: steps, or FEW_SHOT."""
    if length == main_steps:
        return text
    return f"{text}, {length}" if length == FEW_SHOT else f"{text}, {length} steps"


def tables(results: Results) -> str:
    texts, grid = results.settings["tasks"], results.on_grid()
    # what others are compared with
    whole = all({"full", "lora"} <= {*_in_table(grid, text)} for text in texts)
    parts = [*(_task_table(grid, text) for text in texts), _alignment_table(results)] if whole else []
    parts += [rates_table(grid, text) for text in texts if any(key[0] == text for key in grid.runs)]
    parts += [part for text in texts for part in _fair_tables(results, text)]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    run_seconds = sum(run["cpu_seconds"] for run in results.runs.values())
    parts.append(f"{len(results.runs)} runs, {run_seconds / 3600:.1f} hours of a core. Versions: {versions}.")
    return "\n\n".join(parts) + "\n"


def _in_table(results: Results, text: str) -> list[str]:
    """Methods of which all is there that the first tables show."""
    common = results.settings["common_lr"]
    return [method for method in METHODS if results.is_done(text, method) and results.has(text, method, common)]


def _task_table(results: Results, task: str) -> str:
    common = results.settings["common_lr"]
    targets = [curve[-1][1] for curve in results.curves(task, "lora", results.best_lr(task, "lora"))]
    rows = []
    for method in _in_table(results, task):
        lr = results.best_lr(task, method)
        rows.append(
            [
                METHODS[method].label,
                METHODS[method].scaling,
                f"{lr:g}",
                *_losses(results, task, method, lr, results.best_lr(task, "lora")),
                _steps(results.curves(task, method, lr), targets),
                _spread(results, task, method, lr),
                *_losses(results, task, method, common, common),
            ]
        )
    start = results.runs[task, "full", results.seeds[0], common]["curve"][0][1]
    head = [
        "",
        "s",
        "best rate",
        "loss at its best rate",
        f"{_MINUS}LoRA",
        "steps to LoRA's loss",
        "mean of half, best, twice",
    ]
    head += [f"loss at {common:g}", f"{_MINUS}LoRA"]
    return f"Task `{task}`, loss {start:.3f} before training:\n\n" + table(head, rows)


_MINUS = "− "


def _losses(results: Results, task: str, method: str, lr: float, lora_lr: float) -> list[str]:
    """Mean and standard deviation over seeds, and the same of the difference from LoRA on the same data."""
    losses = results.final_losses(task, method, lr)
    if not losses:
        return ["diverged", DASH]
    if method == "lora":
        return [mean(losses), ""]
    differences = [loss - base for loss, base in zip(losses, results.final_losses(task, "lora", lora_lr), strict=True)]
    return [mean(losses), mean(differences, sign="+")]


def _spread(results: Results, task: str, method: str, lr: float) -> str:
    """Each seed's mean over half, once and twice the rate; blank where one was not run."""
    rates = (lr / 2, lr, lr * 2)
    if not all(results.has(task, method, rate) for rate in rates):
        return ""
    losses = [results.final_losses(task, method, rate) for rate in rates]
    return mean([statistics.fmean(seed) for seed in zip(*losses, strict=True)]) if all(losses) else "diverged"


def _steps(curves: Sequence[Sequence[tuple[int, float]]], targets: Sequence[float]) -> str:
    """Mean number of steps until the loss first is that of LoRA's end on the same seed; seeds that never get there."""
    found = [steps_to(curve, target) for curve, target in zip(curves, targets, strict=True)]
    reached = [steps for steps in found if steps is not None]
    if not reached:
        return DASH
    missed = "" if len(reached) == len(found) else f" ({len(reached)} of {len(found)} seeds)"
    return f"{statistics.fmean(reached):.0f}{missed}"


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Steps until the loss is `target`, in a straight line between two checks; None if it never is."""
    for (step, loss), (next_step, next_loss) in zip(curve, curve[1:], strict=False):
        if next_loss <= target:
            return step + (next_step - step) * max(0.0, loss - target) / max(loss - next_loss, 1e-12)
    return None


def _alignment_table(results: Results) -> str:
    tasks = results.settings["tasks"]
    rows = []
    keys = results.alignments.keys()
    complete = {(task, seed) for task in tasks for seed in results.seeds}
    for method in METHODS:
        if complete - {(task, seed) for task, of, seed in keys if of == method}:
            continue
        found = {task: [results.alignments[task, method, seed] for seed in results.seeds] for task in tasks}
        moved = [statistics.fmean(a["start_change"] for a in found[task]) for task in tasks]
        start = [statistics.fmean(a["start_cosine"] for a in found[task]) for task in tasks]
        cosines = [mean([a["cosine"] for a in found[task]]) for task in tasks]
        note = DASH if not any(moved) else ", ".join(f"{m:.1%} ({c:+.2f})" for m, c in zip(moved, start, strict=True))
        rows.append([METHODS[method].label, *cosines, note.replace("-", "−")])
    seed = results.seeds[0]
    best = [f"{results.alignments[task, 'full', seed]['best_cosine']:.3f}" for task in tasks]
    rows.append([f"the best of rank {2 * results.settings['r']}", *best, ""])
    head = ["first update", *(f"cosine, `{task}`" for task in tasks), "the start itself moves W by (cosine)"]
    return "Cosine of the first update with full fine-tuning's:\n\n" + table(head, rows)


def _fair_tables(results: Results, text: str) -> list[str]:
    settings = results.settings
    lengths = sorted({settings["steps"], *settings["lengths"], settings["longest"]})
    tasks = {f"{steps} steps": task_name(settings["steps"], text, steps) for steps in lengths}
    tasks |= {FEW_SHOT: task_name(settings["steps"], text, FEW_SHOT)}
    found = {length: [method for method in FAIR if results.is_searched(task, method)] for length, task in tasks.items()}
    shown = {length: tasks[length] for length, methods in found.items() if methods}
    losses = [
        [ROWS[method].label, *(_loss_and_rate(results, task, method) for task in shown.values())]
        for method in FAIR
        if any(method in methods for methods in found.values())
    ]
    plain = [row.longer for row in LONGER.values() if row.longer]
    differences = [
        [
            f"{length}, {ROWS[start].label}",
            *_compared(results, task, start, plain),
            *_compared(results, task, start, LONGER),
        ]
        for length, task in shown.items()
        for start in STARTS
        if start in found[length]
    ]
    return [
        f"Loss at the best rate, `{text}`:\n\n" + table(["", *shown], losses),
        f"What a start brings, `{text}`:\n\n"
        + table(
            ["", f"{_MINUS}best of LoRA, rsLoRA, LoRA+", "seeds below", f"{_MINUS}best with more steps", "seeds below"],
            differences,
        ),
    ]


def _loss_and_rate(results: Results, task: str, method: str) -> str:
    if not results.is_searched(task, method):
        return ""
    lr = results.best_lr(task, method)
    losses = list(_by_seed(results, task, method).values())
    few = "" if len(losses) == len(results.seeds) else f", {len(losses)} of {len(results.seeds)} seeds"
    return f"{mean(losses) if math.inf not in losses else 'diverged'} at {lr:.3g}{few}"


def _by_seed(results: Results, task: str, method: str) -> dict[int, float]:
    """The final loss at the best rate of the seeds that ran there; one that diverged is infinite."""
    lr = results.best_lr(task, method)
    runs = {seed: results.runs.get((task, method, seed, lr)) for seed in results.seeds}
    return {
        seed: math.inf if run["final_loss"] is None else run["final_loss"]
        for seed, run in runs.items()
        if run is not None
    }


def _compared(results: Results, task: str, start: str, others: Iterable[str]) -> list[str]:
    """The difference from what is best of `others` in the mean of the seeds that all ran, and how many are below it."""
    if not all(results.is_searched(task, method) for method in others):
        return ["", ""]
    own = _by_seed(results, task, start)
    losses = {method: _by_seed(results, task, method) for method in others}
    seeds = [seed for seed in results.seeds if all(seed in of for of in (own, *losses.values()))]
    best = min(losses.values(), key=lambda of: sum(of[seed] for seed in seeds))
    differences = [own[seed] - best[seed] for seed in seeds]
    shown = mean(differences, sign="+") if all(map(math.isfinite, differences)) else "diverged"
    return [shown, f"{sum(d < 0 for d in differences)} of {len(seeds)}"]


def write_plots(results: Results, directory: Path) -> None:
    """convergence_curves.svg and convergence_rates.svg; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "convergence", "svg.fonttype": "none"}
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    results, tasks = results.on_grid(), results.settings["tasks"]
    for name, draw in (("convergence_curves", _draw_curves), ("convergence_rates", _draw_rates)):
        figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4.6), squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            draw(axis, results, task)
            axis.set_title(f"task {task}", fontsize=10)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("held-out loss, nats per byte")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=2 * len(tasks), frameon=False, fontsize=8.5)
        figure.tight_layout(rect=(0, 0.19 if len(tasks) > 1 else 0.3, 1, 1))
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _draw_curves(axis: Any, results: Results, task: str) -> None:
    for method in _in_table(results, task):
        curves = results.curves(task, method, results.best_lr(task, method))
        if not all(curves):
            continue
        steps = [step for step, _ in curves[0]][1:]
        losses = [[loss for _, loss in curve][1:] for curve in curves]
        axis.plot(
            steps, [statistics.fmean(at) for at in zip(*losses, strict=True)], label=_label(method), **_STYLES[method]
        )
        low, high = ([pick(at) for at in zip(*losses, strict=True)] for pick in (min, max))
        axis.fill_between(steps, low, high, color=_STYLES[method]["color"], alpha=0.12, linewidth=0)
    axis.set_xlabel(f"steps, each at its best learning rate; mean and range of {len(results.seeds)} seeds")


def _draw_rates(axis: Any, results: Results, task: str) -> None:
    rates = set()
    for method in _in_table(results, task):
        found = {lr: loss for lr, loss in results.rates(task, method).items() if loss is not None}
        axis.plot(list(found), list(found.values()), label=_label(method), marker="o", markersize=3, **_STYLES[method])
        rates |= found.keys()
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(sorted(rates), [f"{lr:g}" for lr in sorted(rates)], rotation=45, fontsize=8)
    axis.set_xlabel(f"learning rate; loss after {results.settings['steps']} steps, seed {results.seeds[0]}")


def _label(method: str) -> str:
    return METHODS[method].label.replace("`", "")
