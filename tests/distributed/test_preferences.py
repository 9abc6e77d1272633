"""A start for DPO or policy gradients: the same on two ranks as on one."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import config_tree, save_feedback, save_model
from outputs import make_output, read_products, read_report, relative


@pytest.mark.parametrize("kind", ["pairs", "rewards"])
def test_the_start_is_the_same_on_two_ranks(kind: str, tmp_path: Path) -> None:
    base, data = save_model(tmp_path / "base"), save_feedback(tmp_path / "data.jsonl", kind)
    outs = {}
    for ranks in (1, 2):
        # with an odd number of samples in the last step
        calibration = {"per_device_batch_size": 4 // ranks, "max_samples": 13}
        outs[ranks] = make_output(config_tree(base, data, tmp_path / f"out{ranks}", calibration=calibration), ranks)
    found, expected = (read_products(outs[ranks]) for ranks in (2, 1))
    assert found.keys() == expected.keys() and len(found) == 21
    for name, product in expected.items():
        assert relative(found[name], product) < 1e-3, name
    reports = [read_report(outs[ranks]) for ranks in (1, 2)]
    assert reports[0]["loss"] == {"pairs": "dpo", "rewards": "policy_gradient"}[kind]
    for key in ("num_sequences", "num_supervised_tokens", "data_fingerprint"):
        assert reports[0][key] == reports[1][key]
    for key in ("mean_loss", "split_half_cosine"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-3)
