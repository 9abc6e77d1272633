"""`init.rank_budget` through the whole pipeline: the same ranks on 1, 2 and 4 ranks, in every file, in stock PEFT."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import byte_tokenizer, config_tree, save_data, save_model
from outputs import (
    base_of,
    causal_lm,
    disturb,
    line_of,
    logits_of,
    make_output,
    read_adapter,
    read_factors,
    read_report,
    started,
)
from peft import PeftModel

import loraga_dist
from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main, main

R, ALPHA = 4, 6
BUDGET = 4 * (3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 112)))
"""What rank 4 everywhere takes."""
LORA = {"use_rslora": True, "lora_alpha": ALPHA}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Outputs by number of ranks and budget, each made once, when first asked for."""
    root = tmp_path_factory.mktemp("budgets")
    base, data = save_model(root / "base"), save_data(root / "data.jsonl", rows=21)

    def get(world_size: int, budget: int | None = BUDGET) -> Path:
        out = root / f"{world_size}-{budget}"
        if not out.exists():
            tree = config_tree(base, data, out, r=R, lora=LORA, init={"rank_budget": budget})
            make_output(tree, world_size)
        return out

    return get


def ranks(out: Path) -> dict[str, int]:
    return {name: target["r"] for name, target in read_report(out)["targets"].items()}


def expected_ranks(out: Path, budget: int) -> dict[str, int]:
    """Gains of all ranks of all targets in one list, from the largest per parameter on."""
    triplets = {key[:-2]: S.double() for key, S in read_factors(out).items() if key.endswith(".S")}
    shapes = {name: sum(target["shape"]) for name, target in read_report(out)["targets"].items()}
    found, left = dict.fromkeys(shapes, 1), budget - sum(shapes.values())
    gains = [
        (-S_K[2 * r : 2 * r + 2].square().sum().item() / shapes[name], name)
        for name, S_K in triplets.items()
        for r in range(1, 2 * R)
    ]
    full = set()
    for _, name in sorted(gains):
        if left < shapes[name]:
            full.add(name)
        if name not in full:
            found[name] += 1
            left -= shapes[name]
    return found


def test_ranks_go_where_they_capture_most(runs: Callable[..., Path]) -> None:
    out = runs(1)
    assert ranks(out) == expected_ranks(out, BUDGET)
    assert len(set(ranks(out).values())) > 3 and max(ranks(out).values()) == 2 * R, "else nothing was to be chosen"
    said = read_report(out)["rank_budget"]
    assert said["parameters"] == BUDGET >= said["spent"] > BUDGET - (64 + 112)
    assert sum(tensor.numel() for tensor in read_adapter(out).values()) == said["spent"]

    def energy(path: Path) -> float:
        return sum(
            math.fsum(s**2 for s in target["singular_values"]) for target in read_report(path)["targets"].values()
        )

    assert energy(out) > 1.01 * energy(runs(1, None)), "more than the same rank everywhere captures"
    for name, target in read_report(out)["targets"].items():
        same = read_report(runs(1, None))["targets"][name]
        assert target["scaling"] == pytest.approx(same["scaling"], rel=1e-11), name
        squares = [math.fsum(s**2 for s in it["singular_values"]) for it in (target, same)]
        share = same["captured_energy"] * squares[0] / squares[1]
        assert target["captured_energy"] == pytest.approx(share, rel=1e-4), name
        assert len(target["singular_values"]) == 2 * target["r"] and target["num_converged"] == 4 * R


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_spends_alike(runs: Callable[..., Path], world_size: int) -> None:
    alone, sharded = runs(1), runs(world_size)
    assert ranks(sharded) == ranks(alone)
    configs = [json.loads((out / "loraga_init/adapter_config.json").read_text()) for out in (alone, sharded)]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"] != {}
    found, expected = read_adapter(sharded), read_adapter(alone)
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() < 1e-4 * tensor.norm(), key


@pytest.mark.parametrize("world_size", [1, 2])
def test_stock_peft_starts_at_the_original(runs: Callable[..., Path], world_size: int) -> None:
    out = runs(world_size)
    assert verify(out).problems == [] and verify(out).residual_checked
    original, model = logits_of(causal_lm(base_of(out))), started(out)
    with model.disable_adapter():
        assert (logits_of(model) - original).abs().max() > 1e-3 * original.abs().max()
    assert (logits_of(model) - original).abs().max() < 1e-5 * original.abs().max()
    for name, target in read_report(out)["targets"].items():
        layer = model.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (target["r"], target["scaling"]), name
    spent = read_report(out)["rank_budget"]["spent"]
    assert f"{spent:,} of {BUDGET:,} parameters spent" in (out / "report.html").read_text()
    assert f"{spent} of {BUDGET} parameters spent" in (out / "README.md").read_text()


