"""docs/PLANS.md: plans of the recipes in configs/, from config shapes alone.

usage: python benchmarks/plans.py [--json FILE] > docs/PLANS.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from loraga_dist.config import load_config
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.report import PlanReport

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
CASES = (
    # recipe, ranks, GiB per rank, r
    ("llama-3-8b", 1, 80, 16),
    ("llama-3-8b", 2, 24, 16),
    ("qwen3-32b", 4, 80, 16),
    ("llama-3-70b", 8, 80, 16),
    ("llama-3-70b", 8, 80, 128),
    ("llama-3-70b", 8, 24, 16),
    ("llama-3-70b", 8, 24, 128),
    ("llama-3-405b", 16, 80, 16),
)
SPELLED_OUT = "llama-3-70b"


def make_plans() -> list[dict[str, Any]]:
    reports = []
    for recipe, ranks, gib_per_rank, r in CASES:
        shapes = ROOT / "benchmarks" / "shapes" / recipe
        config = load_config(
            ROOT / "configs" / f"{recipe}.yaml", ["--model.name_or_path", str(shapes), "--lora.r", str(r)]
        )
        forecaster = Forecaster.of_config(config, ranks, torch.device("cuda"))
        plan = PlanReport(forecaster=forecaster, gib_per_rank=gib_per_rank).as_json()
        plan["model"]["name_or_path"] = f"benchmarks/shapes/{recipe}"
        reports.append({"recipe": recipe, "r": r} | plan)
    return reports


def document(plans: list[dict[str, Any]]) -> str:
    lines = [
        "# Plans",
        "",
        "What the recipes in `configs/` take, from the models' public shapes: no weights were read, none of these ran.",
        "Written by `python benchmarks/plans.py`. For one of them, with its tables:",
        "",
        "```bash",
        "loraga-dist plan --config configs/llama-3-70b.yaml --model.name_or_path benchmarks/shapes/llama-3-70b \\",
        "    --ranks 8 --gib_per_rank 80",
        "```",
        "",
        "bfloat16, all linear layers, 256 sequences of 1024 tokens at most, one per microbatch, checkpointing. GiB per",
        "rank, of the rank that needs most. A plan *fits* up to 90 % of the memory; up to 110 % it is *tight*, because",
        "the plan is not more exact than that; beyond, `init` refuses.",
        "",
        "| recipe | r | ranks x GiB | weights | microbatch | engine | peak | not checkpointed | sweeps | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for plan in plans:
        memory = plan["memory_per_rank"]
        calibrate = memory["device_bytes"]["calibrate"]
        cells = [
            plan["recipe"],
            str(plan["r"]),
            f"{plan['ranks']} x {plan['gib_per_rank']}",
            *(_gib(calibrate[part]) for part in ("weights", "microbatch", "engine state")),
            _gib(memory["peak_bytes"]),
            _gib(memory["peak_bytes_without_checkpointing"]),
            str(plan["sweeps"]["count"]),
            plan["verdict"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "*Engine*: the state, within `gradient.state_budget_gib` (default 4; the larger recipes name their own).",
        "Targets beyond the budget take further sweeps over the data.",
        "",
        "| recipe | r | ranks | disk: residual base | factors | adapters | received per rank | flops |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for plan in plans:
        disk = plan["disk_bytes"]
        adapters = disk["loraga_init"] + disk["loraga_offset"]
        sizes = (disk["residual_base"], disk["factors"], adapters, sum(plan["traffic_bytes_per_rank"].values()))
        cells = [plan["recipe"], str(plan["r"]), str(plan["ranks"]), *map(_gib, sizes)]
        lines.append(f"| {' | '.join(cells)} | {sum(plan['flops'].values()):.2e} |")
    for plan in plans:
        if plan["recipe"] == SPELLED_OUT:
            lines += ["", *arithmetic(plan)]
        elif plan["advice"]:
            lines += ["", f"## {_title(plan)}", "", *_advice(plan)]
    return "\n".join(lines) + "\n"


def arithmetic(plan: dict[str, Any]) -> list[str]:
    """The peak in terms that can be checked by hand."""
    config = json.loads((ROOT / "benchmarks" / "shapes" / plan["recipe"] / "config.json").read_text())
    d, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    tokens = plan["calibration"]["tokens_per_sequence"] * plan["calibration"]["sequences_per_microbatch"]
    memory, state, targets = plan["memory_per_rank"], plan["sweeps"]["state_bytes"], plan["targets"]
    parts = memory["device_bytes"]["calibrate"]
    logits = (tokens - 1) * vocabulary
    sides = sum(kind["count"] * (kind["M"] + kind["N"]) for kind in targets)
    widths = " and ".join(str(width) for width in sorted({kind["width"] for kind in targets}))
    return [
        f"## {_title(plan)}",
        "",
        f"- Weights: {plan['model']['parameters']} x 2 bytes / {plan['ranks']} = {_gib(parts['weights'])} GiB.",
        f"- One microbatch: {_gib(parts['microbatch'])} GiB at its highest, run on shapes alone. It holds",
        f"  - the inputs of the blocks: {layers} x {tokens} x {d} x 2 bytes = {_gib(layers * tokens * d * 2)} GiB;",
        "  - around the loss, bfloat16 logits",
        f"    ({tokens} x {vocabulary} x 2 bytes = {_gib(tokens * vocabulary * 2)} GiB) and float32 ones, their",
        "    log-softmax and its gradient",
        f"    ({tokens - 1} x {vocabulary} x 4 bytes = {_gib(logits * 4)} GiB each);",
        f"  - or the gathered head, {vocabulary} x {d} x 2 bytes = {_gib(vocabulary * d * 2)} GiB, with the logits;",
        "  - or what one block recomputes for its backward, with its largest gathered matrix.",
        f"- Engine state, K = {widths}: M + N of {sum(kind['count'] for kind in targets)} targets add up to {sides}.",
        f"  The budget counts 8 bytes x K x {sides} and the error sketches, {_gib(sum(state))} GiB in all:",
        f"  {len(state)} sweep{'s' * (len(state) > 1)} of {_gib(max(state))} GiB at most."
        + " Of the 8 bytes a rank holds 6,",
        f"  and 2 more (bases in 32 bits) of the targets it owns: {_gib(parts['engine state'])} GiB.",
        f"- Sum: {_gib(sum(parts.values()))} GiB while it calibrates. The peak of all phases is"
        f" {_gib(memory['peak_bytes'])} GiB ({memory['peak_phase']}).",
        f"- On {plan['gib_per_rank']} GiB: {plan['verdict']}.",
        *_advice(plan),
    ]


def _advice(plan: dict[str, Any]) -> list[str]:
    return [f"  - {line}" for line in plan["advice"]]


def _title(plan: dict[str, Any]) -> str:
    return f"{plan['recipe']} on {plan['ranks']} x {plan['gib_per_rank']} GiB, r = {plan['r']}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the plans here")
    options = parser.parse_args()
    plans = make_plans()
    print(document(plans), end="")
    if options.json:
        options.json.write_text(json.dumps(plans, indent=2) + "\n")


if __name__ == "__main__":
    main()
