"""Every wrong input ends on all ranks with exit code 2, one line, and no file made or changed.

Most of a run's seconds go into imports, so the same two processes make all runs of the table; a few are also made as
users make them, in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import pytest
import torch
import yaml
from builders import VOCABULARY, config_tree, save_data, save_model
from launching import INIT, Finished, free_port, run, succeed
from outputs import read_report
from ranks import finish_on_ranks, run_script
from safetensors.torch import load_file, save_file

from loraga_dist.cli import init_main, main
from loraga_dist.config import load_config

pytestmark = pytest.mark.distributed

MAX_SECONDS = 60
"""For one refusal on busy cores; the first also imports the libraries."""


@dataclass
class Attempt:
    """One run to be refused: its configuration, and the directory that holds all it may write to."""

    directory: Path
    tree: dict[str, Any]
    config: Path = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.directory / "config.yaml"

    @property
    def out(self) -> Path:
        return self.directory / "out"

    @property
    def arguments(self) -> list[str]:
        return ["--config", str(self.config)]

    def copy_model(self) -> Path:
        """A model that the case may damage; the configuration points at it."""
        copy = self.directory / "model"
        shutil.copytree(self.tree["model"]["name_or_path"], copy)
        self.tree["model"]["name_or_path"] = str(copy)
        return copy

    def write_data(self, *rows: dict[str, Any]) -> None:
        path = self.directory / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.tree["calibration"]["data_files"] = str(path)


Change = Callable[[Attempt], object]


def contents(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def setting(section: str, **values: Any) -> Change:
    return lambda attempt: attempt.tree.setdefault(section, {}).update(values)


def misspelled_section(attempt: Attempt) -> None:
    attempt.tree["calibrate"] = {}


def configuration_missing(attempt: Attempt) -> None:
    attempt.config = attempt.directory / "absent.yaml"


def configuration_not_yaml(attempt: Attempt) -> None:
    attempt.config = attempt.directory / "broken.yaml"
    attempt.config.write_text("model: [never closed\n")


def deepspeed_stage_2(attempt: Attempt) -> None:
    path = attempt.directory / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    attempt.tree["deepspeed"] = str(path)


def deepspeed_file_missing(attempt: Attempt) -> None:
    attempt.tree["deepspeed"] = str(attempt.directory / "absent.json")


def data_file_missing(attempt: Attempt) -> None:
    attempt.tree["calibration"]["data_files"] = str(attempt.directory / "absent.jsonl")


def every_completion_cut_off(attempt: Attempt) -> None:
    attempt.write_data(*({"prompt": "a long prompt " * 3, "completion": " yes"} for _ in range(4)))
    attempt.tree["calibration"]["max_length"] = 16


def sample_beyond_the_positions(attempt: Attempt) -> None:
    attempt.write_data({"text": "short"}, {"text": "x" * 200})
    attempt.tree["calibration"]["max_length"] = 512


def model_missing(attempt: Attempt) -> None:
    attempt.tree["model"]["name_or_path"] = str(attempt.directory / "absent")


def shard_missing(attempt: Attempt) -> None:
    (attempt.copy_model() / "model-00003-of-00007.safetensors").unlink()


def shard_truncated(attempt: Attempt) -> None:
    shard = attempt.copy_model() / "model-00003-of-00007.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])


def index_leads_outside(attempt: Attempt) -> None:
    index = attempt.copy_model() / "model.safetensors.index.json"
    shutil.copy(index.parent / "model-00003-of-00007.safetensors", attempt.directory / "x.safetensors")
    index.write_text(index.read_text().replace("model-00003-of-00007.safetensors", "../x.safetensors"))


def pickles_only(attempt: Attempt) -> None:
    copy = attempt.copy_model()
    for path in copy.glob("model*.safetensors*"):
        path.unlink()
    torch.save({"lm_head.weight": torch.zeros(VOCABULARY, 64)}, copy / "pytorch_model.bin")


def tied_target(attempt: Attempt) -> None:
    attempt.tree["model"]["name_or_path"] = str(save_model(attempt.directory / "tied", "tied"))
    attempt.tree["lora"]["target_modules"] = ["lm_head"]


def ties_unequal_tensors(attempt: Attempt) -> None:
    config = attempt.copy_model() / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))


def output_exists(attempt: Attempt) -> None:
    attempt.out.mkdir()
    (attempt.out / "loraga_report.json").write_text("{}")


def overwrite_of_something_else(attempt: Attempt) -> None:
    attempt.out.mkdir()
    (attempt.out / "thesis.tex").write_text("years of work")
    attempt.tree["output"]["overwrite"] = True


def in_file(name: str, content: bytes | dict[str, Any]) -> Change:
    """A file of the model replaced, or keys of its JSON."""

    def change(attempt: Attempt) -> None:
        path = attempt.copy_model() / name
        if isinstance(content, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | content))
        else:
            path.write_bytes(content)

    return change


def templated(template: str) -> Change:
    def change(attempt: Attempt) -> None:
        in_file("chat_template.jinja", template.encode())(attempt)
        attempt.write_data(*({"messages": [{"role": "user", "content": "x" * 40}]} for _ in range(4)))

    return change


def data_of(content: bytes) -> Change:
    def change(attempt: Attempt) -> None:
        attempt.write_data()
        Path(attempt.tree["calibration"]["data_files"]).write_bytes(content)

    return change


def output_is_a_loop(attempt: Attempt) -> None:
    attempt.out.symlink_to(attempt.out)


MODEL, TARGETS, DATA, OUT = "model.name_or_path", "lora.target_modules", "calibration.data_files", "output.dir"

CASES = {
    # name: (change, key, part of the value, part of what to write instead)
    "configuration missing": (configuration_missing, "--config", "/absent.yaml'", "write the path of a YAML file"),
    "not YAML": (configuration_not_yaml, "--config", "/broken.yaml'", "is not YAML"),
    "parameter without a match": (
        setting("lora", target_parameters=["experts.gate_up_proj"]),
        "lora.target_parameters", "'experts.gate_up_proj'", "matches no parameter; leave it out",
    ),
    "unknown key": (
        setting("lora", target_module="q_proj"), "lora.target_module", "'q_proj'", "did you mean lora.target_modules?",
    ),
    "unknown section": (misspelled_section, "calibrate", "{}", "did you mean calibration?"),
    "wrong type": (setting("lora", r="eight"), "lora.r", "'eight'", "should be a valid integer"),
    "no such choice": (
        setting("init", direction="up"), "init.direction", "'up'", "'ArB2r', 'A2rBr', 'ArBr' or 'random'",
    ),
    "dropout": (setting("lora", lora_dropout=1.5), "lora.lora_dropout", "1.5", "should be less than 1"),
    "rank budget": (setting("init", rank_budget=99), "init.rank_budget", "99", "leave targets out with lora.exclude"),
    "task": (setting("lora", task_type="SEQ_2_SEQ_LM"), "lora.task_type", "'SEQ_2_SEQ_LM'", "CAUSAL_LM or SEQ_CLS"),
    "float16 on a CPU": (setting("model", dtype="float16"), "model.dtype", "'float16'", "write float32 or bfloat16"),
    "no match": (setting("lora", target_modules=["query"]), TARGETS, "'query'", "or all-linear"),
    "one without a match": (
        setting("lora", target_modules=["q_proj", "k_porj"]), TARGETS, "'k_porj'", "did you mean k_proj",
    ),
    "expression without a match": (
        setting("lora", target_modules="q_proj"), TARGETS, "'q_proj'", "whole name, as model.layers.0.self_attn.q_proj",
    ),
    "exclusion without a match": (
        setting("lora", exclude_modules=["dwn_proj"]), "lora.exclude_modules", "'dwn_proj'", "did you mean down_proj",
    ),
    "saved without a match": (
        setting("lora", modules_to_save=["lm_haed"]), "lora.modules_to_save", "'lm_haed'", "did you mean lm_head?",
    ),
    "no such layer": (
        setting("lora", layers_to_transform=[0, 9]), "lora.layers_to_transform", "9", "write numbers from 0 to 2",
    ),
    "embedding": (
        setting("lora", target_modules=["embed_tokens"]), TARGETS, "['embed_tokens']", "add it to lora.exclude_modules",
    ),
    "norm": (setting("lora", target_modules=["input_layernorm"]), TARGETS, "['input_layernorm']", "nn.Linear"),
    "tied": (tied_target, TARGETS, "['lm_head']", "tied to other parameters (model.embed_tokens.weight)"),
    "ties what differs": (ties_unequal_tensors, MODEL, "'lm_head.weight'", "write tie_word_embeddings: false there"),
    "r too large": (
        setting("lora", r=17, target_modules=["q_proj", "k_proj"]),
        "lora.r", "17", "model.layers.0.self_attn.k_proj is 32 x 64 and needs 34 singular directions; write 16 or less",
    ),
    "r of a pattern too large": (
        setting("lora", rank_pattern={"layers.1.mlp.up_proj": 33}),
        "lora.rank_pattern", "33", "model.layers.1.mlp.up_proj is 112 x 64 and needs 66 singular directions; write 32",
    ),
    "pattern without a match": (
        setting("lora", rank_pattern={"layers.9.mlp.up_proj": 2}),
        "lora.rank_pattern", "'layers.9.mlp.up_proj'", "write a target's name or the end of one",
    ),
    "no supervised token": (every_completion_cut_off, DATA, "data.jsonl", "check that calibration.max_length (16)"),
    "empty data": (Attempt.write_data, DATA, "data.jsonl", "has no rows"),
    "data missing": (data_file_missing, DATA, "absent.jsonl", "write the path"),
    "column missing": (
        setting("calibration", dataset_text_field="body"),
        "calibration.dataset_text_field", "'body'", "the columns are text",
    ),
    "sample too long": (sample_beyond_the_positions, "calibration.max_length", "512", "write 128 or less"),
    "model missing": (model_missing, MODEL, "absent", "write a model directory or a hub id"),
    "shard missing": (shard_missing, MODEL, "/model'", "model-00003-of-00007.safetensors is missing; copy"),
    "shard truncated": (shard_truncated, MODEL, "/model'", "model-00003-of-00007.safetensors is truncated"),
    "index leads outside": (index_leads_outside, MODEL, "/model'", "'../x.safetensors', outside the directory"),
    "pickle": (pickles_only, MODEL, "/model'", "(pytorch_model.bin), which are never loaded; save_pretrained"),
    "output exists": (output_exists, OUT, "/out'", "add --overwrite"),
    "overwrite of something else": (overwrite_of_something_else, OUT, "/out'", "write another directory"),
    "quantized gathering": (
        setting("deepspeed", zero_optimization={"zero_quantized_weights": True}),
        "deepspeed.zero_optimization.zero_quantized_weights", "True", "write false",
    ),
    "offload as a word": (
        setting("deepspeed", zero_optimization={"offload_param": "cpu"}),
        "deepspeed.zero_optimization.offload_param", "'cpu'", "write {device: cpu}",
    ),
    "ZeRO stage": (deepspeed_stage_2, "deepspeed.zero_optimization.stage", "2", "must be 3"),
    "DeepSpeed's own refusal": (
        setting("deepspeed", zero_optimization={"stage3_max_live_params": 1}),
        "deepspeed.zero_optimization", "{'stage3_max_live_params': 1}", "stage3_max_live_params Extra inputs",
    ),
    "layers that are no number": (
        in_file("config.json", {"num_hidden_layers": "three"}), MODEL, "/model'", "its config.json does not load: ",
    ),
    "layers without end": (
        in_file("config.json", {"num_hidden_layers": 10**9}), MODEL, "/model'", "says 1000000000 layers, and there are",
    ),
    "no heads": (in_file("config.json", {"num_attention_heads": 0}), MODEL, "/model'", "integer modulo by zero"),
    "brackets": (in_file("config.json", b"[" * 50_000), MODEL, "/model'", "its config.json does not load: "),
    "tokenizer's bracket": (
        in_file("tokenizer.json", b"[" * 50_000), MODEL, "/model'", "its tokenizer does not load: ",
    ),
    "tokenizer's class": (
        in_file("tokenizer_config.json", {"tokenizer_class": 5}), MODEL, "/model'", "its tokenizer does not load: ",
    ),
    "template divides by zero": (templated("{{ 1 / 0 }}"), DATA, "data.jsonl", "ZeroDivisionError: division by zero"),
    "template calls itself": (
        templated("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), DATA, "data.jsonl", "RecursionError: ",
    ),
    "latin-1": (data_of('{"text": "caf\xe9"}'.encode("latin-1")), DATA, "data.jsonl", "cannot be read: "),
    "brackets in a line": (
        data_of(b'{"text": "x"}\n{"text": "x", "a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n"),
        DATA, "data.jsonl", "line 2 holds more than 500 brackets in one another",
    ),
    "link to itself": (output_is_a_loop, OUT, "/out'", "is no path to write to: "),
    "no room for hidden names": (
        setting("output", dir="x" * 250), OUT, "'xxx", "243 bytes are left for its own; write another directory",
    ),
    "rank beyond every matrix": (
        setting("lora", r=2**20, target_modules=["k_proj"]), "lora.r", "1048576", "write 16 or less",
    ),
    "DeepSpeed file missing": (deepspeed_file_missing, "deepspeed", "absent.json", "write the path of a JSON"),
}  # fmt: skip


Prepare = Callable[[Change], Attempt]


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Writes good input, but for the given change, into a directory of its own."""
    model = save_model(tmp_path_factory.mktemp("llama"))
    data = save_data(tmp_path_factory.mktemp("data") / "data.jsonl")

    def prepare(change: Change) -> Attempt:
        directory = tmp_path_factory.mktemp("attempt")
        attempt = Attempt(directory, config_tree(model, data, directory / "out"))
        change(attempt)
        (directory / "config.yaml").write_text(yaml.safe_dump(attempt.tree))
        return attempt

    return prepare


