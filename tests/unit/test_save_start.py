"""Starts made in memory and saved: what is on disk is what the model holds, and nothing else is taken for a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import TASKS, save_model
from outputs import disturb, line_of
from peft import PeftModel
from quantizing import by_transformers, save_fp8
from safetensors.torch import load_file

import loraga_dist
from loraga_dist.artifacts.layout import strangers
from loraga_dist.artifacts.report import Report
from loraga_dist.cli import main
from loraga_dist.schemes import SCHEMES, times_full_rate

AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}
LORA = {"r": 4, "lora_alpha": 8}


def initialized(base: Path, kind: str = "llama", init: dict[str, Any] | None = None, **lora: Any) -> Any:
    model = AUTO[TASKS[kind]].from_pretrained(base)
    ids = torch.arange(64).view(2, 32)
    labels = ids if TASKS[kind] == "CAUSAL_LM" else torch.tensor([0, 1])
    batches = [{"input_ids": ids + shift, "labels": labels} for shift in (0, 64, 128)]
    lora = {**LORA, "task_type": TASKS[kind], **lora}
    config = {"lora": lora, "init": init or {}, "gradient": {"engine": "exact"}}
    return loraga_dist.initialize(model, batches, config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43).view(2, 20)).logits.float()


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("llama", torch.float32, {"use_rslora": True, "rank_pattern": {"down_proj": 2}}),
        ("llama", torch.bfloat16, {}),
        ("gpt2", torch.float32, {}),
        ("llama", torch.float32, {"init": {"scheme": "lora_one"}}),
        ("llama", torch.float32, {"init": {"scheme": "pissa"}}),
        ("llama", torch.float32, {"init": {"rank_budget": 9000}}),
        ("bert", torch.float32, {"target_modules": ["query", "value"]}),
    ],
    ids=["patterns", "bf16", "conv1d", "lora_one", "pissa", "budget", "classifier"],
)
def test_saved_trained_and_converted(kind: str, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", kind, dtype=dtype)
    start = initialized(base, kind, **settings)
    held = {name: parameter.detach().float() for name, parameter in start.model.named_parameters() if "lora_" in name}
    assert loraga_dist.save_start(start, tmp_path / "start") == tmp_path / "start"
    stored = load_file(tmp_path / "start" / "loraga_init" / "adapter_model.safetensors")
    for name, parameter in held.items():
        assert torch.equal(stored[name.replace(".default", "")], parameter), name

    trainable = [parameter for parameter in start.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    labels = torch.tensor([0, 1]) if kind == "bert" else torch.arange(64).view(2, 32)
    for _ in range(3):
        start.model(input_ids=torch.arange(64).view(2, 32), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    start.model.save_pretrained(tmp_path / "trained")
    init = ["--init", str(tmp_path / "start" / "loraga_init"), "--trained", str(tmp_path / "trained")]
    assert main(["convert", *init, "--to", str(tmp_path / "plain"), "--merge", str(tmp_path / "merged")]) == 0
    expected = logits(start.model)
    plain = PeftModel.from_pretrained(AUTO[TASKS[kind]].from_pretrained(base), tmp_path / "plain")
    # the residual in the model is rounded to its dtype, the original base is not
    tolerance = (1e-5 if dtype == torch.float32 else 5e-2) * expected.abs().max()
    assert (logits(plain) - expected).abs().max() < tolerance
    assert (logits(AUTO[TASKS[kind]].from_pretrained(tmp_path / "merged")) - expected).abs().max() < tolerance


@pytest.mark.parametrize(
    ("init", "also", "expected"),
    [
        ({"stable_gamma": 1024.0}, {"scheme": "lora_ga"}, times_full_rate(SCHEMES["lora_ga"], "stable", 1024.0, 2.0)),
        ({}, {"scheme": "lora_ga", "stable_gamma": SCHEMES["lora_ga"].stable_gamma}, None),
        ({"scale": "unit"}, {"scheme": "lora_ga"}, times_full_rate(SCHEMES["lora_ga"], "unit", 16.0, 2.0)),
        ({"scheme": "rrr_step", "step": 0.01, "damping": 0.1}, {}, None),
    ],
)
def test_the_report_knows_the_scheme_and_its_settings(
    init: dict[str, Any], also: dict[str, Any], expected: float | None, tmp_path: Path
) -> None:
    loraga_dist.save_start(initialized(save_model(tmp_path / "base"), init=init), tmp_path / "start")
    report = Report.read(tmp_path / "start")
    known = report.config.init.model_dump(exclude_unset=True)
    # what no user has set is what the scheme takes
    assert {key: known[key] for key in init | also} == init | also
    if expected is not None:
        assert report.times_full_rate == expected


def test_what_is_no_start_of_that_base_is_refused(tmp_path: Path) -> None:
    base, other = save_model(tmp_path / "base"), save_model(tmp_path / "other", seed=1)
    start = initialized(base)
    with pytest.raises(loraga_dist.UserError, match="is not the weight of .*other"):
        loraga_dist.save_start(start, tmp_path / "start", base=other)
    weight = start.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    with torch.no_grad():
        weight.add_(1e-4 * weight.abs().max())
    with pytest.raises(loraga_dist.UserError, match="before training"):
        loraga_dist.save_start(start, tmp_path / "start")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_an_earlier_start_stays(tmp_path: Path) -> None:
    start = initialized(save_model(tmp_path / "base"))
    (tmp_path / "start").mkdir()
    with pytest.raises(loraga_dist.UserError, match="exists; write another directory"):
        loraga_dist.save_start(start, tmp_path / "start")
    assert not list((tmp_path / "start").iterdir())


def test_a_start_that_was_trained_over_is_not_of_its_output(tmp_path: Path) -> None:
    loraga_dist.save_start(initialized(save_model(tmp_path / "base")), tmp_path / "start")
    assert strangers(tmp_path / "start") == []
    weights = tmp_path / "start" / "loraga_init" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert strangers(tmp_path / "start") == ["loraga_init/adapter_model.safetensors"]


def test_quantized_weights_are_refused_before_anything_is_taken(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "base"))
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        loraga_dist.UserError, match=r"model\.layers\.1\.mlp\.up_proj.* a weight in float8_e4m3fn; load"
    ):
        loraga_dist.initialize(model, [], {"lora": LORA})
    assert not hasattr(model, "peft_config")


def test_a_start_of_dequantized_weights_belongs_on_the_quantized_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_fp8(tmp_path / "base")

    def initialized_by(scheme: str) -> Any:
        ids = torch.arange(40, 72).view(2, 16)
        config = {"lora": {**LORA, "task_type": "CAUSAL_LM"}, "init": {"scheme": scheme}}
        return loraga_dist.initialize(by_transformers(base, torch.float32), [{"input_ids": ids, "labels": ids}], config)

    with pytest.raises(loraga_dist.UserError, match=r"LoRA-GA': changes the base's weights, and .* quantized \(fp8\)"):
        loraga_dist.save_start(initialized_by("lora_ga"), tmp_path / "refused")
    start = initialized_by("rrr")
    loraga_dist.save_start(start, tmp_path / "start")
    disturb(start.model)
    start.model.save_pretrained(tmp_path / "trained")
    assert start.model.peft_config["default"].base_model_name_or_path == str(base)
    init = ["--init", str(tmp_path / "start" / "loraga_init"), "--trained", str(tmp_path / "trained")]
    assert main(["convert", *init, "--to", str(tmp_path / "plain")]) == 0
    plain = PeftModel.from_pretrained(by_transformers(base, torch.float32), tmp_path / "plain")
    expected = logits(start.model)
    assert (logits(plain) - expected).abs().max() < 1e-5 * expected.abs().max()
    capsys.readouterr()
    assert main(["convert", *init, "--merge", str(tmp_path / "merged")]) == 2
    assert "which are quantized (fp8); write --to, and serve that adapter on the base" in line_of(capsys)
