"""What a LoRA-GA start costs beside the forward and backward it needs anyway, and beside PEFT's.

    python benchmarks/init_cost.py --json init_cost.json      # about 9 minutes on two cores
    python benchmarks/init_cost.py --quick                    # a small model, seconds
    python benchmarks/init_cost.py --sweep --json sweep.json  # how cost grows; plots go to docs/plots/
    python benchmarks/init_cost.py --sweep --dtype float32    # where the processor multiplies no bfloat16

In turns, `--repeats` times: *floor* (forward and input gradients alone), *sketch* (ours: calibrate and factorize),
*rrr* (the same for reduced-rank regression), *peft* (stock `preprocess_loraga` and `get_peft_model`); *exact* (ours
with the exact engine) once, as the truth about energies. Same model, same batches, no checkpointing, medians. One layer
of Llama-2-7B, 32 microbatches of 512 tokens.
The sweep has *auto*, too: ours with the engine that costs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cost_runs import Bench, Outcome, Shape, mean, one_process, step_energy
from memory import hardware
from rank_cost import DTYPES
from rank_cost import SHAPE as SWEEP_BASE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchrun import json_of_ranks

from loraga_dist.artifacts.report import versions
from loraga_dist.ranks.memory import return_freed_memory_at_once

LLAMA_2_7B_LAYER = Shape(
    hidden=4096, intermediate=11008, layers=1, heads=32, key_value_heads=32, microbatches=32, tokens=512
)
QUICK = Shape(hidden=512, intermediate=1376, layers=1, heads=8, key_value_heads=8, microbatches=8, tokens=256)
SWEEPS: dict[str, list[Shape]] = {
    "tokens": [replace(SWEEP_BASE, tokens=tokens) for tokens in (128, 256, 512)],
    "hidden": [
        replace(SWEEP_BASE, hidden=hidden, intermediate=hidden * 43 // 16, layers=1) for hidden in (512, 1024, 2048)
    ],
    "r": [replace(SWEEP_BASE, r=r) for r in (4, 8, 16, 32)],
    "layers": [replace(SWEEP_BASE, layers=layers) for layers in (1, 2, 4)],
}
"""By what grows. Widths keep Llama's proportions."""
RANKS = (1, 2, 4)

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--sweep", action="store_true", help="growth in tokens, width, rank, layers and ranks instead")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="where --sweep puts its plots")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return_freed_memory_at_once()
    if options.sweep:
        points = sweep(options.repeats, DTYPES[options.dtype], quick=options.quick)
        content: dict[str, Any] = {"points": points, "dtype": options.dtype}
        plot(content["points"], options.plots)
        write(content, options.json)
    else:
        shape = QUICK if options.quick else LLAMA_2_7B_LAYER
        for content in compare(shape, options.repeats, DTYPES[options.dtype]):
            show(content)
            write(content | {"dtype": options.dtype}, options.json)


def write(content: dict[str, Any], path: Path | None) -> None:
    content |= {"hardware": hardware(), "threads": torch.get_num_threads(), "versions": versions()}
    if path:
        path.write_text(json.dumps(content, indent=2) + "\n")