@dataclass(frozen=True)
class Ended:
    """One run: each rank's end, and the files before and after."""

    ranks: Sequence[Finished]
    before: dict[str, bytes | None]
    after: dict[str, bytes | None]


@contextmanager
def redirected(stream: IO[str]) -> Iterator[IO[bytes]]:
    """Send all that reaches a standard stream's file descriptor, libraries' output included, to a file."""
    stream.flush()
    saved = os.dup(stream.fileno())
    with TemporaryFile() as file:
        os.dup2(file.fileno(), stream.fileno())
        try:
            yield file
        finally:
            stream.flush()
            os.dup2(saved, stream.fileno())
            os.close(saved)


def runs_of_rank(attempts: dict[str, tuple[int, list[str]]]) -> dict[str, tuple[Finished, float]]:
    """On every rank: runs of `launch/init.py` one after the other, each in a group of its own, and their seconds."""
    results = {}
    for name, (port, arguments) in attempts.items():
        print(name, flush=True)  # the last one is that in which a rank ended or hung
        os.environ["MASTER_PORT"] = str(port)
        started = time.monotonic()
        with redirected(sys.stdout) as out, redirected(sys.stderr) as err:
            code = init_main(arguments)
            seconds = time.monotonic() - started
            sys.stdout.flush()
            sys.stderr.flush()
            said = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (out, err)]
        results[name] = Finished(code, *said), seconds
    return results


