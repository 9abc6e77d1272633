"""How much of a regression's worth is left with few of a gradient's triplets, and with less than all inputs' moment.

    make quickstart                                       # pretrains the model this measures on
    python benchmarks/regressions.py --json regressions.json
    python benchmarks/regressions.py --model CHECKPOINT --data DATA.jsonl --max_samples 64

With G a target's mean gradient and C the damped second moment of its input, an adapter whose A spans given rows can
lower the local quadratic model of the loss by tr(G A^T (A C A^T)^-1 A G^T) / 2 at most. The rows of every variant are
scored by that with the moment of all tokens, against the r best rows there are, in float64: mean and worst over
targets.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accuracy import Loaded
from memory import hardware
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from loraga_dist.artifacts.report import versions
from loraga_dist.config import CalibrationConfig, SchemeConfig
from loraga_dist.data.losses import causal_lm
from loraga_dist.data.microbatches import Microbatch, SampleSharder, counted_rows
from loraga_dist.data.samples import load_samples, padding_token_id
from loraga_dist.gradients.route import ModelOrder
from loraga_dist.linalg import DampedMoment, TruncatedSVD, regression
from loraga_dist.model.plan import BEYOND
from loraga_dist.model.shape import max_positions
from loraga_dist.ranks.world import World

RANKS = (8, 32)
DAMPING = SchemeConfig(scheme="rrr").damping
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Of the tokens, for a moment."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/quickstart/model"))
    parser.add_argument("--data", type=Path, default=Path("build/quickstart/calibration.jsonl"))
    parser.add_argument("--max_samples", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    logging.set_verbosity_error()
    loaded = Loaded.read(str(options.model), World.current())
    config = CalibrationConfig(data_files=str(options.data), max_length=256, max_samples=options.max_samples)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = load_samples(config, tokenizer, task_type="CAUSAL_LM", max_positions=max_positions(loaded.model))
    pad_token_id = padding_token_id(tokenizer)
    sharder = SampleSharder(samples=samples, rank=0, world_size=1, per_device_batch_size=4, pad_token_id=pad_token_id)
    seen = accumulate(loaded, sharder.microbatches(0, len(samples), 0))
    rows = [row for r in RANKS for row in rows_at(r, seen)]
    print(f"{len(seen)} targets, {next(iter(seen.values())).num_tokens} tokens, damping {DAMPING}")
    for row in rows:
        print(f"r {row['r']:>2}  {row['variant']:<40} mean {row['mean']:.4f}  worst {row['worst']:.4f}")
    if options.json:
        content = {"rows": rows, "hardware": hardware(), "versions": versions()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


@dataclass
class Seen:
    """Of one target: float32 sums over tokens of dy x^T and, by the share of tokens that count, of x x^T."""

    G_MN: Tensor
    moments: dict[float, Tensor]
    tokens: dict[float, int]

    @property
    def num_tokens(self) -> int:
        return self.tokens[1.0]

    def moment(self, share: float = 1.0) -> Tensor:
        """E[x x^T], (N, N)."""
        return self.moments[share] / self.tokens[share]


def accumulate(loaded: Loaded, microbatches: Sequence[Microbatch]) -> dict[str, Seen]:
    """By target name; inputs that several targets share are summed for each."""
    seen: dict[str, Seen] = {}
    rows: dict[float, dict[int, Tensor]] = {}

    def observe(name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        target = seen[name]
        target.G_MN.addmm_(dy_TM.float().T, x_TN.float())
        for share, chosen in rows.items():
            x = x_TN[chosen[len(x_TN)]].float()
            target.moments[share].addmm_(x.T, x)
            target.tokens[share] += len(x)

    for target in loaded.targets:
        moments = {share: torch.zeros(target.N, target.N) for share in (*SHARES, 1.0)}
        seen[target.name] = Seen(torch.zeros(target.M, target.N), moments, dict.fromkeys(moments, 0))
    route = ModelOrder(loaded.model, causal_lm, sharding=loaded.sharding, checkpointing="none")
    with route.opened(), route.showing(microbatches, list(seen), observe) as take:
        for microbatch in microbatches:
            rows.update({share: counted_rows(microbatch, share) for share in (*SHARES, 1.0)})
            take(microbatch)
    return seen


def rows_at(r: int, seen: dict[str, Seen]) -> list[dict[str, Any]]:
    shares: dict[str, list[float]] = {}
    for target in seen.values():
        scores = dict(variants(r, target))
        best = scores.pop("best")
        for variant, score in scores.items():
            shares.setdefault(variant, []).append(score / best)
    return [
        {"r": r, "variant": variant, "mean": sum(found) / len(found), "worst": min(found)}
        for variant, found in shares.items()
    ]


def variants(r: int, target: Seen) -> Iterator[tuple[str, float]]:
    """Names and worths; `best` is the worth of the best rows."""
    G_MN = target.G_MN.double()
    U, S_K, Vh = torch.linalg.svd(G_MN, full_matrices=False)
    svd = TruncatedSVD(U_MK=U, S_K=S_K, Vh_KN=Vh)
    C_NN = target.moment().double()
    C_NN.diagonal().add_(DAMPING * C_NN.diagonal().mean())

    def worth(triplets: TruncatedSVD, moment: Tensor | None) -> float:
        found = triplets if moment is None else regression(triplets, DampedMoment(moment, DAMPING))
        A_RN = found.Vh_KN[:r].double()
        GA_MR = G_MN @ A_RN.T
        return float((torch.linalg.solve(A_RN @ C_NN @ A_RN.T, GA_MR.T).T * GA_MR).sum())

    whole = target.moment()
    yield "best", worth(svd, whole)
    for beyond in (0, 8, BEYOND):
        if r + beyond < len(S_K):
            yield f"from r + {beyond} triplets", worth(svd.leading(r + beyond), whole)
    for share in SHARES:
        yield f"moment of {target.tokens[share]} tokens", worth(svd, target.moment(share))
    yield "its diagonal alone", worth(svd, whole.diagonal())
    yield "no moment", worth(svd, None)


if __name__ == "__main__":
    main()
