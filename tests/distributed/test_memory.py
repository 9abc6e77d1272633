"""No rank holds more than its partition, the largest block and the engine state, but for a constant."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from builders import byte_tokenizer, config_tree, llama_config, save_data
from launching import INIT, run_ranks, succeed
from transformers import LlamaForCausalLM

LIMIT_BYTES = 150 * 2**20
"""250 MiB are allowed at any size, but within those a second copy of this model's largest block would go unseen."""


def test_two_ranks_stay_near_the_plan(tmp_path: Path) -> None:
    config = llama_config(
        vocab_size=64000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    del model
    tree = config_tree(
        tmp_path / "model",
        save_data(tmp_path / "data.jsonl", rows=4),
        tmp_path / "out",
        lora={"target_modules": ["down_proj"], "layers_to_transform": [0]},
        gradient={"max_targets_in_flight": 1},
        calibration={"max_length": 16, "per_device_batch_size": 1},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    succeed(run_ranks([INIT, "--config", str(tmp_path / "config.yaml")], 2, timeout_seconds=240))

    report = json.loads((tmp_path / "out" / "loraga_report.json").read_text())
    assert len(report["peak_bytes_per_rank"]) == 2
    for peak, planned in zip(report["peak_bytes_per_rank"], report["planned_peak_bytes_per_rank"], strict=True):
        assert model_bytes / 2 < planned, "the plan must at least hold the partition"
        assert peak > model_bytes / 2, "the peak was not measured"
        assert peak - planned <= LIMIT_BYTES, (peak / 2**20, planned / 2**20)
