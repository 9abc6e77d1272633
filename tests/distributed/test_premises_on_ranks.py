"""Ranks agree on what does not hold of a model, and on what they take instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import ENCODER, config_tree, save_class, save_data
from outputs import make_output, read_products, read_report, relative

pytestmark = pytest.mark.distributed


def test_two_ranks_take_texts_one_by_one_as_one_does(tmp_path: Path) -> None:
    model = save_class(tmp_path / "model", "FNetForSequenceClassification", **ENCODER)
    data, found = save_data(tmp_path / "data.jsonl", "SEQ_CLS", rows=5), []
    for world_size in (1, 2):
        tree = config_tree(model, data, tmp_path / f"out{world_size}", lora={"r": 2, "task_type": "SEQ_CLS"})
        out = make_output(tree, world_size)
        found.append((read_report(out)["cautions"], read_products(out)))
    (alone, products), (together, of_ranks) = found
    assert alone == together and len(alone) == 1
    for name, product in products.items():
        assert relative(of_ranks[name], product) < 1e-4, name
