"""Tables and plots of benchmarks/convergence.py's results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convergence_methods import METHODS
from rate_report import DASH, Markers, Results, mean, rates_table, table

MARKERS = Markers("benchmarks/convergence.py")
BEGIN, END = MARKERS.begin, MARKERS.end
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
}


def tables(results: Results) -> str:
    parts = [_task_table(results, task) for task in results.settings["tasks"]]
    parts += [_alignment_table(results)]
    parts += [rates_table(results, task) for task in results.settings["tasks"]]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    run_seconds = sum(run["cpu_seconds"] for run in results.runs.values())
    parts.append(
        f"{len(results.runs)} runs of {results.settings['steps']} steps in {results.wall_seconds / 60:.1f} minutes on "
        f"{results.hardware['cores']} cores ({run_seconds / len(results.runs):.0f} s of one core each). "
        f"Versions: {versions}."
    )
    return "\n\n".join(parts) + "\n"


def _task_table(results: Results, task: str) -> str:
    common = results.settings["common_lr"]
    targets = [curve[-1][1] for curve in results.curves(task, "lora", results.best_lr(task, "lora"))]
    rows = []
    for method in results.methods:
        lr = results.best_lr(task, method)
        rows.append(
            [
                METHODS[method].label,
                METHODS[method].scaling,
                f"{lr:g}",
                *_losses(results, task, method, lr, results.best_lr(task, "lora")),
                _steps(results.curves(task, method, lr), targets),
                *_losses(results, task, method, common, common),
            ]
        )
    start = results.runs[task, "full", results.seeds[0], common]["curve"][0][1]
    head = ["", "s", "best rate", "loss at its best rate", f"{_MINUS}LoRA", "steps to LoRA's loss"]
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
    for method in results.methods:
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


def write_plots(results: Results, directory: Path) -> None:
    """convergence_curves.svg and convergence_rates.svg; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "convergence", "svg.fonttype": "none"}
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    tasks = results.settings["tasks"]
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
    for method in results.methods:
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
    for method in results.methods:
        found = {lr: loss for lr, loss in results.rates(task, method).items() if loss is not None}
        axis.plot(list(found), list(found.values()), label=_label(method), marker="o", markersize=3, **_STYLES[method])
        rates |= found.keys()
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(sorted(rates), [f"{lr:g}" for lr in sorted(rates)], rotation=45, fontsize=8)
    axis.set_xlabel(f"learning rate; loss after {results.settings['steps']} steps, seed {results.seeds[0]}")


def _label(method: str) -> str:
    return METHODS[method].label.replace("`", "")
