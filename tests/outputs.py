"""Output directories: made by init on any number of ranks, and read as a user's script reads them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import INIT, free_port, succeed
from peft import PeftModel
from ranks import run_on_ranks, run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraga_dist.cli import init_main

IDS = torch.arange(3, 43).view(2, 20) % 250
"""Token ids of which logits are compared."""
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
"""Ends of the names of all experts' parameters, in every family of `builders.MOE`."""


def write_config(tree: dict[str, Any]) -> Path:
    """The tree as a YAML file beside the output directory that it names."""
    path = Path(tree["output"]["dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def make_output(tree: dict[str, Any], world_size: int = 1, *options: str, forked: bool = False) -> Path:
    """Run init of the tree as so many ranks; the output directory.

    forked: also a single rank is a process of its own, which DeepSpeed needs.
    """
    arguments = ["--config", str(write_config(tree)), *options]
    if world_size == 1 and not forked:
        assert init_main(arguments) == 0
    else:
        succeed(run_script([INIT, *arguments], world_size, timeout_seconds=200))
    return Path(tree["output"]["dir"])


def make_outputs(trees: Sequence[dict[str, Any]], world_size: int) -> list[Path]:
    """The same of several trees, one after the other in the same processes."""
    runs = [(free_port(), ["--config", str(write_config(tree))]) for tree in trees]
    run_on_ranks(_init_in_turn, world_size, runs, timeout_seconds=280)
    return [Path(tree["output"]["dir"]) for tree in trees]


def _init_in_turn(runs: Sequence[tuple[int, list[str]]]) -> None:
    for port, arguments in runs:
        os.environ["MASTER_PORT"] = str(port)  # each has a group of its own
        assert init_main(arguments) == 0


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / "loraga_report.json").read_text())


def read_adapter(out: Path, name: str = "loraga_init") -> dict[str, torch.Tensor]:
    return load_file(out / name / "adapter_model.safetensors")


def read_start(out: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A0 and B0 of every target by its name, float64; of experts taken out of their layer's as PEFT reads that."""
    adapter, found = read_adapter(out), {}
    for name, target in read_report(out)["targets"].items():
        stack = target.get("stack")
        layer = f"base_model.model.{stack['layer'] if stack else name}"
        A, B = (adapter[f"{layer}.lora_{letter}.weight"].double() for letter in "AB")
        if stack:
            A, B = A[stack["index"] * target["r"] :][: target["r"]], B[:, stack["index"] :: stack["size"]]
        found[name] = A, B
    return found


def read_products(out: Path) -> dict[str, torch.Tensor]:
    """B0 A0 of every target by its name, which no sign or split of the factors can hide a difference in."""
    return {name: B @ A for name, (A, B) in read_start(out).items()}


def read_factors(out: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in (out / "factors").glob("*.safetensors") for key, tensor in load_file(path).items()}


def captured_shares(out: Path, exact: Path) -> dict[str, float]:
    """Share of the best 2r directions' energy that the run's own 2r directions hold, by the exact run's gradient."""
    found, best = read_factors(out), read_factors(exact)
    shares = {}
    for name in (key.removesuffix(".S") for key in best if key.endswith(".S")):
        G_MN = best[f"{name}.U"] * best[f"{name}.S"] @ best[f"{name}.Vh"]
        U_MK, Vh_KN = found[f"{name}.U"][:, :8], found[f"{name}.Vh"][:8]
        shares[name] = ((U_MK.T @ G_MN @ Vh_KN.T).square().sum() / best[f"{name}.S"][:8].square().sum()).item()
    return shares


def base_of(out: Path) -> Path:
    return Path(read_report(out)["config"]["model"]["name_or_path"])


def causal_lm(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def started(out: Path, **options: Any) -> Any:
    """The start as stock PEFT loads it: on the residual base, or the original one, as its README says."""
    base = out / "residual_base" if (out / "residual_base").exists() else base_of(out)
    assert f'from_pretrained("{base}"' in (out / "README.md").read_text()
    return PeftModel.from_pretrained(causal_lm(base), out / "loraga_init", **options)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def disturb(model: torch.nn.Module, size: float = 0.02) -> None:
    """Move every LoRA parameter a little, as training would; magnitudes ten times as much."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter += (10 * size if "magnitude" in name else size) * noise


def disturbed_copy(adapter: Path, to: Path) -> Path:
    """An adapter's directory with other factors, as a trainer would leave it."""
    shutil.copytree(adapter, to)
    generator = torch.Generator().manual_seed(0)
    factors = load_file(adapter / "adapter_model.safetensors")
    moved = {key: held + 0.02 * torch.randn(held.shape, generator=generator) for key, held in factors.items()}
    save_file(moved, to / "adapter_model.safetensors", {"format": "pt"})
    return to


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    return ((found - expected).norm() / expected.norm()).item()


def flip_bit(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command refused."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist: ")]
    return line


def angle_between_rows(one_RN: torch.Tensor, other_RN: torch.Tensor) -> float:
    """The sine of the largest principal angle between two spans of rows, by float64."""
    one_NR, other_NR = (torch.linalg.qr(rows.double().T).Q for rows in (one_RN, other_RN))
    return float(torch.linalg.matrix_norm(one_NR - other_NR @ (other_NR.T @ one_NR), 2))