@dataclass(frozen=True)
class Table:
    """The runs, the seconds each took at most, and the two processes that made them."""

    runs: dict[str, Ended]
    seconds: dict[str, float]
    processes: list[Finished]


@pytest.fixture(scope="module")
def table(prepare: Prepare) -> Table:
    attempts = {name: prepare(change) for name, (change, *_) in CASES.items()}
    before = {name: contents(attempt.directory) for name, attempt in attempts.items()}
    commands = {name: (free_port(), attempt.arguments) for name, attempt in attempts.items()}
    processes = finish_on_ranks(runs_of_rank, 2, commands, timeout_seconds=240)
    succeed(processes)
    runs, seconds = {}, {}
    for name, attempt in attempts.items():
        ranks, of_ranks = zip(*(process.value[name] for process in processes), strict=True)
        runs[name], seconds[name] = Ended(ranks, before[name], contents(attempt.directory)), max(of_ranks)
    return Table(runs, seconds, processes)


def check_refusal(name: str, run: Ended) -> None:
    """Require the refusal of the case: its key, a part of the value, and what to write instead."""
    _, key, value, instead = CASES[name]
    assert [rank.code for rank in run.ranks] == [2, 2], run.ranks
    assert [rank.stdout for rank in run.ranks] == ["", ""]
    lines = [line for rank in run.ranks for line in rank.stderr.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"loraga-dist: {key}: "), lines
    assert value in lines[0] and instead in lines[0], lines
    assert run.after == run.before


