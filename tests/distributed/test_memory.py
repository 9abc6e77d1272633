"""A rank holds what the plan says: its partition, the largest block, the engine state and not much more."""

from __future__ import annotations

from pathlib import Path

import torch
from builders import byte_tokenizer, config_tree, llama_config, save_data
from outputs import make_output, read_report
from transformers import LlamaForCausalLM

OFF = 0.1
"""The plan may be, either way. A second copy of this model's largest block, 125 MiB, would be seen in the peak and
in the plan."""


def test_two_ranks_take_what_the_plan_says(tmp_path: Path) -> None:
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
    report = read_report(make_output(tree, 2))
    peaks, plans = report["peak_bytes_per_rank"], report["planned_peak_bytes_per_rank"]
    assert len(peaks) == len(plans) == 2
    for peak, planned in zip(peaks, plans, strict=True):
        assert model_bytes / 2 < planned, "the plan must at least hold the partition"
        assert abs(planned / peak - 1) <= OFF, (peak / 2**20, planned / 2**20)
