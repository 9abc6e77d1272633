"""What names of experts choose, what is said where none are chosen, and what is refused by name."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, make_model, report_tree, save_data, save_model
from outputs import make_output, read_report, write_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import loraga_dist
from loraga_dist.artifacts.report import Report
from loraga_dist.cli import main
from loraga_dist.config import LoraSection
from loraga_dist.errors import UserError
from loraga_dist.model.left_out import experts_left_out
from loraga_dist.model.selection import Selection, select_targets
from loraga_dist.model.targets import meta_copy
from loraga_dist.publish.card import model_card

ENDS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SAID = (
    "all-linear leaves experts without adapters: lora.target_parameters: "
    "[mlp.experts.gate_up_proj, mlp.experts.down_proj] adds them"
)


def chosen(kind: str, **lora: Any) -> Selection:
    model: Any = make_model(kind)
    return select_targets(meta_copy(type(model), model.config), LoraSection(r=2, **lora), lambda r: r)


def other_kind(kind: str, **config: Any) -> nn.Module:
    """A family whose experts cannot be tapped."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=2, **config))


def test_in_memory_it_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.arange(3, 43).view(2, 20)
    batch, lora = {"input_ids": ids, "labels": ids}, {"r": 2, "target_modules": "all-linear"}
    loraga_dist.initialize(make_model("mixtral"), [batch], {"lora": lora})
    assert f"warning: {SAID}" in capsys.readouterr().err
    start = loraga_dist.initialize(make_model("mixtral"), [batch], {"lora": lora | {"target_parameters": ENDS}})
    assert len(start.targets) == 2 * (4 + 2 * 8) and SAID not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe"])
def test_the_line_that_is_said_adds_the_experts(kind: str) -> None:
    experts, routers = chosen(kind).left_out
    assert experts.text == SAID and routers.kind == "routers"
    assert routers.names == ("mlp.router.weight" if kind == "gpt_oss" else "mlp.gate.weight",)
    found = chosen(kind, target_parameters=list(experts.names))
    assert found.left_out == []
    assert {target.stack.parameter.rpartition(".")[2] for target in found.targets if target.stack} == {
        "gate_up_proj",
        "down_proj",
    }


def test_nothing_is_said_to_who_chose_or_has_no_experts() -> None:
    assert chosen("llama").left_out == []
    assert chosen("mixtral", target_modules=["q_proj"]).left_out == []
    assert chosen("mixtral", target_parameters=["experts.down_proj"]).left_out == []


@pytest.mark.parametrize(
    ("kind", "router"), [("llama4", "feed_forward.router"), ("phimoe", "mlp.router"), ("qwen2_moe", "mlp.gate")]
)
def test_all_linear_leaves_routers_and_single_rows_out(kind: str, router: str) -> None:
    """Some routers are nn.Linear by their class, and a gate of Qwen2-MoE's shared expert makes one number."""
    found = chosen(kind)
    left_out = {left.kind.partition(" (")[0]: left for left in found.left_out}
    assert left_out["routers"].names == (f"{router}.weight",)
    rows = ("mlp.shared_expert_gate",) if kind == "qwen2_moe" else ()
    assert (left_out["single rows"].names if rows else ()) == rows
    assert all(row in left_out["single rows"].text for row in rows)
    names = {target.name for target in found.targets}
    assert not any(name.endswith((router, *rows)) for name in names)
    without_rows = {"exclude_modules": r".*\.shared_expert_gate"} if rows else {}
    assert chosen(kind, target_parameters=["experts.down_proj"], **without_rows).left_out == []
    with_routers = chosen(kind, target_parameters=[f"{router}.weight"], **without_rows)
    assert with_routers.left_out == []
    layer = [name for name, module in make_model(kind).named_modules() if name.endswith(f".{router}")]
    assert {target.name for target in with_routers.targets} == names | set(layer)
    assert all(target.by_parameter for target in with_routers.targets if target.name in layer)


@pytest.mark.parametrize("lora", [{"target_modules": ["shared_expert_gate"]}, {"target_parameters": ["gate.weight"]}])
def test_who_names_what_is_too_small_is_refused(lora: dict[str, Any]) -> None:
    model: Any = make_model("qwen2_moe")
    section = LoraSection(**({"r": 4, "target_modules": ["q_proj"]} | lora))
    with pytest.raises(UserError, match="(exclude_modules|lora.rank_pattern)$"):
        select_targets(meta_copy(type(model), model.config), section, lambda r: 2 * r)


def test_a_layer_that_is_more_than_a_product_is_refused() -> None:
    """A class of nn.Linear may make anything of its weight; a product that it writes in its own way is one."""

    class Pair(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input), input

    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T

    def select(layer: type[nn.Linear]) -> list[str]:
        source: Any = make_model("llama")
        model = meta_copy(type(source), source.config)
        model.get_submodule("model.layers.1.self_attn").q_proj = layer(64, 64, device="meta")
        lora = LoraSection(r=2, target_modules=["layers.1.self_attn.q_proj"])
        return [target.name for target in select_targets(model, lora, lambda r: r).targets]

    assert select(Own) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(
        UserError, match=r"plain matrix; .* lora\.target_parameters: \[.*\.1\.self_attn\.q_proj\.weight\]"
    ):
        select(Pair)


