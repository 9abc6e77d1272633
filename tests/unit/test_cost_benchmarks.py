"""The cost benchmarks run from end to end on a tiny model, and their figures are what they claim to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import larger_than_memory
import pytest
import torch
from builders import llama_config
from cost_runs import step_energy
from launching import ROOT, succeed
from ranks import run_script
from transformers import LlamaForCausalLM

from loraga_dist.engines.product import multiplies_bfloat16


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
    arguments += ["--dtype", "bfloat16" if multiplies_bfloat16() else "float32"]
    succeed(run_script(arguments, 1, timeout_seconds=200))
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {"floor", "sketch", "rrr", "peft", "exact"}
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


def test_a_model_is_written_block_by_block(tmp_path: Path) -> None:
    """And is the one that transformers would have written."""
    config = llama_config(num_hidden_layers=3)
    larger_than_memory.make_model(tmp_path / "model", config, num_tokens=16)
    model, loading = LlamaForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3 + 3, "embeddings, layers, last norm, head"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.float().std().item() == pytest.approx(larger_than_memory.SCALE, rel=0.05), name
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers[:2])
    assert not torch.equal(first, second)
    (tmp_path / "model" / "config.json").unlink()
    larger_than_memory.make_model(tmp_path / "model", config, num_tokens=16)
    assert not (tmp_path / "model" / "config.json").exists(), "made again"


def test_the_size_of_a_model_is_the_least_that_reaches_it() -> None:
    """Llama-3-8B has 8,030,261,248 parameters."""
    assert larger_than_memory.llama_of(2 * 8_030_261_248).num_hidden_layers == 32
    assert larger_than_memory.llama_of(2 * 8_030_261_248 + 1).num_hidden_layers == 33
    assert larger_than_memory.llama_of(1).num_hidden_layers == 1


def test_a_process_has_no_more_memory_than_it_may_take(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(50 << 20))
    program = f"data = b'x' * (300 << 20); open({str(path)!r}, 'rb').read(); import time; time.sleep(0.3)"
    within = larger_than_memory.run_within([sys.executable, "-c", program], 500 << 20)
    assert within.code == 0
    assert 300 << 20 <= within.peak_anonymous_bytes < 400 << 20
    assert 50 << 20 <= within.num_bytes_read < 60 << 20
    assert larger_than_memory.run_within([sys.executable, "-c", program], 200 << 20).code == 1


def test_experts_cost() -> None:
    arguments = [str(ROOT / "benchmarks" / "experts_cost.py"), "--quick", "--repeats", "1"]
    (ended,) = run_script(arguments, 1, timeout_seconds=200)
    succeed([ended])
    names = [line.split(" | ")[0].strip("| ") for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert names[1:] == ["no taps", "no taps, eager experts", "taps, and nothing done", "taps, exact", "taps, sketch"]
