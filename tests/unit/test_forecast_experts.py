"""What a plan says of experts: the tokens they see, what that costs, and a line for each kind of stack."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MOE, config_tree, make_model, save_data, save_model
from outputs import make_output, read_report
from torch.utils.flop_counter import FlopCounterMode

from loraga_dist.config import GradientConfig, InitConfig, LoraSection, MethodConfig, parse_config
from loraga_dist.engines import ENGINES
from loraga_dist.forecast.calibration import CHECKPOINTS, Course, Setting
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.kinds import experts_line, few_tokens, kinds_of
from loraga_dist.forecast.memory import KERNELS_BYTES, RUNTIME_BYTES, rank_memory
from loraga_dist.forecast.report import PlanReport
from loraga_dist.forecast.text import print_plan
from loraga_dist.gradients.experts import experts_tapped
from loraga_dist.gradients.kept import Keeping
from loraga_dist.model.blocks import Blocks, Order, find_blocks
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.selection import select_targets
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import kind_of, meta_copy
from loraga_dist.schemes import SCHEMES

SCHEME = SCHEMES["lora_ga"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def plan_of(kind: str, **gradient: Any) -> Plan:
    model: Any = make_model(kind)
    meta_model = meta_copy(type(model), model.config)
    lora = LoraSection(r=4, target_parameters=EXPERTS)
    order = Order(blocks=find_blocks(meta_model), why="")
    targets = select_targets(meta_model, lora, SCHEME.num_triplets).targets
    return make_plan(targets, MethodConfig.model_validate({"gradient": gradient}), 2, order)


@pytest.mark.parametrize("kind", MOE)
def test_a_token_is_multiplied_with_the_experts_it_goes_to(kind: str) -> None:
    model: Any = make_model(kind)
    num_tokens = 2 * 16
    with experts_tapped(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(num_tokens).view(2, 16))
    products: Counter[Any] = counter.get_flop_counts()["Global"]  # type: ignore[assignment]
    flops = sum(count for operator, count in products.items() if str(operator) in ("aten.mm", "aten.addmm"))
    shape = ModelShape.of(meta_copy(type(model), model.config), torch.bfloat16)
    assert flops == 2 * num_tokens * shape.linear_numel
    assert sum(shape.linear_numels_of_blocks) == shape.block_linear_numel
    assert shape.linear_numel - shape.block_linear_numel == 32 * 258


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.bfloat16, KERNELS_BYTES), (torch.float32, 0)])
def test_on_cpus_products_in_16_bits_take_code(dtype: torch.dtype, kernels: int) -> None:
    model: Any = make_model("mixtral")
    plan, shape = plan_of("mixtral", engine="exact"), ModelShape.of(meta_copy(type(model), model.config), dtype)
    setting = Setting(
        world_size=2, sharded=True, on_host=True, weights_on_host=False, weights_mapped=False, from_disk=False,
        state_limit_bytes=math.inf,
    )  # fmt: skip
    course = Course.of(plan, GradientConfig(), Keeping(), num_microbatches=2, most_tokens=16, looks=False)
    for on_host, expected in ((True, RUNTIME_BYTES + kernels), (False, None)):
        found = rank_memory(0, plan, shape, None, replace(setting, on_host=on_host), course, scale="stable")
        assert {parts.get("runtime") for parts in found.device.values()} == {expected}


def test_of_a_matrix_as_many_rows_are_expected_as_tokens_go_to_it() -> None:
    plan = plan_of("mixtral", engine="sketch", oversampling=8)
    (expert,) = {matrix.row_share for matrix in plan.matrices.values() if matrix.is_routed}
    assert expert == 2 / 8
    matrix = next(matrix for matrix in plan.matrices.values() if matrix.is_routed)
    assert [matrix.expected_rows(count) for count in (0, 1, 16, 17)] == [0, 1, 4, 5]
    dense = next(matrix for matrix in plan.matrices.values() if not matrix.is_routed)
    assert dense.expected_rows(17) == 17


def test_a_group_may_end_within_a_stack() -> None:
    whole = plan_of("mixtral", engine="sketch", oversampling=8)
    (most,) = {Plan.state_bytes(group) for group in whole.groups}
    halves = plan_of("mixtral", engine="sketch", oversampling=8, state_budget_gib=0.6 * most / 2**30)
    assert [len(group) for group in whole.groups] == [20, 20] and len(halves.groups) == 4
    ends = [group[-1].name for group in halves.groups[::2]]
    assert all(".experts." in name and not name.endswith(".7") for name in ends), ends
    assert list(halves.matrices) == list(whole.matrices)


def test_first_rows_are_kept_of_the_tokens_that_experts_see() -> None:
    matrix = next(
        each for each in plan_of("mixtral", engine="sketch", oversampling=8).matrices.values() if each.is_routed
    )
    cold = ENGINES["sketch"].cold_bytes
    rows = [cold(matrix, torch.float32, count) - cold(matrix, torch.float32, 0) for count in (8, 32)]
    assert rows == [4 * 8 * (matrix.M + matrix.N), 4 * 32 * (matrix.M + matrix.N)]


def test_tens_of_thousands_of_experts_are_planned_in_seconds() -> None:
    targets = [
        replace(target, name=target.name.replace("layers.0", f"layers.{layer}"))
        for target in plan_of("mixtral").targets
        if "layers.0" in target.name
        for layer in range(1500)
    ]
    order = Order(blocks=Blocks(prefix="model.layers", count=1500), why="")
    before = time.process_time()
    plan = make_plan(targets, MethodConfig(), 64, order)
    assert time.process_time() - before < 10, "processor seconds: the machine may be busy with other things"
    assert len(plan.groups) == 1500 and len(plan.matrices) == len(targets) == 30_000


def test_experts_are_called_by_their_parameter() -> None:
    assert kind_of("model.layers.0.mlp.experts.gate_up_proj.31") == "experts.gate_up_proj"
    assert kind_of("model.layers.0.self_attn.q_proj") == "q_proj"
    assert kind_of("q_proj") == "q_proj" and kind_of("0") == "0"


def test_kinds_say_how_many_tokens_an_expert_sees() -> None:
    plan = plan_of("qwen3_moe", engine="exact")
    kinds = kinds_of(plan)
    assert sum(kinds.values()) == len(plan.targets)
    found = {kind.module: (count, kind.experts, kind.experts_per_token) for kind, count in kinds.items()}
    assert found["experts.down_proj"] == found["experts.gate_up_proj"] == (8, 8, 2)
    assert found["q_proj"] == (2, None, None)
    assert {kind.tokens_each(400) for kind in kinds if kind.experts} == {100}
    assert experts_line(kinds, 400) == "2 stacks of 8, 2 for a token, which see 100 of the tokens on average"
    assert experts_line(kinds_of(plan_of("llama4")), 0) == "2 stacks of 4, 1 for a token"
    assert few_tokens(kinds, 4 * 4 * 8, SCHEME) == [], "each sees four times 2 r tokens"
    assert [line.partition(":")[0] for line in few_tokens(kinds, 4 * 4 * 8 - 1, SCHEME)] == [
        "experts.down_proj", "experts.gate_up_proj"
    ]  # fmt: skip


def test_files_are_as_large_as_planned_and_all_is_said_by_stacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_data(tmp_path / "data.jsonl", rows=8)
    tree = config_tree(
        save_model(tmp_path / "model", "qwen3_moe"), data, tmp_path / "out",
        lora={"target_parameters": EXPERTS}, output={"residual_base": "full"},
    )  # fmt: skip
    forecaster = Forecaster.of_config(parse_config(InitConfig, tree), 1, torch.device("cpu"))
    report = PlanReport(forecaster=forecaster)
    print_plan(report)
    said = " ".join(capsys.readouterr().out.split())  # a line is as long as the terminal is wide
    assert said.count("experts.down_proj") == 1 and said.count("down_proj") == 2, "and the one of the dense layer"
    assert "experts: 2 stacks of 8, 2 for a token, which see 4096 of the tokens on average" in said
    kinds = {kind["module"]: kind for kind in report.as_json()["targets"]}
    assert kinds["experts.down_proj"]["tokens_each"] == 4096 and kinds["q_proj"]["tokens_each"] == 256 * 64
    out = make_output(tree)
    said = " ".join(capsys.readouterr().out.split())  # a line is as long as the terminal is wide
    assert said.count("│ experts.down_proj") == said.count("│ down_proj") == 1
    for name, num_bytes in report.disk_bytes.items():
        if name != CHECKPOINTS:  # which are gone
            written = sum(path.stat().st_size for path in (out / name).glob("*.safetensors"))
            assert num_bytes <= written <= num_bytes + 120 * 200, name  # headers
    assert len(read_report(out)["targets"]) == len(forecaster.plan.targets)
