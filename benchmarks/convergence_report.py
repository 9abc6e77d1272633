"""Tables and plots of benchmarks/convergence.py's results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from convergence_methods import METHODS

from loraga_dist.errors import UserError

BEGIN, END = "<!-- written by benchmarks/convergence.py -->", "<!-- end of what it writes -->"
_DASH = "–"
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


class Results:
    """What a results file holds, by task, method, seed and learning rate."""

    def __init__(self, entries: Sequence[dict[str, Any]]) -> None:
        header = entries[0]
        self.settings: dict[str, Any] = header["settings"]
        self.hardware: dict[str, Any] = header["hardware"]
        self.versions: dict[str, str] = header["versions"]
        self.seeds: list[int] = self.settings["seeds"]
        self.wall_seconds = sum(entry["wall_seconds"] for entry in entries if entry["kind"] == "session")
        self.runs = {
            (entry["task"], entry["method"], entry["seed"], entry["lr"]): entry
            for entry in entries
            if entry["kind"] == "run"
        }
        self.methods = [method for method in METHODS if any(method == key[1] for key in self.runs)]
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

    def final_losses(self, task: str, method: str, lr: float) -> list[float]:
        """Of every seed; empty if one of them diverged."""
        losses = [self.runs[task, method, seed, lr]["final_loss"] for seed in self.seeds]
        return [] if None in losses else losses

    def curves(self, task: str, method: str, lr: float) -> list[list[tuple[int, float]]]:
        return [self.runs[task, method, seed, lr]["curve"] for seed in self.seeds]


def write_tables(results: Results, path: Path) -> None:
    """Replace what stands between our markers in `path`, or write a new file with nothing else."""
    before, after = split_document(path)
    path.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}", encoding="utf-8")


def split_document(path: Path) -> tuple[str, str]:
    """What stands before and after our markers; raises UserError for a document without them."""
    text = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError("--markdown", str(path), f"has no lines {BEGIN!r} and {END!r}; add them, or name a new file")
    return before, after


def tables(results: Results) -> str:
    parts = [_task_table(results, task) for task in results.settings["tasks"]]
    parts += [_alignment_table(results)]
    parts += [_rates_table(results, task) for task in results.settings["tasks"]]
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
    return f"Task `{task}`, loss {start:.3f} before training:\n\n" + _table(head, rows)


_MINUS = "− "


def _losses(results: Results, task: str, method: str, lr: float, lora_lr: float) -> list[str]:
    """Mean and standard deviation over seeds, and the same of the difference from LoRA on the same data."""
    losses = results.final_losses(task, method, lr)
    if not losses:
        return ["diverged", _DASH]
    if method == "lora":
        return [_mean(losses), ""]
    differences = [loss - base for loss, base in zip(losses, results.final_losses(task, "lora", lora_lr), strict=True)]
    return [_mean(losses), _mean(differences, sign="+")]


def _mean(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}".replace("-", "−") + spread


def _steps(curves: Sequence[Sequence[tuple[int, float]]], targets: Sequence[float]) -> str:
    """Mean number of steps until the loss first is that of LoRA's end on the same seed; seeds that never get there."""
    found = [steps_to(curve, target) for curve, target in zip(curves, targets, strict=True)]
    reached = [steps for steps in found if steps is not None]
    if not reached:
        return _DASH
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
        cosines = [_mean([a["cosine"] for a in found[task]]) for task in tasks]
        note = _DASH if not any(moved) else ", ".join(f"{m:.1%} ({c:+.2f})" for m, c in zip(moved, start, strict=True))
        rows.append([METHODS[method].label, *cosines, note.replace("-", "−")])
    seed = results.seeds[0]
    best = [f"{results.alignments[task, 'full', seed]['best_cosine']:.3f}" for task in tasks]
    rows.append([f"the best of rank {2 * results.settings['r']}", *best, ""])
    head = ["first update", *(f"cosine, `{task}`" for task in tasks), "the start itself moves W by (cosine)"]
    return "Cosine of the first update with full fine-tuning's:\n\n" + _table(head, rows)


def _rates_table(results: Results, task: str) -> str:
    methods = results.methods
    searched = {method: results.rates(task, method) for method in methods}
    rates = sorted({lr for found in searched.values() for lr in found})
    rows = []
    for method, found in searched.items():
        best = results.best_lr(task, method)
        cells = []
        for lr in rates:
            loss = found.get(lr)
            shown = ("diverged" if loss is None else f"{loss:.3f}") if lr in found else ""
            cells.append(f"**{shown}**" if lr == best else shown)
        rows.append([METHODS[method].label, *cells])
    head = ["learning rate", *(f"{lr:g}" for lr in rates)]
    return f"The search, `{task}`, seed {results.seeds[0]}:\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


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