@pytest.mark.parametrize("name", CASES)
def test_refused_on_both_ranks(name: str, table: Table) -> None:
    check_refusal(name, table.runs[name])
    assert table.seconds[name] < MAX_SECONDS


def test_between_the_refusals_nothing_is_said(table: Table) -> None:
    assert [process.stdout.splitlines() for process in table.processes] == [list(CASES)] * 2
    assert [process.stderr for process in table.processes] == ["", ""]


@pytest.mark.parametrize("name", ["unknown key", "shard missing"])
def test_both_processes_end_with_the_code(name: str, prepare: Prepare) -> None:
    attempt = prepare(CASES[name][0])
    before = contents(attempt.directory)
    ranks = run_script([INIT, *attempt.arguments], 2)
    check_refusal(name, Ended(ranks, before, contents(attempt.directory)))


def test_verify_refuses_a_directory_that_is_not_there(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    result = run([sys.executable, "-c", "from loraga_dist.cli import main; raise SystemExit(main())", "verify", absent])

    assert result.code == 2, result
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"loraga-dist: directory: {absent!r}: is not there; write an output directory"
    ]


def test_a_directory_that_is_no_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"loraga-dist: directory: '{tmp_path}': has no loraga_report.json; write the directory of a finished run\n"
    )


def test_a_path_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, why in ((str(tmp_path / ("x" * 300)), "File name too long"), (str(tmp_path / "loop"), "Too many levels")):
        for command in (
            ["verify", path],
            ["rebuild", path, "--to", "y"],
            ["materialize-base", str(tmp_path), "--to", path],
        ):
            with pytest.raises(SystemExit, match="2"):
                main(command)
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist")]
            assert why in line and line.endswith("; write another path")


