"""What taps on experts cost: a forward and backward of a mixture of experts, without them, with them, and with engines.

    python benchmarks/experts_cost.py            # a minute on one core
    python benchmarks/experts_cost.py --quick    # seconds

A random float32 Qwen3-MoE of 4 layers, d = 512, 32 experts of 256, 4 for a token, on 8 texts of 512 tokens; every
expert and every linear layer is a target, r = 8. Weights are frozen, backward goes to the embeddings. All ways are
timed in turn, in one process on one thread, and the best of each counts. Engines are within a window: what a refresh
takes is not in it, nor what making their state does.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loraga_dist.artifacts.report import versions
from loraga_dist.config import LoraSection, MethodConfig
from loraga_dist.engines.group import EngineGroup
from loraga_dist.engines.home import StateHome
from loraga_dist.gradients.experts import Sink
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.plan import make_plan
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import Target, meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.schemes import SCHEMES

R = 8
FULL = {"hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 4, "num_experts": 32, "tokens": 512}
QUICK = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 4, "tokens": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model")
    options = parser.parse_args()
    shape = dict(QUICK if options.quick else FULL)
    tokens = shape.pop("tokens")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=shape["hidden_size"] // 8,
        intermediate_size=2 * shape["hidden_size"], num_experts_per_tok=4, tie_word_embeddings=False, **shape,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    seconds = measure(ways(model, torch.randint(1024, (8, tokens))), options.repeats)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} M parameters; versions {versions()}")
    print("| | seconds of a core | x without taps |\n|---|---:|---:|")
    without = next(iter(seconds.values()))
    for name, best in seconds.items():
        print(f"| {name} | {best:.2f} | {best / without:.2f} |")


def ways(model: nn.Module, ids_BT: torch.Tensor) -> dict[str, Callable[[], None]]:
    """By name, a forward and backward; the first is what others are compared with."""
    lora = LoraSection(r=R, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    targets = select_targets(meta_copy(type(model), model.config), lora, SCHEMES["lora_ga"].num_triplets).targets
    own = model.get_experts_implementation()  # type: ignore[operator]

    def run() -> None:
        embedded = model.get_input_embeddings()(ids_BT).requires_grad_()  # type: ignore[operator]
        model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()

    def with_sink(sink: Sink) -> None:
        with tapped(model, [target.name for target in targets], sink, checkpointing="none"):
            run()

    def eagerly() -> None:
        model.set_experts_implementation("eager")  # type: ignore[operator]
        try:
            run()
        finally:
            model.set_experts_implementation(own)  # type: ignore[operator]

    exact, sketch = (_engines(engine, targets) for engine in ("exact", "sketch"))
    for engines in (exact, sketch):  # which leaves the first bases behind
        with_sink(_sink_of(engines))
        for group in engines:
            group.end_microbatch(World.alone())
            group.begin_microbatch(1)
    return {
        "no taps": run,
        "no taps, eager experts": eagerly,
        "taps, and nothing done": lambda: with_sink(lambda *_: None),
        "taps, exact": lambda: with_sink(_sink_of(exact)),
        "taps, sketch": lambda: with_sink(_sink_of(sketch)),
    }


def _engines(name: str, targets: list[Target]) -> list[EngineGroup]:
    """Of all targets, in their first microbatch."""
    plan = make_plan(targets, MethodConfig.model_validate({"gradient": {"engine": name}}), 1)
    home = StateHome(torch.device("cpu"))
    groups = [EngineGroup.of(group, home=home, seed=0, dtype=torch.float32) for group in plan.groups]
    for group in groups:
        group.begin_microbatch(0)
    return groups


def _sink_of(groups: list[EngineGroup]) -> Sink:
    of = {name: group for group in groups for name in group.engine_of}
    return lambda name, x, dy: of[name].observe(name, x, dy)


def measure(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of a core, the best of several turns."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            found[name].append(time.process_time() - began)
    return {name: min(times) for name, times in found.items()}


if __name__ == "__main__":
    main()
