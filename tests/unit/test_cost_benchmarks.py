"""The cost benchmarks run from end to end on a tiny model, and their figures are what they claim to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cost_runs import step_energy
from launching import ROOT, succeed
from ranks import run_script


def test_step_energy_is_that_of_the_step() -> None:
    draw = torch.Generator().manual_seed(0)
    G_MN = torch.randn(30, 20, generator=draw)
    U_MR, V_NR = torch.randn(30, 3, generator=draw), torch.randn(20, 3, generator=draw)
    P, Q = torch.linalg.qr(U_MR).Q, torch.linalg.qr(V_NR).Q
    step = P @ P.T @ G_MN + G_MN @ Q @ Q.T
    energy = 1 - ((G_MN - step).square().sum() / G_MN.square().sum()).item()
    assert step_energy(G_MN, U_MR, V_NR) == pytest.approx(energy, rel=1e-4)


def test_init_cost(tmp_path: Path) -> None:
    path = tmp_path / "init_cost.json"
    arguments = [str(ROOT / "benchmarks" / "init_cost.py"), "--quick", "--repeats", "1", "--json", str(path)]
    succeed(run_script(arguments, 1, timeout_seconds=200))
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {"floor", "sketch", "peft", "exact"}
    assert runs["exact"]["share_of_exact"] == 1
    for way in ("sketch", "peft"):
        assert 0.97 < runs[way]["share_of_exact"] <= 1.001, way


def test_traffic(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    arguments = [str(ROOT / "benchmarks" / "traffic.py"), "--quick", "--repeats", "1", "--json", str(path)]
    succeed(run_script(arguments, 1, timeout_seconds=200))
    few, many = json.loads(path.read_text())["runs"]
    for row in (few, many):
        assert 1.5 < row["block_gathered_bytes"] / row["model_bytes"] < 2.02, "blocks twice, all else once"
    num_times = many["shape"]["microbatches"] / few["shape"]["microbatches"]
    assert many["model_gathered_bytes"] == num_times * few["model_gathered_bytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu is for that")
def test_gpu_benchmark_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    benchmark = str(ROOT / "benchmarks" / "gpu_init_cost.py")
    succeed(run_script([benchmark, "--small", "--repeats", "1", "--json", str(path)], 1))
    rows = json.loads(path.read_text())["runs"]
    assert {(row["way"], row["r"]) for row in rows} >= {("floor", 4), ("sketch", 8), ("peft", 4)}
    (refused,) = run_script([benchmark], 1)
    assert refused.code == 2 and "no CUDA device" in refused.stderr
