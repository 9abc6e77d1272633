"""docs/EXTENDING.md, run as it stands: a scheme and an engine of one's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders import config_tree, save_data, save_model
from launching import ROOT, Finished, run, succeed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PAGE = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
R, SCALING = 4, 2.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mine.py as the page has it, a model, and init.yaml."""
    home = tmp_path_factory.mktemp("extending")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    (home / "mine.py").write_text("\n".join(blocks))
    tree = config_tree(save_model(home / "model"), save_data(home / "data.jsonl"), home / "out", r=R)
    (home / "init.yaml").write_text(yaml.safe_dump(tree))
    return home


def mine(home: Path, *arguments: str) -> Finished:
    return run([sys.executable, str(home / "mine.py"), *arguments])


def init(home: Path, name: str, *overrides: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The report and the adapter of one run."""
    succeed(mine(home, "init", "--config", str(home / "init.yaml"), "--output.dir", str(home / name), *overrides))
    adapter = load_file(home / name / "loraga_init" / "adapter_model.safetensors")
    return json.loads((home / name / "loraga_report.json").read_text()), adapter


def test_the_scheme_takes_the_smallest_directions_out_of_the_base(home: Path) -> None:
    report, adapter = init(home, "milora", "--init.scheme", "milora")
    assert report["config"]["init"]["scheme"] == "milora" and not (home / "milora" / "factors").exists()
    weights, residual = (
        AutoModelForCausalLM.from_pretrained(directory).state_dict()
        for directory in (home / "model", home / "milora" / "residual_base")
    )
    for name in report["targets"]:
        W_MN = weights[f"{name}.weight"].double()
        S_J = torch.linalg.svdvals(W_MN)
        A_RN, B_MR = (adapter[f"base_model.model.{name}.lora_{kind}.weight"].double() for kind in "AB")
        close = {"rtol": 1e-5, "atol": 1e-5 * S_J[0].item()}
        torch.testing.assert_close(torch.linalg.svdvals(SCALING * B_MR @ A_RN)[:R], S_J[-R:], **close)
        left = torch.linalg.svdvals(residual[f"{name}.weight"].double())
        torch.testing.assert_close(left, torch.cat([S_J[:-R], torch.zeros(R, dtype=torch.float64)]), **close)
    succeed(mine(home, "verify", str(home / "milora")))


def test_the_engine_finds_what_the_exact_one_finds(home: Path) -> None:
    dense, found = init(home, "dense", "--gradient.engine", "dense")
    _, expected = init(home, "exact", "--gradient.engine", "exact")
    assert {target["engine"] for target in dense["targets"].values()} == {"dense"}
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-4 * tensor.abs().max().item())
    planned = mine(home, "plan", "--config", str(home / "init.yaml"), "--gradient.engine", "dense", "--json")
    succeed(planned)
    assert {kind["engine"] for kind in json.loads(planned.stdout)["targets"]} == {"dense"}