def test_one_expert_that_is_stored_transposed_is_refused() -> None:
    """PEFT takes a parameter of one matrix for that of a plain layer."""
    for kind in ("gpt_oss", "mixtral"):
        model = other_kind(kind, num_local_experts=1, num_experts_per_tok=1)
        lora, problem = (
            LoraSection(r=2, target_parameters=ENDS),
            r"\.0\..*_proj': holds one matrix, .* leave it out",
        )
        with pytest.raises(UserError, match=problem) if kind == "gpt_oss" else nullcontext():
            select_targets(model, lora, lambda r: r)


def test_parameters_that_are_saved_as_well_are_left_out_where_they_are_named() -> None:
    settings: dict[str, Any] = {"modules_to_save": ["experts"], "target_parameters": [*ENDS, "mlp.gate.weight"]}
    told = (
        f"^lora.target_parameters: .* trained whole by PEFT, .*; leave {', '.join(ENDS)} out of lora.target_parameters$"
    )
    with pytest.raises(UserError, match=told):
        chosen("mixtral", **settings)
    assert chosen("mixtral", **settings | {"target_parameters": ["mlp.gate.weight"]}).targets


def test_experts_that_cannot_be_tapped_are_named() -> None:
    (found,) = experts_left_out(other_kind("jetmoe"))
    assert found.names[:2] == ("mlp.input_linear", "mlp.output_linear")
    assert "leaves experts of mlp.input_linear, mlp.output_linear" in found.text and "experts interface" in found.text
    assert "lora.target_parameters" not in found.text


def test_experts_that_cannot_be_tapped_are_refused() -> None:
    lora = LoraSection(r=2, target_modules=["q_proj"], target_parameters=["mlp.input_linear.weight"])
    with pytest.raises(UserError, match="cannot be tapped") as refused:
        select_targets(other_kind("jetmoe"), lora, lambda r: r)
    assert re.search(r"^lora\.target_parameters: .*layers\.0\.mlp\.input_linear.* has experts", str(refused.value))


@pytest.mark.parametrize(
    ("kind", "modules", "named"),
    [("mixtral", ["q_proj", "w1"], "'w1'"), ("mixtral", ["w2"], "'w2'"), ("olmoe", ["gate_proj"], "'gate_proj'")],
)
def test_names_that_experts_had_once_lead_to_their_parameters(kind: str, modules: list[str], named: str) -> None:
    with pytest.raises(UserError, match=f"^lora.target_modules: {named}: matches no module; ") as refused:
        chosen(kind, target_modules=modules)
    assert str(refused.value).endswith(f"for them write lora.target_parameters: [{', '.join(ENDS)}]")


def test_a_mistyped_module_beside_experts_leads_to_the_module() -> None:
    with pytest.raises(UserError, match=r"'q_porj': matches no module; did you mean q_proj"):
        chosen("mixtral", target_modules=["q_porj"])


def test_names_of_dense_layers_beside_experts_are_as_ever() -> None:
    """Qwen2-MoE has a dense layer and shared experts of these names."""
    names = {target.name for target in chosen("qwen2_moe", target_modules=["gate_proj"]).targets}
    assert names == {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_expert.gate_proj"}


def test_a_mistyped_parameter_is_refused() -> None:
    with pytest.raises(UserError, match=r"matches no parameter; write lora\.target_parameters: \[mlp\.experts\."):
        chosen("mixtral", target_parameters=["experts.up_gate_proj"])


def test_start_plan_and_card_say_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = save_model(tmp_path / "model", "mixtral", shards=False), save_data(tmp_path / "data.jsonl", rows=4)
    tree = config_tree(model, data, tmp_path / "out", kind="mixtral", r=2, lora={"target_modules": "all-linear"})
    assert main(["plan", "--config", str(write_config(tree))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: {SAID}" in said and "activations are not counted" not in said
    out = make_output(tree)
    assert read_report(out)["warnings"][0] == SAID
    rebuilt = tmp_path / "rebuilt"
    assert main(["rebuild", str(out), "--to", str(rebuilt), "--init.scale", "unit"]) == 0
    assert read_report(rebuilt)["warnings"][0] == SAID
    card = model_card(Report.read(out), "someone/start")
    assert "Note: all-linear leaves experts without adapters" in card
    assert "Note:" not in model_card(Report.parse(json.dumps(report_tree())), "someone/start")
    tree["lora"]["target_parameters"] = ENDS
    capsys.readouterr()
    assert main(["plan", "--config", str(write_config(tree))]) == 0
    said = capsys.readouterr().out
    assert "leaves experts" not in said and "activations are not counted" not in said