def test_factors_are_spent_again(runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, plain = runs(1), runs(1, None)
    assert main(["rebuild", str(source), "--to", str(tmp_path / "again")]) == 0
    for name in ("loraga_init", "loraga_offset"):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            again = (tmp_path / "again" / name / file).read_text("latin-1")
            assert again.replace(str(tmp_path / "again"), str(source)) == (source / name / file).read_text("latin-1")
    assert read_report(tmp_path / "again")["rank_budget"] == read_report(source)["rank_budget"]

    # the same from an output that knew of no budget, and another budget
    assert main(["rebuild", str(plain), "--to", str(tmp_path / "new"), "--init.rank_budget", str(BUDGET)]) == 0
    assert ranks(tmp_path / "new") == ranks(source)
    less = BUDGET // 2
    assert main(["rebuild", str(source), "--to", str(tmp_path / "less"), "--init.rank_budget", str(less)]) == 0
    assert ranks(tmp_path / "less") == expected_ranks(source, less)
    assert all(verify(tmp_path / name).ok for name in ("again", "new", "less"))
    assert main(["rebuild", str(source), "--to", str(tmp_path / "none"), "--init.rank_budget", "null"]) == 0
    assert read_adapter(tmp_path / "none").keys() == read_adapter(plain).keys() and set(
        ranks(tmp_path / "none").values()
    ) == {R}

    capsys.readouterr()
    assert main(["rebuild", str(source), "--to", str(tmp_path / "x"), "--init.rank_budget", "10"]) == 2
    assert "init.rank_budget: 10: is less than rank 1 of the 21 targets takes" in line_of(capsys)
    assert main(["rebuild", str(source), "--to", str(tmp_path / "x"), "--lora.rank_pattern", "{q_proj: 2}"]) == 2
    assert "decides ranks and alphas itself; remove lora.rank_pattern" in line_of(capsys)
    assert not (tmp_path / "x").exists()


def test_a_trained_adapter_converts(runs: Callable[..., Path], tmp_path: Path) -> None:
    out = runs(1)
    model = started(out, is_trainable=True)
    disturb(model)
    model.save_pretrained(tmp_path / "trained")
    words = ["--init", out / "loraga_init", "--trained", tmp_path / "trained", "--to", tmp_path / "to"]
    assert main(["convert", *map(str, words)]) == 0
    converted = PeftModel.from_pretrained(causal_lm(base_of(out)), tmp_path / "to")
    expected, found = logits_of(model), logits_of(converted)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_verify_counts_what_was_spent(runs: Callable[..., Path], tmp_path: Path) -> None:
    out = shutil.copytree(runs(1), tmp_path / "out")
    content = read_report(out)
    content["rank_budget"]["spent"] -= 1
    (out / "loraga_report.json").write_text(json.dumps(content))
    assert any("ranks take" in problem for problem in verify(out).problems)


def test_a_training_script_gets_the_same_ranks(runs: Callable[..., Path]) -> None:
    out = runs(1)
    config = read_report(out)["config"]
    model = causal_lm(base_of(out))
    rows = Path(config["calibration"]["data_files"]).read_text().splitlines()
    tokenizer = byte_tokenizer()
    batches = []
    for row in rows:
        ids = torch.tensor([tokenizer(json.loads(row)["text"] + "</s>")["input_ids"]])
        batches.append({"input_ids": ids, "labels": ids})
    start = loraga_dist.initialize(
        model,
        batches,
        {"lora": LORA | {"r": R}, "gradient": {"engine": "exact"}, "init": {"rank_budget": BUDGET}},
    )
    assert {target.name: target.r for target in start.targets} == ranks(out)
    for name, r in ranks(out).items():
        assert start.model.base_model.model.get_submodule(name).r["default"] == r
    assert start.identity_check.max_abs_logit_diff < 1e-5 * start.identity_check.max_abs_logit


def test_mistakes_and_the_plan_come_before_any_weight(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs(1).with_suffix(".yaml")
    command = ["--config", str(config), "--output.dir", str(tmp_path / "out")]
    assert init_main([*command, "--init.rank_budget", "2000"]) == 2
    least = BUDGET // 4
    assert line_of(capsys).endswith(
        f"init.rank_budget: 2000: is less than rank 1 of the 21 targets takes; write {least} or more, "
        "or leave targets out with lora.exclude_modules"
    )
    assert init_main([*command, "--lora.rank_pattern", "{q_proj: 2}"]) == 2
    assert "init.rank_budget" in line_of(capsys)
    assert main(["plan", "--config", str(config), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {kind["r"] for kind in plan["targets"]} == {2 * R}
    assert plan["rank_budget"] == {"parameters": BUDGET, "at_largest_ranks": 2 * BUDGET}
    assert plan["disk_bytes"]["loraga_init"] == 4 * BUDGET
    assert main(["plan", "--config", str(config)]) == 0
    assert f"{BUDGET} parameters; r above is the most a target may get" in capsys.readouterr().out
