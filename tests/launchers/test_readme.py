"""What README.md and docs/ tell a user to type works as it stands there, `make quickstart` first.

In one file, which is what goes to one worker: all of it needs the model that `make quickstart` pretrains.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from pathlib import Path

import pytest
from clones import Clone
from launching import ROOT, succeed
from outputs import read_report

from loraga_dist.artifacts.names import ADAPTER_CONFIG, LORAGA_INIT

pytestmark = pytest.mark.timeout(2400)  # the first test that needs it pretrains the quickstart model

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TEST = {"EXTENDING.md"}
"""Their programs are parts of one that a test of its own puts together."""
NOT_RUN = {
    "make test": "these tests are part of it",
    "deepspeed --num_gpus 2 launch/init.py --config configs/quickstart.yaml --overwrite": "`make quickstart` runs it",
    "torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
    "launch/init.py --config my.yaml": "needs four machines",
    "sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 "
    "launch/slurm/srun_per_gpu.sbatch --config my.yaml": "needs four machines; test_slurm.py submits it to two nodes",
    "launch/mpi.sh -n 16 --hostfile launch/hostfile -- --config my.yaml": "the same; test_launchers.py has two ranks",
    "deepspeed --hostfile launch/hostfile --master_addr node0 "
    "launch/init.py --config my.yaml": "the same; test_launchers.py has a hostfile of this machine",
    "deepspeed --hostfile launch/hostfile --master_addr node0 --no_ssh --node_rank 1 "
    "launch/init.py --config my.yaml": "the same; test_slurm.py has two nodes",
}

LESS = {"examples/train_": "--steps 4", "runs/r16": "--calibration.max_samples 8"}
"""What a command is also given, by what it holds, where another test has the whole: it has only to run."""

PER_TARGET = {
    "shape",
    "r",
    "singular_values",
    "captured_energy",
    "split_half_cosine",
    "window_capture",
    "offset_ratio",
    "owner_rank",
}


def test_model_has_learned_and_is_built_once(quickstarted: Clone) -> None:
    record = quickstarted.root / "build" / "quickstart" / "recipe.json"
    made, before = json.loads(record.read_text()), record.stat()
    assert made["heldout_loss"] < 1.6
    started = time.monotonic()
    succeed(quickstarted.shell("python launch/quickstart.py"))
    assert time.monotonic() - started < made["seconds"]
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_report_keeps_its_contract(quickstarted: Clone) -> None:
    directory = quickstarted.root / "runs" / "quickstart"
    report = read_report(directory)
    assert report["schema_version"] == 1
    assert report["world_size"] == 2
    assert report["engine"] == report["config"]["gradient"]["engine"]
    assert report["num_sequences"] == 128
    assert report["num_supervised_tokens"] > 128 * 150  # passages of at least 200 bytes, shared by ranks
    assert {"load", "calibrate", "factorize", "write", "total"} <= report["seconds"].keys()
    assert len(report["peak_bytes_per_rank"]) == len(report["planned_peak_bytes_per_rank"]) == 2
    assert report["state_bytes_per_rank"] > 0
    assert report["base_fingerprint"] and report["data_fingerprint"] and report["versions"]
    assert report["identity_check"]["dtype"] == "float32"
    assert report["identity_check"]["max_abs_logit_diff"] < 1e-3
    assert report["warnings"] == []

    r = json.loads((directory / LORAGA_INIT / ADAPTER_CONFIG).read_text())["r"]
    assert len(report["targets"]) == 4 * 7
    assert {target["owner_rank"] for target in report["targets"].values()} == {0, 1}
    for target in report["targets"].values():
        assert target.keys() >= PER_TARGET
        values = target["singular_values"]
        assert len(values) >= 2 * r == 2 * target["r"]
        assert all(math.isfinite(value) for value in values) and values == sorted(values, reverse=True)
        assert 0 < target["captured_energy"] <= 1
        assert 0 < target["offset_ratio"] < 1


def test_a_mixture_of_experts_starts_with_all_its_experts(quickstarted: Clone) -> None:
    for line in commands():
        if "--model moe" in line or "quickstart-moe.yaml" in line:
            succeed(quickstarted.once(line))
    report = read_report(quickstarted.root / "runs" / "quickstart-moe")
    assert report["world_size"] == 2
    assert len(report["targets"]) == 2 * (4 + 2 * 8)  # layers of attention's matrices and two of each expert
    assert report["identity_check"]["max_abs_logit_diff"] < 1e-3
    assert not any("got no gradient" in line or "leaves experts" in line for line in report["warnings"])


@pytest.mark.parametrize("settings", ["zero3.json", "zero3_offload_cpu.json"])
def test_deepspeed_settings_that_ship_with_the_project_run(quickstarted: Clone, settings: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    quickstart = (quickstarted.root / "configs" / "quickstart.yaml").read_text()
    config.write_text(f"{quickstart}\ndeepspeed: configs/deepspeed/{settings}\n")
    succeed(
        quickstarted.shell(
            f"torchrun --standalone --nproc_per_node 2 launch/init.py --config {config} "
            f"--calibration.max_samples 8 --output.residual_base none --output.dir {tmp_path / 'run'}"
        )
    )


def blocks(language: str, documents: list[Path]) -> list[str]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return [block for document in documents for block in fence.findall(document.read_text())]


def commands() -> list[str]:
    """Each once, in the order of the documents."""
    lines = [line for block in blocks("bash", DOCUMENTS) for line in block.replace("\\\n", "").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return list(dict.fromkeys(" ".join(words_of_line) for words_of_line in words if words_of_line))


def programs() -> list[str]:
    return blocks("python", [document for document in DOCUMENTS if document.name not in OWN_TEST])


def test_every_exception_is_in_a_document() -> None:
    assert set(NOT_RUN) <= set(commands())


@pytest.mark.parametrize("command", [command for command in commands() if command not in NOT_RUN])
def test_command(quickstarted: Clone, command: str) -> None:
    """In the order of the documents: some use what earlier ones have made."""
    less = [words for part, words in LESS.items() if part in command]
    succeed(quickstarted.once(" ".join([command, *less])))  # `make quickstart` is what made the clone quickstarted


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.splitlines()[0])
def test_program(quickstarted: Clone, program: str) -> None:
    succeed(quickstarted.shell(f"python -c {shlex.quote(program)}"))


def test_the_readmes_way_on_a_model_of_ones_own(quickstarted: Clone) -> None:
    """A recipe of defaults, `init`, an example at its own rate and steps, `convert`: the loss falls, and all fits."""
    for line in commands():
        if line.startswith(("loraga-dist config", "loraga-dist init --config my.yaml")):
            succeed(quickstarted.once(line))
    assert read_report(quickstarted.root / "runs" / "mine")["config"]["gradient"]["engine"] == "auto"
    few = "head -n 16 build/quickstart/calibration.jsonl > few.jsonl"  # seen five times: epochs compare, batches do not
    trained = quickstarted.shell(
        f"{few} && python examples/train_trainer.py --loraga_dir runs/mine --data few.jsonl --output runs/mine-trained"
    )
    succeed(trained)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", trained.stdout)]
    epochs = [sum(losses[first : first + 4]) / 4 for first in range(0, 20, 4)]
    assert len(losses) == 20 and epochs == sorted(epochs, reverse=True)
    assert "warning: the loss rises" not in trained.stdout
    words = "--init runs/mine/loraga_init --trained runs/mine-trained/trained --to runs/mine-converted"
    succeed(quickstarted.shell(f"loraga-dist convert {words}"))
