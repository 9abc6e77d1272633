"""Bytes, flops and traffic of a plan against arithmetic by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import llama_config
from transformers import LlamaForCausalLM

from loraga_dist.config import GradientConfig, LoraSection, MethodConfig
from loraga_dist.engines import ENGINES
from loraga_dist.forecast.activations import Activations
from loraga_dist.forecast.calibration import BETWEEN, KEPT_INPUTS, STATE, Course, Setting
from loraga_dist.forecast.in_blocks import InBlocks
from loraga_dist.forecast.memory import RankMemory, rank_memory, weight_workspace_bytes
from loraga_dist.forecast.ways import verdict
from loraga_dist.forecast.work import DataTaken, work
from loraga_dist.gradients.kept import Keeping
from loraga_dist.model.blocks import MODEL_ORDER, Order, find_blocks
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.selection import select_targets
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import meta_copy
from loraga_dist.schemes import SCHEMES

SCHEME = SCHEMES["lora_ga"]
BATCH, LENGTH = 4, 96


def tiny_plan(world_size: int, *, in_blocks: bool = False, **gradient: object) -> tuple[Plan, ModelShape]:
    meta_model = meta_copy(LlamaForCausalLM, llama_config())
    order = Order(blocks=find_blocks(meta_model), why="") if in_blocks else MODEL_ORDER
    shape = ModelShape.of(meta_model, torch.bfloat16)
    targets = select_targets(meta_model, LoraSection(r=4), SCHEME.num_triplets).targets
    return make_plan(targets, MethodConfig.model_validate({"gradient": gradient}), world_size, order), shape


def on_device(world_size: int) -> Setting:
    return Setting(
        world_size=world_size,
        sharded=world_size > 1,
        on_host=False,
        weights_on_host=False,
        weights_mapped=False,
        from_disk=False,
        state_limit_bytes=math.inf,
    )


def course_of(plan: Plan, *, keeping: Keeping | None = None, looks: bool = False, **gradient: object) -> Course:
    config = GradientConfig.model_validate(gradient)
    return Course.of(plan, config, keeping or Keeping(), num_microbatches=5, most_tokens=16, looks=looks)


def memory_of(
    rank: int, plan: Plan, shape: ModelShape, world_size: int, *, activations: Activations | None = None,
    course: Course | None = None, scale: str = "stable",
) -> RankMemory:  # fmt: skip
    return rank_memory(rank, plan, shape, activations, on_device(world_size), course or course_of(plan), scale=scale)


def test_shapes_by_hand() -> None:
    _, shape = tiny_plan(1)
    d, ff, vocabulary, layers = 64, 112, 258, 3
    block = 2 * d * d + 2 * d * (d // 2) + 3 * d * ff + 2 * d
    assert shape.num_bytes == 2 * (2 * vocabulary * d + layers * block + d)
    assert shape.block_numel == layers * block
    assert shape.embedding_numel == vocabulary * d
    assert shape.block_linear_numel == layers * (block - 2 * d)
    assert shape.linear_numel == vocabulary * d + layers * (block - 2 * d)
    assert shape.largest_module_numel == vocabulary * d
    # of a 64-vector three ranks hold 22 elements each, of a 64 x 112 matrix 2390
    thirds = {d * d: 1366, d * d // 2: 683, d * ff: 2390, d: 22, vocabulary * d: 5504}
    count = {d * d: 2, d * d // 2: 2, d * ff: 3, d: 2}
    expected = 2 * thirds[vocabulary * d] + thirds[d] + layers * sum(n * thirds[size] for size, n in count.items())
    assert shape.partition_bytes(3) == 2 * expected


def test_memory_by_hand() -> None:
    plan, shape = tiny_plan(2, engine="exact", oversampling=8)
    found = memory_of(1, plan, shape, 2)
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
    assert "all A and B" in memory_of(0, plan, shape, 2).host["write"]


def test_a_scale_by_the_weights_singular_values_takes_gathered_weights() -> None:
    gradient = {"engine": "sketch", "oversampling": 8, "max_targets_in_flight": 1}
    plan, shape = tiny_plan(2, **gradient)
    (down,) = [target for target in plan.owned(0) if (target.M, target.N) == (64, 112)][:1]
    copy, sixteen_bits = 4 * 64 * 112, 2 * 64 * 112
    assert weight_workspace_bytes(plan, "stable", down) is None
    # the SVD of 8 columns: 12 of them in float64 on either side, and all of a small weight
    svd = 96 * 8 * (64 + 112) + 8 * 64 * 112
    assert weight_workspace_bytes(plan, "weight_svd", down) == copy + svd
    found = memory_of(0, plan, shape, 2, course=course_of(plan, **gradient), scale="weight_svd")
    assert found.device["factorize"] == found.device["factorize"] | {"gathered": sixteen_bits, "workspace": copy + svd}
    assert found.host["factorize"]["owned triplets"] > 0


def test_logits_are_kept_until_they_are_compared() -> None:
    plan, shape = tiny_plan(1, engine="sketch", oversampling=8)
    activations = Activations(backward_bytes=5000, forward_bytes=3000, probe_bytes=1000)
    found = memory_of(0, plan, shape, 1, activations=activations)
    # the model's and the rerounded model's, then the start's, too
    assert [found.host[phase].get("logits") for phase in ("calibrate", "place", "compare", "write")] == [
        None,
        2000,
        3000,
        None,
    ]


def test_a_small_budget_makes_sweeps_and_less_state() -> None:
    whole, shape = tiny_plan(1, engine="sketch")
    gradient = {"engine": "sketch", "state_budget_gib": Plan.state_bytes(whole.groups[0]) / 2 / 2**30}
    half, _ = tiny_plan(1, **gradient)
    assert len(half.groups) > len(whole.groups) == 1
    peaks = [
        memory_of(0, plan, shape, 1, course=course_of(plan, **settings)).peak_bytes
        for plan, settings in ((whole, {}), (half, gradient))
    ]
    assert peaks[1] < peaks[0]
    matrix = whole.groups[0][0]
    assert matrix.triplet_bytes == 4 * matrix.width * (matrix.M + matrix.N + 1)


H = 1_000_000
"""Bytes between two blocks, more than all triplets."""
PINNED = 2**20
"""That they take of the host, beside a device."""
IN_BLOCKS = InBlocks(
    hidden_bytes=H, argument_bytes=100, forward_bytes=3000, loss_bytes=7000, backward_bytes=(9000, 9000, 9000)
)


def test_block_order_by_hand() -> None:
    plan, shape = tiny_plan(2, in_blocks=True, engine="exact")
    activations = Activations(forward_bytes=0, probe_bytes=0, in_blocks=IN_BLOCKS)
    found = memory_of(0, plan, shape, 2, activations=activations)
    d, vocabulary = 64, 258
    outside, state = 2 * (2 * vocabulary * d + d), plan.state_bytes(plan.groups[0])
    block = shape.block_numel // 3 * 2
    assert [len(group) for group in plan.groups] == [7, 7, 7], "a group is a block's"
    # what goes in of 5 microbatches at 3 blocks and the head; one is on the device with how blocks are called
    assert found.host["forward"] == {KEPT_INPUTS: 5 * 4 * PINNED, "their arguments": 5 * 100}
    assert found.device["forward"] == {
        "weights": shape.partition_bytes(2), "gathered": outside + block, "microbatch": 3000 + H + 100, STATE: state
    }  # fmt: skip
    assert (
        found.device["loss"] | {"gathered": outside, "microbatch": 7000 + H + 100, BETWEEN: 4 * H}
        == found.device["loss"]
    )
    backward = found.device["backward"]
    assert backward | {"gathered": block, "microbatch": 9000 + H + 100, STATE: state, BETWEEN: 9 * H} == backward
    assert found.host["backward"][KEPT_INPUTS] == 5 * 3 * PINNED, "what went into the head is not needed any more"


def test_several_chunks_keep_less_between_blocks_and_the_state_of_more_groups() -> None:
    plan, shape = tiny_plan(2, in_blocks=True, engine="exact")
    activations = Activations(forward_bytes=0, probe_bytes=0, in_blocks=IN_BLOCKS)
    together, apart, in_files = (
        memory_of(0, plan, shape, 2, activations=activations, course=course_of(plan, keeping=keeping))
        for keeping in (Keeping(), Keeping(chunk_microbatches=2), Keeping(directory=Path("there")))
    )
    assert (together.host["forward"][KEPT_INPUTS], apart.host["forward"][KEPT_INPUTS]) == (20 * PINNED, 8 * PINNED)
    assert apart.device["backward"][STATE] == 3 * together.device["backward"][STATE]
    assert KEPT_INPUTS not in in_files.host["forward"]


def test_state_goes_to_the_host_by_what_a_sweep_takes() -> None:
    plan, shape = tiny_plan(2, in_blocks=True, engine="exact")
    activations = Activations(forward_bytes=0, probe_bytes=0, in_blocks=IN_BLOCKS)
    of_group = plan.state_bytes(plan.groups[0])
    setting = replace(on_device(2), state_limit_bytes=2 * of_group)
    for chunk, on_host in ((None, False), (2, True)):
        course = course_of(plan, keeping=Keeping(chunk_microbatches=chunk))
        assert course.state_bytes == (3 * of_group if on_host else of_group)
        found = rank_memory(0, plan, shape, activations, setting, course, scale="stable")
        assert found.host["backward"].get(STATE, 0) == (3 * of_group if on_host else 0)
        assert (found.device["backward"][STATE] < of_group) == on_host, "one target's at a time"


def test_work_by_hand() -> None:
    plan, shape = tiny_plan(2, engine="exact")
    done = work(plan, shape, on_device(2), course_of(plan), DataTaken(num_tokens=10), recomputes=True)
    assert done.flops["model"] == 10 * (4 * shape.linear_numel + 2 * shape.block_linear_numel)
    assert done.flops["engine"] == 10 * 2 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112)
    blocks, rest = shape.block_numel, sum(shape.numels) - shape.block_numel - shape.embedding_numel
    gathers = 3 * blocks + 2 * rest + shape.embedding_numel
    assert done.traffic_bytes_per_rank["weights gathered"] == 5 * gathers * 2 // 2
    assert done.traffic_bytes_per_rank["logits compared"] == 3 * sum(shape.numels) * 2 // 2


@pytest.mark.parametrize(
    ("chunk", "looks", "num_chunks"),
    [(None, False, 1), (2, False, 3), (None, True, 2), (3, True, 3)],  # after 4 microbatches of 5 it looks
)
def test_work_in_block_order_by_hand(chunk: int | None, looks: bool, num_chunks: int) -> None:
    plan, shape = tiny_plan(2, in_blocks=True, engine="exact")
    course = course_of(plan, keeping=Keeping(chunk_microbatches=chunk), looks=looks)
    done = work(plan, shape, on_device(2), course, DataTaken(num_tokens=10), recomputes=False)
    blocks, rest = shape.block_numel, sum(shape.numels) - shape.block_numel
    # all is gathered once for a chunk, and blocks once more, whatever the number of microbatches in it
    assert done.traffic_bytes_per_rank["weights gathered"] == num_chunks * (2 * blocks + rest) * 2 // 2
    head = 258 * 64
    assert done.flops["model"] == 10 * 2 * (3 * (shape.linear_numel - head) + 2 * head)


def test_a_block_whose_targets_take_turns_is_run_again() -> None:
    plan, shape = tiny_plan(2, in_blocks=True, engine="exact", max_targets_in_flight=4)
    assert [len(group) for group in plan.groups] == [4, 3] * 3
    done = work(plan, shape, on_device(2), course_of(plan), DataTaken(num_tokens=10), recomputes=False)
    assert done.flops["model"] == 10 * 2 * (5 * (shape.linear_numel - 258 * 64) + 2 * 258 * 64)


def test_verdict_leaves_a_margin_on_both_sides() -> None:
    assert [verdict(peak, 100) for peak in (90, 91, 110, 111)] == ["fits", "tight", "tight", "too large"]
