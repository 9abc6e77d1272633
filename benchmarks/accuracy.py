"""How close one pass of the sketch engine comes to the exact gradient's optimum.

    make quickstart                                               # pretrains the model this measures on
    python benchmarks/accuracy.py --json accuracy.json            # starts 1, 2 and 4 ranks, one after the other
    python benchmarks/accuracy.py --ranks 2 --only real

Efficiency: the share of the best possible first LoRA step that the found directions take (`subspace.efficiency`). Mean
and worst over the targets of the quickstart model, default settings, and over seeds for the synthetic gradients.
Captured energy: how far the report's figure is from the truth, without sign, in the mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from subspace import efficiency
from torch import Tensor, nn
from torchrun import json_of_ranks
from transformers import AutoTokenizer
from transformers.utils import logging

from loraga_dist.artifacts.report import versions
from loraga_dist.config import CalibrationConfig, LoraSection, ModelConfig
from loraga_dist.data.losses import causal_lm
from loraga_dist.data.microbatches import Microbatch, SampleSharder, count_supervised_tokens
from loraga_dist.data.samples import load_samples
from loraga_dist.engines import ExactEngine, GradientEngine, Matrix, SketchEngine, StateHome
from loraga_dist.gradients.route import ModelOrder
from loraga_dist.model.base import BaseModel, find_base_model
from loraga_dist.model.selection import select_targets
from loraga_dist.model.shape import max_positions
from loraga_dist.model.targets import Target, meta_copy
from loraga_dist.ranks.session import run_as_rank
from loraga_dist.ranks.words import leave_process
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.single import SingleProcess
from loraga_dist.sharding.zero3 import Zero3

RANKS = (4, 8, 16, 32)
REFINES = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="build/quickstart", help="made by launch/quickstart.py")
    parser.add_argument("--only", choices=("real", "synthetic", "experts"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes for the model's gradients")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if "RANK" in os.environ:  # one of the ranks started below
        leave_process(run_as_rank(lambda world, stop: write_real(options, world)))
    rows = []
    if options.only in (None, "real"):
        for num_ranks in options.ranks:
            rows += json_of_ranks(__file__, num_ranks, "--directory", options.directory)
    if options.only in (None, "synthetic"):
        rows += synthetic()
    if options.only in (None, "experts"):
        rows += experts()
    if options.json:
        hardware = {"machine": platform.machine(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({"rows": rows, "hardware": hardware, "versions": versions()}, indent=2))


def write_real(options: argparse.Namespace, world: World) -> None:
    rows = real(Path(options.directory), world)
    if world.is_main:
        options.json.write_text(json.dumps(rows))


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model and the targets that both engines see."""

    base: BaseModel
    sharding: Sharding
    model: nn.Module
    targets: Sequence[Target]

    @classmethod
    def read(cls, directory: str, world: World) -> Loaded:
        base = find_base_model(ModelConfig(name_or_path=directory), "CAUSAL_LM", world.device)
        sharding = Zero3(world, None) if world.size > 1 else SingleProcess(world)
        model = sharding.load(base, base.stored(meta_copy(base.model_class, base.config)).as_it_is)
        targets = select_targets(meta_copy(base.model_class, base.config), LoraSection(), lambda r: 2 * r).targets
        return cls(base, sharding, model, targets)

    @property
    def world(self) -> World:
        return self.sharding.world

    def show(self, engines: Sequence[GradientEngine], microbatches: Sequence[Microbatch]) -> int:
        """One pass of all engines at once; returns all ranks' supervised tokens."""

        def observe(name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
            for engine in engines:
                engine.observe(name, x_TN, dy_TM)

        route = ModelOrder(self.model, causal_lm, sharding=self.sharding, checkpointing="none")
        names = [target.name for target in self.targets]
        with route.opened(), route.showing(microbatches, names, observe) as take:
            for microbatch in microbatches:
                for engine in engines:
                    engine.begin_microbatch(microbatch.index)
                take(microbatch)
                for engine in engines:
                    engine.end_microbatch(self.world)
        tokens = torch.tensor(sum(microbatch.num_supervised_tokens for microbatch in microbatches))
        return int(self.world.sum_(tokens.to(self.world.device)))

    def matrices(self, r: int) -> list[Matrix]:
        return [
            Matrix(
                name=target.name,
                M=target.M,
                N=target.N,
                num_triplets=2 * r,
                width=SketchEngine.width(2 * r, target.M, target.N, None),
                owner=index % self.world.size,
                engine="sketch",
            )
            for index, target in enumerate(self.targets)
        ]


def real(directory: Path, world: World) -> list[dict[str, Any]]:
    loaded = Loaded.read(str(directory / "model"), world)
    samples = load_samples(
        CalibrationConfig(data_files=str(directory / "calibration.jsonl"), max_length=256, max_samples=128),
        AutoTokenizer.from_pretrained(loaded.base.directory),
        task_type="CAUSAL_LM",
        max_positions=max_positions(loaded.model),
    )
    everything = SampleSharder(
        samples=samples,
        rank=world.rank,
        world_size=world.size,
        per_device_batch_size=4 // world.size or 1,
        pad_token_id=0,
    ).microbatches(0, len(samples), 0)
    data = {
        "all tokens": everything,
        "1 token a sequence": [_keep(microbatch, 1) for microbatch in everything],
    }
    return [
        row
        for name, microbatches in data.items()
        for row in sketch_rows(loaded, f"quickstart model, {name}", microbatches, RANKS, max(REFINES))
    ]


def sketch_rows(
    loaded: Loaded, gradients: str, microbatches: Sequence[Microbatch], ranks: Sequence[int], refine_passes: int
) -> list[dict[str, Any]]:
    """The sketch against the exact gradients of the same pass: a row by rank, after 0 to `refine_passes` more."""
    world, rows = loaded.world, []
    home = StateHome(world.device)
    exact = ExactEngine(loaded.matrices(1), home=home, seed=0, dtype=loaded.base.dtype)
    single = [SketchEngine(loaded.matrices(r), home=home, seed=0, dtype=loaded.base.dtype) for r in ranks]
    num_tokens = loaded.show([exact, *single], microbatches)
    after_passes = [single]
    for _ in range(refine_passes):
        refined = copy.deepcopy(after_passes[-1])
        for engine in refined:
            engine.begin_refinement(world)
        loaded.show(refined, microbatches)
        after_passes.append(refined)
    exact.collect(world)
    exact_gradients = {matrix.name: G_MN for matrix, G_MN in exact.mean_gradients(num_tokens)}
    energies = {target: torch.linalg.svdvals(G_MN.double()).square() for target, G_MN in exact_gradients.items()}
    few = num_tokens / len(microbatches) < SketchEngine.width(8, 256, 256, None)
    for passes, engines in enumerate(after_passes):
        for r, engine in zip(ranks, engines, strict=True):
            engine.collect(world)
            found = dict(engine.results(num_tokens))
            scores, misses = [], []
            for target, result in found.items():
                svd, energy = result.svd, energies[target]
                scores.append(efficiency(exact_gradients[target], svd.U_MK[:, r : 2 * r], svd.Vh_KN[:r].T))
                misses.append(abs(result.captured_energy - (energy[: 2 * r].sum() / energy.sum()).item()))
            rows.append(
                {
                    "gradients": gradients,
                    "ranks": world.size,
                    "r": r,
                    "K": max(result.svd.width for result in found.values()),
                    "refine_passes": passes,
                    "default": passes == int(few),
                    **_gathered(world, scores, misses),
                }
            )
            _show(rows[-1], world)
    return rows


def _keep(microbatch: Microbatch, tokens: int) -> Microbatch:
    """The same sequences with `tokens` supervised positions each, as completions of that length would have."""
    labels = torch.full_like(microbatch.inputs["labels"], -100)
    labels[:, 100 : 100 + tokens] = microbatch.inputs["labels"][:, 100 : 100 + tokens]
    return replace(
        microbatch,
        inputs=microbatch.inputs | {"labels": labels},
        num_supervised_tokens=count_supervised_tokens(labels, "CAUSAL_LM"),
    )


def synthetic(n: int = 1024, r: int = 8, microbatches: int = 32, tokens: int = 256) -> list[dict[str, Any]]:
    """Gradients of slow decay sigma_i = i^-a; a microbatch has n / tokens = 4 times their energy in noise."""
    rows = []
    cases = {f"i^-{a}": ([a], "shuffled") for a in (1.0, 0.75, 0.5)}
    cases |= {f"two tasks, {order}": ([0.75, 0.75], order) for order in ("shuffled", "sorted")}
    for name, (decays, order) in cases.items():
        # K = 3R, R = 2r, and the default rule
        for columns in (2 * r * 2, None):
            for refine_passes in REFINES:
                scores, misses = [], []
                for seed in (0, 1):
                    score, miss = _synthetic_run(
                        n, r, microbatches, tokens, decays, order, columns, refine_passes, seed
                    )
                    scores.append(score)
                    misses.append(miss)
                rows.append(
                    {
                        "gradients": f"synthetic {name}",
                        "ranks": 1,
                        "r": r,
                        "K": SketchEngine.width(2 * r, n, n, columns),
                        "refine_passes": refine_passes,
                        "default": columns is None and refine_passes == 0,
                        "mean": sum(scores) / len(scores),
                        "worst": min(scores),
                        "captured_energy_error": sum(misses) / len(misses),
                    }
                )
                _show(rows[-1], World.current())
    return rows


def _synthetic_run(
    n: int, r: int, microbatches: int, tokens: int, decays: list[float], order: str, columns: int | None,
    refine_passes: int, seed: int,
) -> tuple[float, float]:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    signals = []
    for decay in decays:
        U, V = (torch.linalg.qr(torch.randn(n, n, generator=draw)).Q for _ in range(2))
        signals.append(U * torch.arange(1, n + 1) ** -decay @ V.T)
    tasks = [index * len(decays) // microbatches for index in range(microbatches)]
    if order == "shuffled":
        tasks = [tasks[index] for index in torch.randperm(microbatches, generator=draw).tolist()]

    def stream(index: int) -> tuple[Tensor, Tensor]:
        # the mean of dy x^T is the signal; dy^T dy differs from its mean by n / tokens times its energy
        inner = torch.Generator().manual_seed(seed * 1000 + index)
        signal = signals[tasks[index]]
        dy_TM = torch.randn(tokens, n, generator=inner)
        noise_TN = torch.randn(tokens, n, generator=inner) * (3 * signal.square().sum() / n**2 * tokens / n).sqrt()
        return dy_TM @ signal / tokens + noise_TN / tokens, dy_TM

    G_MN = torch.zeros(n, n)
    for index in range(microbatches):
        x_TN, dy_TM = stream(index)
        G_MN += dy_TM.T @ x_TN
    world = World.current()
    matrix = Matrix(
        name="G", M=n, N=n, num_triplets=2 * r, width=SketchEngine.width(2 * r, n, n, columns), owner=0, engine="sketch"
    )
    engine = SketchEngine([matrix], home=StateHome(torch.device("cpu")), seed=seed, dtype=torch.float32)
    for refinement in range(refine_passes + 1):
        if refinement:
            engine.begin_refinement(world)
        for index in range(microbatches):
            engine.begin_microbatch(index)
            engine.observe("G", *stream(index))
            engine.end_microbatch(world)
    engine.collect(world)
    ((_, result),) = engine.results(1)
    energy = torch.linalg.svdvals(G_MN.double()).square()
    truth = (energy[: 2 * r].sum() / energy.sum()).item()
    score = efficiency(G_MN, result.svd.U_MK[:, r : 2 * r], result.svd.Vh_KN[:r].T)
    return score, abs(result.captured_energy - truth)


def experts(
    n: int = 512, r: int = 8, microbatches: int = 64, tokens: int = 2048, num_experts: int = 12
) -> list[dict[str, Any]]:
    """Experts of one stack, each of which is sent half as many tokens as the one before: one pass, and a refined one.

    Gradients and noise as of `synthetic`, i^-0.75; the truth is the gradient of the very rows that an expert saw.
    """
    matrices = [
        Matrix(
            name=str(expert),
            M=n,
            N=n,
            num_triplets=2 * r,
            width=SketchEngine.width(2 * r, n, n, None),
            owner=0,
            engine="sketch",
            is_routed=True,
        )
        for expert in range(num_experts)
    ]
    found: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    for seed in (0, 1):
        draw = torch.Generator().manual_seed(seed)
        signals = []
        for _ in matrices:
            U, V = (torch.linalg.qr(torch.randn(n, n, generator=draw)).Q for _ in range(2))
            signals.append(U * torch.arange(1, n + 1) ** -0.75 @ V.T)
        shares = 0.5 ** torch.arange(num_experts)
        routes = [
            torch.multinomial(shares, tokens, replacement=True, generator=draw).bincount(minlength=num_experts).tolist()
            for _ in range(microbatches)
        ]
        engine = SketchEngine(matrices, home=StateHome(torch.device("cpu")), seed=seed, dtype=torch.float32)
        exact = [torch.zeros(n, n) for _ in matrices]
        for refinement in (0, 1):
            if refinement:
                engine.begin_refinement(World.current())
            for index, route in enumerate(routes):
                inner = torch.Generator().manual_seed(seed * 1000 + index)
                engine.begin_microbatch(index)
                for expert, rows in enumerate(route):
                    dy_TM = torch.randn(rows, n, generator=inner)
                    noise_TN = torch.randn(rows, n, generator=inner) * (3 * signals[expert].square().sum() / n).sqrt()
                    x_TN = dy_TM @ signals[expert] + noise_TN
                    if rows:  # the tap shows none of an expert without
                        engine.observe(str(expert), x_TN, dy_TM)
                    if not refinement:
                        exact[expert] += dy_TM.T @ x_TN
                engine.end_microbatch(World.current())
            ended = copy.deepcopy(engine)
            ended.collect(World.current())
            for name, result in ended.results(1):
                G_MN = exact[int(name)]
                score = efficiency(G_MN, result.svd.U_MK[:, r : 2 * r], result.svd.Vh_KN[:r].T)
                energy = torch.linalg.svdvals(G_MN.double()).square()
                miss = abs(result.captured_energy - (energy[: 2 * r].sum() / energy.sum()).item())
                num_rows = sum(route[int(name)] for route in routes)
                found.setdefault((int(name), refinement), []).append((score, miss, num_rows))
    rows = []
    for (expert, refinement), of_seeds in sorted(found.items()):
        scores, misses, num_rows = zip(*of_seeds, strict=True)
        rows.append(
            {
                "gradients": f"expert of {sum(num_rows) // len(num_rows)} rows",
                "ranks": 1,
                "r": r,
                "K": matrices[expert].width,
                "refine_passes": refinement,
                "default": refinement == 0,
                "mean": sum(scores) / len(scores),
                "worst": min(scores),
                "captured_energy_error": sum(misses) / len(misses),
            }
        )
        _show(rows[-1], World.current())
    return rows


def _gathered(world: World, scores: list[float], misses: list[float]) -> dict[str, float]:
    shares = world.all_json([scores, misses])
    scores = [score for share, _ in shares for score in share]
    misses = [miss for _, share in shares for miss in share]
    return {
        "mean": sum(scores) / len(scores),
        "worst": min(scores),
        "captured_energy_error": sum(misses) / len(misses),
    }


def _show(row: dict[str, Any], world: World) -> None:
    if world.is_main:
        print(
            f"{row['gradients']:<40} ranks {row['ranks']}  r {row['r']:>2}  K {row['K']:>3}  "
            f"refine {row['refine_passes']}  mean {row['mean']:.5f}  worst {row['worst']:.5f}  "
            f"captured energy off by {row['captured_energy_error']:.4f}{'  (default)' if row['default'] else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
