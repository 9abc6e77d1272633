"""docs/PLANS.md: plans of the recipes in configs/, from config shapes alone.

usage: python benchmarks/plans.py [--json FILE] > docs/PLANS.md
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraga_dist.config import load_config
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.report import PlanReport
from loraga_dist.forecast.ways import Room
from loraga_dist.gradients.head import LOGITS_AT_ONCE

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
CASES = (
    # recipe, ranks, GiB per rank, r
    ("llama-3-8b", 1, 80, 16),
    ("llama-3-8b", 2, 24, 16),
    ("qwen3-32b", 4, 80, 16),
    ("llama-3-70b", 1, 80, 16),
    ("llama-3-70b", 8, 80, 16),
    ("llama-3-70b", 8, 80, 128),
    ("llama-3-70b", 8, 24, 16),
    ("llama-3-70b", 8, 24, 128),
    ("llama-3-405b", 16, 80, 16),
)
CASES_OF_EXPERTS = (
    # recipe, ranks, GiB per rank, r
    ("qwen3-30b-a3b", 8, 80, 8),
    ("gpt-oss-120b", 8, 80, 8),
    ("glm-4.5-air", 8, 80, 8),
    ("llama-4-scout", 8, 80, 8),
    ("deepseek-v3", 32, 80, 8),
)
SCHEMES_OF_EXPERTS = ("lora_ga", "rrr")
REFUSED = ("llama-4-scout", "rrr")
"""A of its experts is on the side of their outputs."""
SPELLED_OUT = "llama-3-70b"
PHASES = ("forward", "loss", "backward")
LINK_GBPS = 200
BEFORE = [
    "--gradient.order",
    "model",
    "--gradient.checkpointing",
    "non_reentrant",
    "--gradient.state_budget_gib",
    "1000",
]
"""Each microbatch through the whole model, all targets at a time."""


def make_plans() -> list[dict[str, Any]]:
    return [_plan(*case) | {"before": _plan(*case, before=True) if case[1] > 1 else None} for case in CASES]


def make_plans_of_experts() -> list[dict[str, Any]]:
    return [
        _plan(*case, scheme=scheme)
        for case in CASES_OF_EXPERTS
        for scheme in SCHEMES_OF_EXPERTS
        if (case[0], scheme) != REFUSED
    ]


def _plan(
    recipe: str, ranks: int, gib_per_rank: int, r: int, *, scheme: str = "lora_ga", before: bool = False
) -> dict[str, Any]:
    forecaster = replace(_forecaster(recipe, r, scheme, before), world_size=ranks)
    limit_bytes = gib_per_rank * GIB
    if before:  # without what else could be done about it
        forecaster = forecaster.fitting(Room(device_bytes=limit_bytes))
    report = PlanReport(forecaster=forecaster, gib_per_rank=None if before else gib_per_rank, link_gbps=LINK_GBPS)
    plan = report.as_json()
    plan["model"]["name_or_path"] = f"benchmarks/shapes/{recipe}"
    stages = Counter(report.plan.order.stage_of(group[0].name) for group in report.plan.groups)
    plan["groups"]["most_in_a_block"] = max(stages.values())
    return {"recipe": recipe, "r": r} | plan


@functools.cache
def _forecaster(recipe: str, r: int, scheme: str, before: bool) -> Forecaster:
    """Of some number of ranks."""
    overrides = ["--model.name_or_path", str(ROOT / "benchmarks" / "shapes" / recipe), "--lora.r", str(r)]
    overrides += ["--init.scheme", scheme]
    config = load_config(ROOT / "configs" / f"{recipe}.yaml", [*overrides, *(BEFORE if before else [])])
    return Forecaster.of_config(config, 1, torch.device("cuda"))


def document(plans: list[dict[str, Any]], plans_of_experts: list[dict[str, Any]]) -> str:
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
        "bfloat16, all linear layers, 256 sequences of 1024 tokens at most, one per microbatch. GiB per rank, of the",
        "rank that needs most, in the phase in which it does. A plan *fits* up to 90 % of the memory; up to 110 % it",
        "is *tight*, because the plan is not more exact than that; beyond, `init` refuses.",
        "",
        "| recipe | r | ranks x GiB | way | weights | gathered | microbatch | engine | peak | in | host | verdict |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---|---:|---|",
    ]
    for plan in plans:
        cells = [
            *_case(plan),
            _way(plan),
            *_memory_cells(plan),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "*Weights*: a rank's shards; from disk there are none on the device. *Gathered*: the block that computes, and",
        "in *forward* what lies outside all blocks. *Engine*: the state of the targets that are accumulated together,",
        "in block order those of one block, if `gradient.state_budget_gib` has room for them.",
        "*Host*: mostly the inputs of all blocks in all microbatches of a rank, which backward starts from; where the",
        "host has no room for them they go to files, or microbatches go through the blocks in several chunks.",
        "",
        "| recipe | r | ranks | disk: residual base | factors | adapters | flops |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for plan in plans:
        disk = plan["disk_bytes"]
        sizes = (disk["residual_base"], disk["factors"], disk["loraga_init"] + disk["loraga_offset"])
        cells = [plan["recipe"], str(plan["r"]), str(plan["ranks"]), *map(_gib, sizes)]
        lines.append(f"| {' | '.join(cells)} | {sum(plan['flops'].values()):.2e} |")
    lines += ["", *experts(plans_of_experts), "", *comparison(plans)]
    for plan in plans:
        if plan["recipe"] == SPELLED_OUT and plan["order"]["name"] == "block":
            lines += ["", *arithmetic(plan)]
        elif plan["advice"]:
            lines += ["", f"## {_title(plan)}", "", *_advice(plan)]
    return "\n".join(lines) + "\n"


def experts(plans: list[dict[str, Any]]) -> list[str]:
    """Of the models that are mixtures of experts, which are targets, too."""
    lines = [
        "## Mixtures of experts",
        "",
        "An expert's matrix is a target of its own. *Tokens*: what an expert sees of the data where routing is even.",
        "*Groups*: what a block's targets are cut into, so that their state fits 4 GiB; the block runs again for each.",
        "It is gathered whole, with all its experts. *Received*: GiB of each rank. The other columns are those above.",
        "",
        "| recipe | scheme | billion parameters | experts a layer | targets | tokens | groups | ranks x GiB | weights |"
        " gathered | microbatch | engine | peak | in | host | verdict |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---|",
    ]
    for plan in plans:
        kind = next(kind for kind in plan["targets"] if kind["experts"])
        cells = [
            plan["recipe"],
            plan["scheme"],
            f"{plan['model']['parameters'] / 1e9:.1f}",
            f"{kind['experts_per_token']} of {kind['experts']}",
            str(sum(kind["count"] for kind in plan["targets"])),
            str(kind["tokens_each"]),
            str(plan["groups"]["most_in_a_block"]),
            f"{plan['ranks']} x {plan['gib_per_rank']}",
            *_memory_cells(plan),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| recipe | scheme | disk: residual base | factors | adapters | flops | of it engines | received |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for plan in plans:
        disk, flops = plan["disk_bytes"], sum(plan["flops"].values())
        sizes = (disk["residual_base"], disk["factors"], disk["loraga_init"] + disk["loraga_offset"])
        received = sum(plan["traffic_bytes_per_rank"].values()) / GIB
        cells = [plan["recipe"], plan["scheme"], *map(_gib, sizes), f"{flops:.2e}"]
        lines.append(f"| {' | '.join(cells)} | {100 * plan['flops']['engine'] / flops:.0f} % | {received:.0f} |")
    for plan in plans:
        if plan["advice"]:
            lines += ["", f"{plan['scheme']} of {_title(plan)}:", "", *_advice(plan)]
    return lines


def comparison(plans: list[dict[str, Any]]) -> list[str]:
    """Of the two orders, where ranks share the model."""
    lines = [
        "## Block order and model order",
        "",
        "What block order changes where ranks share a model: the same recipes with `gradient.order: model`, blocks",
        "recomputed in backward and all targets in one sweep, whose state waits on the host where it would fill half",
        "of the device. Received: GiB of each rank, weights and all else; seconds: of that alone, at",
        f"{LINK_GBPS} Gbit/s per rank.",
        "",
        "| recipe | r | ranks x GiB | peak: model order | block order | received: model order | block order |"
        " seconds: model order | block order |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for plan in plans:
        if plan["ranks"] > 1:
            both = (plan["before"], plan)
            cells = [
                *_case(plan),
                *(_gib(each["memory_per_rank"]["peak_bytes"]) for each in both),
                *(f"{sum(each['traffic_bytes_per_rank'].values()) / GIB:.0f}" for each in both),
                *(f"{each['link_seconds']:.0f}" for each in both),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def arithmetic(plan: dict[str, Any]) -> list[str]:
    """The peak in terms that can be checked by hand."""
    config = json.loads((ROOT / "benchmarks" / "shapes" / plan["recipe"] / "config.json").read_text())
    d, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    calibration, order = plan["calibration"], plan["order"]
    tokens = calibration["tokens_per_sequence"] * calibration["sequences_per_microbatch"]
    memory, targets, together = plan["memory_per_rank"], plan["targets"], order["microbatches_together"]
    forward, loss, backward = (memory["device_bytes"][phase] for phase in ("forward", "loss", "backward"))
    outside = 2 * vocabulary * d + d
    at_once = LOGITS_AT_ONCE // vocabulary
    parameters = plan["model"]["parameters"]
    weights = (
        f"- Weights stay on disk; on the host there are buffers for the {outside} parameters outside the blocks and for"
        f" two blocks: {_gib(memory['host_bytes']['forward']['weights'])} GiB."
        if order["from_disk"]
        else f"- Weights: {parameters} x 2 bytes / {plan['ranks']} = {_gib(forward['weights'])} GiB."
    )
    return [
        f"## {_title(plan)}",
        "",
        weights,
        f"- Gathered: a block, ({parameters} - {outside}) x 2 bytes / {layers} = {_gib(backward['gathered'])} GiB, and",
        f"  in forward embedding, last norm and head, {outside} x 2 bytes = {_gib(loss['gathered'])} GiB, too.",
        f"- One microbatch in a block: {_gib(forward['microbatch'])} GiB forward, {_gib(backward['microbatch'])} GiB"
        " backward, run on shapes alone.",
        f"- Loss: {_gib(loss['microbatch'])} GiB, of {at_once} tokens at a time: logits in bfloat16 and their gradient",
        f"  ({at_once} x {vocabulary} x 2 bytes = {_gib(2 * at_once * vocabulary)} GiB each), and in float32 logits,",
        f"  their log-softmax and its gradient ({_gib(4 * at_once * vocabulary)} GiB each), not all at the same time.",
        f"- Gradients between blocks, of {together} microbatches before and behind one:",
        f"  2 x {together} x {tokens} x {d} x 2 bytes = {_gib(4 * together * tokens * d)} GiB.",
        "- Engine state of a block, MiB as the budget counts:",
        *(
            f"  - {kind['module']} {kind['state_bytes_each'] / 2**20:.1f} ({kind['engine']}, K = {kind['width']})"
            for kind in targets
        ),
        "",
        f"  {_gib(max(plan['groups']['state_bytes']))} GiB in all, of which the rank holds"
        f" {_gib(backward['engine state'])} GiB.",
        f"- Inputs of the {layers} blocks and of the head, on the host:",
        f"  {together} x {layers + 1} x {tokens} x {d} x 2 bytes = {_gib(order['kept_bytes'])} GiB.",
        *(f"- Sum in {phase}: {_gib(sum(memory['device_bytes'][phase].values()))} GiB." for phase in PHASES),
        f"- On {plan['gib_per_rank']} GiB: {plan['verdict']}.",
        *_advice(plan),
    ]


def _memory_cells(plan: dict[str, Any]) -> list[str]:
    """Of a rank's peak its parts, GiB, and the phase; the host's, and whether it fits."""
    memory = plan["memory_per_rank"]
    parts = memory["device_bytes"][memory["peak_phase"]]
    return [
        *(_gib(parts.get(part, 0)) for part in ("weights", "gathered", "microbatch", "engine state")),
        _gib(memory["peak_bytes"]),
        memory["peak_phase"],
        _gib(memory["host_peak_bytes"]),
        plan["verdict"],
    ]


def _case(plan: dict[str, Any]) -> list[str]:
    return [plan["recipe"], str(plan["r"]), f"{plan['ranks']} x {plan['gib_per_rank']}"]


def _way(plan: dict[str, Any]) -> str:
    order = plan["order"]
    recomputed = ", recomputed" * (order["checkpointing"] == "non_reentrant")
    return f"{order['name']}{', from disk' * order['from_disk']}{recomputed}"


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
    plans, plans_of_experts = make_plans(), make_plans_of_experts()
    print(document(plans, plans_of_experts), end="")
    if options.json:
        options.json.write_text(json.dumps([*plans, *plans_of_experts], indent=2) + "\n")


if __name__ == "__main__":
    main()
