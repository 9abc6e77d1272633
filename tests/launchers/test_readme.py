"""What README.md tells a user to type works as it stands there."""

from __future__ import annotations

import re
import shlex

import pytest
from clones import Clone
from launching import ROOT, succeed

pytestmark = pytest.mark.timeout(2400)  # the first test that needs it pretrains the quickstart model

NOT_RUN = {
    "make test": "these tests are part of it",
    "torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
    "launch/init.py --config my.yaml": "needs four machines",
}

TRAIN = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("runs/quickstart/residual_base")
model = PeftModel.from_pretrained(base, "runs/quickstart/loraga_init", is_trainable=True)
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
ids = torch.arange(64).view(2, 32)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
model.save_pretrained("runs/trained")
"""


@pytest.fixture(scope="module")
def trained(quickstarted: Clone) -> None:
    """`runs/trained`, where the README has the adapter that a trainer saved."""
    succeed(quickstarted.shell(f"python -c {shlex.quote(TRAIN)}"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines if shlex.split(line, comments=True)]


def test_every_exception_is_in_the_readme() -> None:
    assert set(NOT_RUN) <= set(commands())


@pytest.mark.parametrize("command", [command for command in commands() if command not in NOT_RUN])
def test_command(quickstarted: Clone, command: str, request: pytest.FixtureRequest) -> None:
    if "runs/trained" in command:
        request.getfixturevalue("trained")
    succeed(quickstarted.once(command))  # `make quickstart` is what made the clone quickstarted


@pytest.mark.parametrize("program", blocks("python"), ids=lambda program: program.splitlines()[0])
def test_program(quickstarted: Clone, program: str) -> None:
    succeed(quickstarted.shell(f"python -c {shlex.quote(program)}"))
