"""Pushing a finished output, to an HTTP server that speaks what the hub's client asks of the hub."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from builders import config_tree, report_tree, save_data, save_model
from hub_server import REPO, TOKEN, Hub, served
from outputs import read_report
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraga_dist.artifacts.report import Report
from loraga_dist.cli import init_main, main
from loraga_dist.publish.hub import push_output
from loraga_dist.ranks.world import World

WANDB_KEY = "wandb" * 8


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served() as hub:
        # the environment was read when the client was imported
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
        yield hub


def config_of(root: Path, **output: Any) -> list[str]:
    out = {"dir": str(root / "out"), "push_to_hub": REPO, **output}
    tree = config_tree(save_model(root / "base"), save_data(root / "data.jsonl"), root / "out", output=out)
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(root / "config.yaml")]


def below(directory: Path, *names: str) -> set[str]:
    paths = [path for name in names for path in (directory / name).rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix() for path in paths}


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_repository_is_enough_to_train_from(
    hub: Hub, with_residual: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = config_of(tmp_path, push_residual_base=with_residual)
    hub.files["loraga_init/of_an_earlier_start.bin"] = b""
    assert init_main(arguments) == 0
    assert hub.num_commits == 1
    out = tmp_path / "out"
    folders = ["loraga_init", "loraga_offset", *(["residual_base"] if with_residual else [])]
    assert hub.files.keys() == {"README.md", "loraga_report.json", *below(out, *folders)}
    for name, content in hub.files.items():
        assert name == "README.md" or content == (out / name).read_bytes()

    card = hub.files["README.md"].decode()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "peft"
    assert "lora-ga" in yaml.safe_load(metadata)["tags"]
    assert "base_model" not in yaml.safe_load(metadata), "a directory of this machine means nothing on the hub"
    assert read_report(out)["base_fingerprint"] in text
    assert "model is wrong" in text

    # the card's program, on a copy of the repository
    copy = tmp_path / "someone" / "start"
    for name, content in hub.files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    program = text.split("```python\n")[1].split("```")[0]
    program = program.replace(REPO, str(copy)).replace("PATH_OF_THE_BASE", str(tmp_path / "base"))
    namespace: dict[str, Any] = {}
    exec(program, namespace)
    model: PeftModel = namespace["model"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, found = base(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert any(parameter.requires_grad for parameter in model.parameters())

    said = "".join(capfd.readouterr())
    assert f"pushed to {hub.url}/{REPO}" in said
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (TOKEN, WANDB_KEY):
        assert secret not in said
        assert not any(secret.encode() in content for content in [*written, *hub.files.values()])


def test_a_failed_push_leaves_the_output_complete(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses_commits = True
    assert init_main(config_of(tmp_path)) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist:")]
    assert f"{REPO} was not uploaded" in line and f"{tmp_path / 'out'} is complete and verified" in line
    assert TOKEN not in line
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_an_interrupt_does_not_wait_for_the_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = {"dir": str(tmp_path), "push_to_hub": REPO}
    report = Report.parse(json.dumps(report_tree(config={"model": {"name_or_path": "base"}, "output": output})))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt, match=f"while {REPO} was uploaded; the output in {tmp_path} is complete"):
            push_output(tmp_path, report, World.alone())
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("repo", "role", "token", "said"),
    [
        (REPO, "write", None, "run `hf auth login`"),
        (REPO, "write", "hf_wrong", "run `hf auth login`"),
        (REPO, "read", TOKEN, "may only read"),
        ("stranger/start", "write", TOKEN, "write someone/... or company/..."),
        ("someone/start/more", "write", TOKEN, "is no repository id"),
    ],
)
def test_no_access_is_known_before_the_run(
    hub: Hub,
    repo: str,
    role: str,
    token: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.user["auth"]["accessToken"]["role"] = role
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert init_main(config_of(tmp_path, push_to_hub=repo)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist:")]
    assert line.startswith("loraga-dist: output.push_to_hub: ") and said in line
    assert not hub.created and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("constant", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_a_hub_out_of_reach_is_known_before_the_run(
    hub: Hub,
    constant: str,
    value: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, constant, value)
    assert init_main(config_of(tmp_path)) == 2
    assert f"output.push_to_hub: '{REPO}': the hub gives no access" in capsys.readouterr().err


def test_a_residual_base_that_is_not_written_cannot_be_pushed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init_main(config_of(tmp_path, push_residual_base=True, residual_base="none")) == 2
    assert "output.push_residual_base: True: needs push_to_hub, and residual_base full" in capsys.readouterr().err
