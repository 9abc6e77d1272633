"""Bytes, flops and traffic of a plan against arithmetic by hand."""

from __future__ import annotations

import torch
from builders import llama_config
from transformers import LlamaForCausalLM

from loraga_dist.config import GradientConfig, LoraSection
from loraga_dist.engines import ENGINES
from loraga_dist.forecast.activations import Activations
from loraga_dist.forecast.forecaster import verdict
from loraga_dist.forecast.memory import Setting, rank_memory, weight_workspace_bytes, work
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import meta_copy, select_targets
from loraga_dist.schemes import SCHEMES

SCHEME = SCHEMES["lora_ga"]
BATCH, LENGTH = 4, 96


def tiny_plan(world_size: int, **gradient: object) -> tuple[Plan, ModelShape]:
    meta_model = meta_copy(LlamaForCausalLM, llama_config())
    shape = ModelShape.of(meta_model, torch.bfloat16)
    targets = select_targets(meta_model, LoraSection(r=4), SCHEME.num_triplets).targets
    return make_plan(targets, GradientConfig.model_validate(gradient), SCHEME, world_size), shape


def on_device(world_size: int) -> Setting:
    return Setting(
        world_size=world_size,
        sharded=world_size > 1,
        on_host=False,
        weights_on_host=False,
        weights_mapped=False,
        state_on_host=False,
    )


def test_shapes_by_hand() -> None:
    _, shape = tiny_plan(1)
    d, ff, vocabulary, layers = 64, 112, 258, 3
    block = 2 * d * d + 2 * d * (d // 2) + 3 * d * ff + 2 * d
    assert shape.num_bytes == 2 * (2 * vocabulary * d + layers * block + d)
    assert shape.block_numel == layers * block
    assert shape.embedding_numel == vocabulary * d
    assert shape.linear_numel == vocabulary * d + layers * (block - 2 * d)
    assert shape.largest_module_numel == vocabulary * d
    # of a 64-vector three ranks hold 22 elements each, of a 64 x 112 matrix 2390
    thirds = {d * d: 1366, d * d // 2: 683, d * ff: 2390, d: 22, vocabulary * d: 5504}
    count = {d * d: 2, d * d // 2: 2, d * ff: 3, d: 2}
    expected = 2 * thirds[vocabulary * d] + thirds[d] + layers * sum(n * thirds[size] for size, n in count.items())
    assert shape.partition_bytes(3) == 2 * expected


def test_memory_by_hand() -> None:
    plan, shape = tiny_plan(2, engine="exact", oversampling=8)
    found = rank_memory(1, plan, shape, None, on_device(2), num_tokens=16, scale="stable")
    block = [(64, 64)] * 2 + [(32, 64)] * 2 + [(112, 64)] * 2 + [(64, 112)]
    gradients = 3 * sum(4 * (M * N + 32 * M + 16 * N) for M, N in block)
    assert found.device["calibrate"]["weights"] == shape.partition_bytes(2)
    assert found.device["calibrate"]["engine state"] == gradients
    assert found.device["calibrate"]["microbatch"] == 2 * 258 * 64, "without activations the largest module alone"
    mine = [matrix for matrix in plan.matrices.values() if matrix.owner == 1]
    assert all(matrix.width == 16 for matrix in mine)
    assert found.host["write"]["owned triplets"] == sum(64 * (matrix.M + matrix.N + 1) for matrix in mine)
    assert found.device["factorize"]["workspace"] == max(
        ENGINES["exact"].factorization_bytes(matrix) for matrix in mine
    )
    assert "all A and B" in rank_memory(0, plan, shape, None, on_device(2), num_tokens=16, scale="stable").host["write"]


def test_a_scale_by_the_weights_singular_values_takes_gathered_weights() -> None:
    plan, shape = tiny_plan(2, engine="sketch", oversampling=8, max_targets_in_flight=1)
    (down,) = [target for target in plan.owned(0) if (target.M, target.N) == (64, 112)][:1]
    copy, sixteen_bits = 4 * 64 * 112, 2 * 64 * 112
    assert weight_workspace_bytes(plan, "stable", down) is None
    # the SVD of 8 columns: 12 of them in float64 on either side, and all of a small weight
    svd = 96 * 8 * (64 + 112) + 8 * 64 * 112
    assert weight_workspace_bytes(plan, "weight_svd", down) == copy + svd
    found = rank_memory(0, plan, shape, None, on_device(2), num_tokens=16, scale="weight_svd")
    assert found.device["factorize"] == found.device["factorize"] | {"gathered": sixteen_bits, "workspace": copy + svd}
    assert found.host["factorize"]["owned triplets"] > 0


def test_logits_are_kept_until_they_are_compared() -> None:
    plan, shape = tiny_plan(1, engine="sketch", oversampling=8)
    activations = Activations(backward_bytes=5000, forward_bytes=3000, probe_bytes=1000)
    found = rank_memory(0, plan, shape, activations, on_device(1), num_tokens=16, scale="stable")
    # the model's and the rerounded model's, then the start's, too
    assert [found.host[phase].get("logits") for phase in ("calibrate", "place", "compare logits", "write")] == [
        None,
        2000,
        3000,
        None,
    ]


def test_a_small_budget_makes_sweeps_and_less_state() -> None:
    whole, shape = tiny_plan(1, engine="sketch")
    half, _ = tiny_plan(1, engine="sketch", state_budget_gib=whole.state_bytes_per_rank / 2 / 2**30)
    assert len(half.groups) > len(whole.groups) == 1
    peaks = [
        rank_memory(0, plan, shape, None, on_device(1), num_tokens=16, scale="stable").peak_bytes
        for plan in (whole, half)
    ]
    assert peaks[1] < peaks[0]
    matrix = whole.groups[0][0]
    assert matrix.triplet_bytes == 4 * matrix.width * (matrix.M + matrix.N + 1)


def test_work_by_hand() -> None:
    plan, shape = tiny_plan(2, engine="exact")
    done = work(plan, shape, num_tokens=10, microbatches_per_rank=5, world_size=2, checkpointed=True, refine_passes=0)
    assert done.flops["model"] == 10 * (4 * shape.linear_numel + 2 * shape.block_numel)
    assert done.flops["engine"] == 10 * 2 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112)
    blocks, rest = shape.block_numel, sum(shape.numels) - shape.block_numel - shape.embedding_numel
    gathers = 3 * blocks + 2 * rest + shape.embedding_numel
    assert done.traffic_bytes_per_rank["weights gathered"] == 5 * gathers * 2 // 2


def test_verdict_leaves_a_margin_on_both_sides() -> None:
    assert [verdict(peak, 100) for peak in (90, 91, 110, 111)] == ["fits", "tight", "tight", "too large"]