def test_overwrite_replaces_an_earlier_output(prepare: Prepare) -> None:
    attempt = prepare(setting("lora", target_modules=["q_proj"]))
    init = [INIT, *attempt.arguments]
    succeed(run_script(init, 1))
    kept = attempt.out / "trained" / "adapter.txt"
    kept.parent.mkdir()
    kept.write_text("of a trainer")
    (result,) = run_script([*init, "--overwrite", "--lora.r", "2"], 1)
    assert result.code == 2 and "holds trained/adapter.txt, not of the output that --overwrite" in result.stderr
    assert kept.read_text() == "of a trainer"
    kept.unlink()
    start = attempt.out / "loraga_init" / "adapter_model.safetensors"
    trained = {name: tensor + 1 for name, tensor in load_file(start).items()}
    made = start.read_bytes()
    save_file(trained, start, {"format": "pt"})
    (result,) = run_script([*init, "--overwrite", "--lora.r", "2"], 1)
    assert result.code == 2 and "holds loraga_init/adapter_model.safetensors, not of the output" in result.stderr
    assert all(torch.equal(tensor, trained[name]) for name, tensor in load_file(start).items())
    start.write_bytes(made)
    succeed(run_script([*init, "--overwrite", "--lora.r", "2"], 1))
    assert not load_config(attempt.out / "resolved_config.yaml").output.overwrite, "a copy of it replaces nothing"
    assert {target["r"] for target in read_report(attempt.out)["targets"].values()} == {2}
    assert sorted(path.name for path in attempt.directory.iterdir()) == ["config.yaml", "out"]
    assert main(["verify", str(attempt.out)]) == 0
    assert main(["verify", str(attempt.out), "--base", str(attempt.directory / "absent")]) == 2