def compare(shape: Shape, repeats: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The figures so far, after every repeat; with energies at last, when the exact gradients are there."""
    bench = Bench(shape, one_process(torch.device("cpu")), dtype)
    bench.warm_up()
    runs: dict[str, list[Outcome]] = {"floor": [], "sketch": [], "rrr": [], "peft": []}
    for repeat in range(repeats):
        for way, outcomes in runs.items():
            outcomes.append(bench.sketch(place=repeat == 0) if way == "sketch" else getattr(bench, way)())
            last = outcomes[-1]
            print(
                f"{way}: {last.seconds:.1f} s, {last.cpu_seconds:.1f} s of cores, {last.peak_bytes >> 20} MiB",
                flush=True,
            )
        yield {"shape": asdict(shape), "runs": figures(runs, {})}
    runs["exact"] = [bench.exact()]
    yield {"shape": asdict(shape), "runs": figures(runs, runs["exact"][0].gradients)}


def figures(runs: dict[str, list[Outcome]], gradients: dict[str, Tensor]) -> dict[str, Any]:
    """gradients: the truth about energies, or nothing."""
    floor_bytes = medians(runs["floor"])[1]
    rows: dict[str, Any] = {}
    for way, outcomes in runs.items():
        seconds, peak_bytes = medians(outcomes)
        rows[way] = {
            "seconds": [outcome.seconds for outcome in outcomes],
            "median_seconds": seconds,
            "cpu_over_floor": ratio(outcomes, runs["floor"], "cpu_seconds"),
            "cpu_over_peft": ratio(outcomes, runs["peft"], "cpu_seconds"),
            "cpu_over_sketch": ratio(outcomes, runs["sketch"], "cpu_seconds"),
            "cpu_seconds": [outcome.cpu_seconds for outcome in outcomes],
            "over_floor": ratio(outcomes, runs["floor"], "seconds"),
            "over_peft": ratio(outcomes, runs["peft"], "seconds"),
            "peak_bytes": [outcome.peak_bytes for outcome in outcomes],
            "extra_bytes": peak_bytes - floor_bytes,
            "details": [outcome.details for outcome in outcomes],
        }
    energies = {
        way: mean([step_energy(G_MN, *outcomes[0].directions[target]) for target, G_MN in gradients.items()])
        for way, outcomes in runs.items()
        if gradients and outcomes[0].directions
    }
    for way, energy in energies.items():
        rows[way] |= {"captured_energy": energy, "share_of_exact": energy / energies["exact"]}
    return rows


def medians(outcomes: list[Outcome]) -> tuple[float, float]:
    return (
        statistics.median(outcome.seconds for outcome in outcomes),
        statistics.median(outcome.peak_bytes for outcome in outcomes),
    )


def ratio(outcomes: list[Outcome], others: list[Outcome], field: str) -> float:
    """Median over the turns, each by itself: a machine's speed drifts from turn to turn. *exact* stands by the last."""
    turns = zip(reversed(outcomes), reversed(others), strict=False)
    return statistics.median(getattr(outcome, field) / getattr(other, field) for outcome, other in turns)


def cpu_median(outcomes: list[Outcome]) -> float:
    return statistics.median(outcome.cpu_seconds for outcome in outcomes)


def show(content: dict[str, Any]) -> None:
    table = Table(title=f"{content['shape']}")
    for column in (
        "",
        "seconds",
        "x floor",
        "x PEFT",
        "x floor, of cores",
        "x PEFT, of cores",
        "x sketch, of cores",
        "extra MiB",
        "captured energy",
        "of exact's",
    ):
        table.add_column(column, justify="right")
    for name, row in content["runs"].items():
        energy = row.get("captured_energy")
        table.add_row(
            name,
            f"{row['median_seconds']:.2f}",
            f"{row['over_floor']:.3f}",
            f"{row['over_peft']:.3f}",
            f"{row['cpu_over_floor']:.3f}",
            f"{row['cpu_over_peft']:.3f}",
            f"{row['cpu_over_sketch']:.3f}",
            f"{row['extra_bytes'] / 2**20:.0f}",
            "" if energy is None else f"{energy:.4f}",
            "" if energy is None else f"{row['share_of_exact']:.5f}",
        )
    console = Console()
    console.print(table)
    for details in content["runs"]["sketch"]["details"]:
        console.print({key: round(value, 3) for key, value in details.items() if key.startswith("seconds")})


def sweep(repeats: int, dtype: torch.dtype, *, quick: bool) -> list[dict[str, Any]]:
    points = []
    for quantity, shapes in SWEEPS.items():
        for shape in shapes[:2] if quick else shapes:
            bench = Bench(replace(shape, microbatches=4) if quick else shape, one_process(torch.device("cpu")), dtype)
            bench.warm_up()
            runs: dict[str, list[Outcome]] = {"floor": [], "auto": [], "sketch": [], "peft": []}
            for _ in range(repeats):
                for way, outcomes in runs.items():
                    outcomes.append(getattr(bench, way)())
            floor_bytes = medians(runs["floor"])[1]
            point: dict[str, Any] = {"quantity": quantity, "value": getattr(shape, quantity), "shape": asdict(shape)}
            point["engines"] = runs["auto"][0].details["engines"]
            point["auto_over_peft"] = ratio(runs["auto"], runs["peft"], "cpu_seconds")
            for name, outcomes in runs.items():
                seconds, peak_bytes = medians(outcomes)
                extra_bytes = peak_bytes - floor_bytes
                point[name] = {"seconds": seconds, "cpu_seconds": cpu_median(outcomes), "extra_bytes": extra_bytes}
            points.append(point)
            _tell(point)
    for num_ranks in RANKS[:2] if quick else RANKS:
        arguments = ["--repeats", str(repeats), "--dtype", str(dtype).removeprefix("torch.")]
        arguments += ["--quick"] if quick else []
        points.append(json_of_ranks(Path(__file__).with_name("rank_cost.py"), num_ranks, *arguments))
        _tell(points[-1])
    return points


def _tell(point: dict[str, Any]) -> None:
    ways = (f"{way} {point[way]['cpu_seconds']:.2f} s" for way in ("floor", "auto", "sketch", "peft") if way in point)
    print(f"{point['quantity']} {point['value']}: {', '.join(ways)}", flush=True)


def plot(points: list[dict[str, Any]], directory: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "tokens": "tokens per microbatch",
        "hidden": "hidden size",
        "r": "LoRA rank r",
        "layers": "layers",
        "ranks": "ranks, ZeRO-3",
    }
    colors = {"floor": "#888888", "auto": "#3a8f5c", "sketch": "#1b6ca8", "peft": "#c8553d"}
    names = {"floor": "forward + input gradients", "auto": "loraga_dist", "sketch": "its sketch", "peft": "PEFT"}
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loraga_dist", "font.size": 9})
    for metric, unit, scale in (
        ("cpu_seconds", "seconds of cores", 1.0),
        ("extra_bytes", "MiB above the floor's peak", 2**20),
    ):
        figure, all_axes = plt.subplots(1, len(labels), figsize=(13, 2.8), layout="constrained")
        for axes, (quantity, label) in zip(all_axes, labels.items(), strict=True):
            mine = [point for point in points if point["quantity"] == quantity]
            for name in names if metric == "cpu_seconds" else ("auto", "sketch", "peft"):
                known = [point for point in mine if name in point]
                if not known:  # PEFT does not run on a sharded model
                    continue
                values = [point[name][metric] / scale for point in known]
                axes.plot(
                    [point["value"] for point in known], values, "o-", ms=3, color=colors[name], label=names[name]
                )
            axes.set_xlabel(label)
            axes.set_xscale("log", base=2)
            axes.set_xticks([point["value"] for point in mine], [str(point["value"]) for point in mine])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].set_ylabel(unit)
        all_axes[0].legend(frameon=False, fontsize=8)
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / f"init_cost_{metric}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
