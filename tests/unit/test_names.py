"""Patterns that are written for users, and names that are held against a model's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from builders import make_model
from torch import nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from loraga_dist.config import LoraSection
from loraga_dist.errors import UserError
from loraga_dist.model.names import pattern_of, require_matches
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import meta_copy
from loraga_dist.model.towers import text_model, tower_of


@pytest.mark.parametrize(
    "names",
    [["a"], ["a", "a.b"], ["a.b", "a"], ["a.b.c", "a.b", "d"], ["x.0.q", "x.1.q", "x.1.k", "y.0.q"], ["a+b", "a.b"]],
)
def test_a_pattern_matches_its_names_and_no_others(names: list[str]) -> None:
    pattern = pattern_of(names)
    others = {"a", "b", "a.b", "a.c", "a.b.c", "a.b.d", "d", "x.0.k", "x.2.q", "aab", "axb"} - set(names)
    assert all(re.fullmatch(pattern, name) for name in names)
    assert not any(re.fullmatch(pattern, name) for name in others)


def test_numbers_of_experts_are_none_of_layers() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(9)) for _ in range(2))
    require_matches(model, LoraSection(layers_to_transform=[0, 1], target_modules=["0"]))
    with pytest.raises(UserError, match="8: matches no layer; write numbers from 0 to 1"):
        require_matches(model, LoraSection(layers_to_transform=[0, 8]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"exclude_modules": "all-linear"}, "lora.exclude_modules: 'all-linear': matches no module's whole name, as"),
        ({"layers_to_transform": []}, r"lora.layers_to_transform: \[\]: names no layer; write numbers from 0 to 2"),
        (
            {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 8}},
            "layers.0.self_attn.q_proj': q_proj stands before it and matches model.layers.0.self_attn.q_proj, too; "
            "write layers.0.self_attn.q_proj first",
        ),
        ({"rank_pattern": {"q_proj": 4, "v_proj": 8}}, "'v_proj': matches no target"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            r"lora.layers_to_transform: \[0\]: chooses among names, .* write names there \(q_proj, k_proj, v_proj, ",
        ),
        (
            {"target_parameters": ["q_proj.weight"]},
            "lora.target_parameters: 'model.layers.0.self_attn.q_proj.weight': is of a module that lora.target_modules",
        ),
        ({"r": 40}, "k_proj is 32 x 64 and needs 80 singular directions; write 16 or less"),
    ],
)
def test_settings_that_do_nothing_or_do_not_fit_are_told_what_to_write(settings: dict[str, Any], told: str) -> None:
    model = make_model("llama")
    lora = LoraSection.model_validate({"target_modules": ["q_proj", "k_proj"], **settings})
    with pytest.raises(UserError, match=told):
        select_targets(meta_copy(type(model), model.config), lora, lambda r: 2 * r)


def test_a_parameter_of_a_conv1d_leads_to_its_module() -> None:
    model = make_model("gpt2")
    told = "'transformer.h.0.attn.c_proj.weight': is of a Conv1D, .* write attn.c_proj in lora.target_modules"
    for modules in ("all-linear", ["c_attn"]):
        lora = LoraSection(target_modules=modules, target_parameters=["attn.c_proj.weight"])
        with pytest.raises(UserError, match=told):
            select_targets(meta_copy(type(model), model.config), lora, lambda r: 2 * r)


def test_a_language_model_with_its_head_inside_leaves_towers_beside_it() -> None:
    config = InstructBlipConfig(
        vision_config={"num_hidden_layers": 1}, qformer_config={"num_hidden_layers": 1},
        text_config={"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 99},
    )  # fmt: skip
    with torch.device("meta"):
        model = InstructBlipForConditionalGeneration(config)
    text = text_model(model)
    assert text == "language_model"
    towers = {tower_of(name, text) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert towers == {None, "vision_model", "qformer", "language_projection"}
