"""Wrong inputs by the hundred: each ends at once with exit code 0, or 2 and one line, and nothing is left behind.

3 is for data found damaged. A case is made by its kind and seed: `pytest tests/fuzz --fuzz_case yaml:17` repeats it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from builders import byte_tokenizer, config_tree, llama_config, save_data
from kinds import KINDS, Case
from mutations import Dice
from outputs import disturbed_copy, make_output, write_config
from ranks import run_on_ranks
from stopping import init_until
from transformers import LlamaForCausalLM

from loraga_dist.cli import main

pytestmark = pytest.mark.distributed

MAX_SECONDS = 20
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
LINE = re.compile(r"loraga-dist( [a-z-]+)?: ")
"""Ours, or argparse's."""
TOLD = re.compile(
    r"loraga-dist: (checkpoint: |going on from|the same command goes on)|usage: | +\[|warning: |"
    r"[a-z ]+: [0-9.]+ ?(k?M?B|microbatches|sequences)\b|adapters: [0-9.]+ |plan: \d+ microbatches|"
    r"Loading weights: |$"
)
"""What may stand beside it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right ones: a model, data, a finished output, a trained adapter, and what a stopped run left."""
    root = tmp_path_factory.mktemp("inputs")
    model, data = root / "model", save_data(root / "data.jsonl", rows=12)
    LlamaForCausalLM(llama_config(num_hidden_layers=1)).save_pretrained(model, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    (root / "chats.jsonl").write_text((json.dumps({"messages": chat, "tag": 1}) + "\n") * 6)
    make_output(config_tree(model, data, root / "out", lora={"target_modules": ["q_proj", "down_proj"]}))
    disturbed_copy(root / "out" / "loraga_init", root / "trained")
    tree = config_tree(model, data, root / "stopped" / "out", gradient={"max_targets_in_flight": 4})
    (root / "stopped").mkdir()
    assert init_until(9, write_config(tree | {"resume": "auto"}), []) == 143
    shutil.move(root / "stopped" / "out.yaml", root / "stopped.yaml")
    return root


def test_wrong_inputs_are_refused_in_one_line(
    inputs: Path, kind: str, seeds: Sequence[int], record_property: Callable[[str, object], None]
) -> None:
    before = contents(inputs)
    ((codes, problems),) = run_on_ranks(
        try_all, 1, str(inputs), kind, seeds, timeout_seconds=60 + MAX_SECONDS * len(seeds)
    )
    record_property(f"fuzz {kind}", Counter(codes).most_common())
    assert not problems, "\n".join(problems)
    assert contents(inputs) == before


@pytest.mark.parametrize("right_kind", KINDS)
def test_right_inputs_are_accepted(inputs: Path, right_kind: str) -> None:
    """Else the wrong ones would be refused for what is wrong in all of them."""
    seeds = range(8 if right_kind == "output" else 1)  # of several commands
    ((_, problems),) = run_on_ranks(try_all, 1, str(inputs), right_kind, seeds, False)
    assert not problems, "\n".join(problems)


def try_all(inputs: str, kind: str, seeds: Sequence[int], changes: bool = True) -> tuple[list[int], list[str]]:
    """Every case in a child of this process, which has imported what they need; exit codes, and what is wrong."""
    for module in (
        "datasets.packaged_modules.json.json", "pyarrow.json", "trl.data_utils", "trl.chat_template_utils",
        "transformers.models.llama.modeling_llama", "transformers.models.llama.configuration_llama", "loraga_dist.cli",
        "loraga_dist.commands.rebuild", "loraga_dist.commands.convert", "loraga_dist.commands.materialize",
        "loraga_dist.artifacts.verify", "loraga_dist.run.pipeline", "loraga_dist.publish.text",
        "loraga_dist.ranks.watch", "deepspeed.runtime.zero.config",
    ):  # fmt: skip
        importlib.import_module(module)
    codes, problems = [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            code, found = try_one(Path(inputs), kind, Dice(f"{kind}:{seed}", changes=changes), Path(directory))
        codes.append(code)
        problems += [f"{kind}:{seed} ({code}): {problem}" for problem in found]
    return codes, problems


def try_one(inputs: Path, kind: str, dice: Dice, root: Path) -> tuple[int, list[str]]:
    case_directory, temporary, words = root / "case", root / "tmp", (root / "stdout", root / "stderr")
    case_directory.mkdir()
    temporary.mkdir()
    case = KINDS[kind](inputs, case_directory, dice)
    before = contents(case_directory)
    started = time.monotonic()
    child = os.fork()
    if not child:
        be_command(case, temporary, words)
    code = wait(child, started + MAX_SECONDS)
    after = contents(case_directory)
    out, err = (path.read_text(errors="backslashreplace") for path in words)
    problems = judge(case, code, out, err)
    if not dice.changes and (code or " is damaged" in err):
        problems.append("right input is refused")
    for name in sorted(before.keys() | after.keys()):
        if before.get(name, b"") != after.get(name, b"") and not name.startswith(case.makes):
            problems.append(f"{name} is changed, left or gone")
    # the cache of `datasets`, which some names of data lead out of its directory
    left = [path.name for path in temporary.iterdir() if not path.name.startswith(("datasets", "default-"))]
    problems += [f"temporary {name} is left" for name in left]
    problems += [f"{case.arguments}\n{err[-1500:]}"] if problems else []
    return code, problems


def be_command(case: Case, temporary: Path, words: Sequence[Path]) -> None:
    """The child: one command, in a group of processes of its own."""
    try:
        os.setsid()
        for descriptor, path in zip((1, 2), words, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        importlib.import_module("datasets").config.HF_DATASETS_CACHE = temporary / "datasets"
        code = main(case.arguments)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int, deadline: float) -> int:
    """Its exit code, below zero for a signal; -9 also for one that had to be killed."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def judge(case: Case, code: int, out: str, err: str) -> list[str]:
    """What is wrong with the way a command ended."""
    problems = []
    if code not in case.codes:
        problems.append("it crashed or took too long" if code < 0 else f"exit code {code}")
    if "Traceback" in err:
        problems.append("a traceback")
    lines = [line for line in err.splitlines() if not TOLD.match(line)]
    if code and not (1 <= len(lines) <= case.num_lines and all(LINE.match(line) for line in lines)):
        problems.append(f"{len(lines)} lines instead of one of ours")
    if not code and lines:
        problems.append("words on the way to success")
    if any(not c.isprintable() and c != "\n" for c in out + err):
        problems.append("control characters")
    return problems


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, by its path; of anything else that it is there."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"directory"
        for path in directory.rglob("*")
    }
