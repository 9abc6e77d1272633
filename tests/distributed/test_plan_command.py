"""`loraga-dist plan`, `init --dry_run`, and what init refuses before it allocates a weight."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import byte_tokenizer, config_tree, llama_config, save_data, save_model
from launching import INIT, ROOT, Finished, succeed
from outputs import write_config
from pieces import load
from ranks import run_on_ranks, run_script
from transformers import LlamaForCausalLM

from loraga_dist.cli import main
from loraga_dist.files.checkpoint import CheckpointStore
from loraga_dist.files.safetensors_io import dtype_name
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.world import World


def plan(*arguments: str) -> Finished:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            code = main(["plan", *arguments])
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


def small_config(directory: Path, **sections: dict[str, Any]) -> Path:
    data = save_data(directory / "data.jsonl")
    return write_config(config_tree(save_model(directory / "model"), data, directory / "out", **sections))


def sparse_model(directory: Path) -> Path:
    """A checkpoint of 9 TB whose files are holes: larger than any machine that runs this, and free."""
    config = llama_config(hidden_size=65536, intermediate_size=262144, num_hidden_layers=64, head_dim=1024)
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    weight_map = {}
    for name, parameter in meta_copy(LlamaForCausalLM, config).named_parameters():
        num_bytes = 2 * parameter.numel()
        entry = {"dtype": dtype_name(torch.bfloat16), "shape": list(parameter.shape), "data_offsets": [0, num_bytes]}
        header = json.dumps({name: entry}).encode()
        file = directory / f"{name}.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(file, 8 + len(header) + num_bytes)
        weight_map[name] = file.name
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_json_of_a_small_plan(tmp_path: Path) -> None:
    config = small_config(tmp_path, gradient={"engine": "sketch"})
    options = ("--ranks", "3", "--device_tflops", "100", "--link_gbps", "10", "--gib_per_rank", "1")
    result = plan("--config", str(config), *options, "--json")
    succeed(result)
    report = json.loads(result.stdout)
    assert report["ranks"] == 3
    assert report["calibration"] == {
        "data_read": False, "sequences": 256, "tokens_per_sequence": 64, "sequences_per_microbatch": 2,
        "microbatches_per_rank": 43, "refine_passes": "auto",
    }  # fmt: skip
    assert sum(report["owners"]["targets_per_rank"]) == sum(kind["count"] for kind in report["targets"]) == 21
    memory = report["memory_per_rank"]
    assert memory["peak_bytes"] == max(sum(parts.values()) for parts in memory["device_bytes"].values())
    assert memory["peak_bytes_by_way"] == {"block order": memory["peak_bytes"]}
    # float32 inputs of 3 blocks and the head, of 2 x 64 tokens of width 64
    kept_bytes = 43 * 4 * (2 * 64 * 64 * 4)
    assert report["order"] == {
        "name": "block", "why": "a block is gathered once for all microbatches", "from_disk": False,
        "checkpointing": None, "microbatches_together": 43, "kept_bytes": kept_bytes, "kept_in": None,
    }  # fmt: skip
    assert memory["host_bytes"]["forward"]["inputs of blocks"] == kept_bytes
    assert report["sweeps"] == {"count": 1} and report["groups"]["targets"] == [7, 7, 7]
    assert report["link_seconds"] == pytest.approx(sum(report["traffic_bytes_per_rank"].values()) * 8 / 10e9)
    assert report["disk_bytes"]["residual_base"] == report["model"]["bytes"]
    assert 0 < report["seconds"]["at_least"] < report["seconds"]["at_most"]
    assert report["verdict"] == "fits"
    assert report["advice"] == []
    assert not (tmp_path / "out").exists()


def test_on_a_cpu_the_time_is_measured_and_the_text_fits_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--config", str(small_config(tmp_path, gradient={"engine": "sketch"})), "--device", "cpu")
    seconds = json.loads(plan(*command, "--json").stdout)["seconds"]
    assert seconds["measured"] and 0 < seconds["at_least"] < seconds["at_most"]
    shared = json.loads(plan(*command, "--ranks", "8", "--json").stdout)["seconds"]
    assert shared["device_tflops"] < seconds["device_tflops"], "eight ranks share this machine"
    for columns, most in ((60, 80), (100, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        result = plan(*command)
        succeed(result)
        assert max(map(len, result.stdout.splitlines())) <= most
        assert re.search(r"time: +[\d.]+ to [\d.]+ seconds of arithmetic, .*measured", " ".join(result.stdout.split()))


def test_the_plan_is_for_the_way_that_fits(tmp_path: Path) -> None:
    command = ("--config", str(small_config(tmp_path)), "--device", "cuda", "--calibration.max_samples", "4")
    succeed(whole := plan(*command))
    assert re.search(r"calibration: +model order\n", whole.stdout)
    assert re.search(
        r"; model order [\d.]+, block order [\d.]+, block order from disk [\d.]+; host", " ".join(whole.stdout.split())
    )
    succeed(tight := plan(*command, "--gib_per_rank", "0.001"))
    kept = r"calibration: block order from disk, one microbatch at a time: [\d.]+ GiB of inputs of blocks in memory"
    assert re.search(kept, " ".join(tight.stdout.split()))


def test_schemes_without_gradients_plan_no_sweep(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    for scheme, workspace, files in (
        ("pissa", True, {"loraga_init", "loraga_offset", "residual_base"}),
        ("kaiming", False, {"loraga_init"}),
    ):
        command = ("--config", str(config), "--ranks", "2", "--gib_per_rank", "1", "--init.scheme", scheme)
        result = plan(*command, "--json")
        succeed(result)
        report = json.loads(result.stdout)
        assert report["sweeps"] == {"count": 0}
        assert report["groups"] == {"count": 0, "targets": [], "state_bytes": []}
        assert all(kind["engine"] is None and not kind["state_bytes_each"] for kind in report["targets"])
        memory = report["memory_per_rank"]["device_bytes"]
        assert "calibrate" not in memory and ("workspace" in memory["factorize"]) == workspace
        assert {name for name, num_bytes in report["disk_bytes"].items() if num_bytes} == files
        assert sum(report["owners"]["targets_per_rank"]) == sum(kind["count"] for kind in report["targets"])
        assert (report["traffic_bytes_per_rank"]["weights gathered"] > 0) == workspace
        assert report["verdict"] == "fits"
        result = plan(*command)
        succeed(result)
        assert "0 over the data; no engine state" in result.stdout
    results = run_script([INIT, "--config", str(config), "--init.scheme", "olora", "--dry_run"], 2)
    succeed(results)
    assert "OLoRA plan of" in results[0].stdout and not (tmp_path / "out").exists()


def test_table_says_what_to_change(tmp_path: Path) -> None:
    config = small_config(tmp_path, gradient={"order": "model", "checkpointing": "none", "engine": "sketch"})
    few = ("--calibration.max_samples", "8")
    result = plan("--config", str(config), "--ranks", "2", "--gib_per_rank", "0.001", *few)
    succeed(result)
    assert re.search(r"verdict: +too large, on ranks of 0.001 GiB", result.stdout)
    assert "  - no number of ranks up to 4096 fits" in result.stdout
    assert re.search(r"  - gradient.order auto: [\d.]+ GiB \([\w ]+\)", result.stdout)
    assert re.search(r"  - gradient.checkpointing auto: [\d.]+ GiB \([\w ]+\)", result.stdout)
    assert re.search(r"  - all of these: [\d.]+ GiB \([\w ]+\)", result.stdout)
    assert "--device_tflops" in result.stdout


def test_405b_from_its_config_alone_in_seconds() -> None:
    before = time.process_time()
    result = plan(
        "--config", str(ROOT / "configs" / "llama-3-405b.yaml"), "--ranks", "16", "--gib_per_rank", "80", "--json",
        "--model.name_or_path", str(ROOT / "benchmarks" / "shapes" / "llama-3-405b"),
    )  # fmt: skip
    seconds = time.process_time() - before
    succeed(result)
    report = json.loads(result.stdout)
    assert report["model"]["parameters"] == 405_853_388_800
    assert report["model"]["from_config_alone"]
    assert sum(kind["count"] for kind in report["targets"]) == 126 * 7
    assert seconds < 20, "processor seconds: the machine may be busy with other things"


def test_mistakes_end_with_code_2(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    for arguments in (["--lora.r", "60"], ["--model.name_or_path", str(tmp_path / "nowhere")], ["--lora.rr", "8"]):
        result = plan("--config", str(config), *arguments)
        assert result.code == 2
        assert result.stderr.startswith(f"loraga-dist: {arguments[0].removeprefix('--')}"), result.stderr
    assert plan("--config", str(config), "--ranks", "0").code == 2


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    results = run_script([INIT, "--config", str(config), "--dry_run"], 2)
    succeed(results)
    said = " ".join(results[0].stdout.split())  # a long path wraps
    assert "24 sequences" in said
    assert "on 2 CPUs" in said
    assert not results[1].stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_looks_at_the_place_and_at_what_lies_beside_it(tmp_path: Path) -> None:
    config, beside = small_config(tmp_path), tmp_path / ".out.partial"
    (tmp_path / "file").write_text("thesis")
    beside.mkdir()
    (beside / "thesis").touch()
    in_the_way = f"cannot be made: {tmp_path}/file is a file; write another directory"
    for options, said in (
        ((), f"needs the name {beside}, and what stands there is no unfinished work of loraga_dist; move it away"),
        (("--output.dir", str(tmp_path / "file" / "out")), f"output.dir: '{tmp_path}/file': {in_the_way}"),
        (("--gradient.activations_dir", str(tmp_path / "file")), f"gradient.activations_dir: '{tmp_path}/file': "),
    ):
        (result,) = run_script([INIT, "--config", str(config), "--dry_run", *options], 1)
        assert result.code == 2 and said in result.stderr, result


def test_dry_run_looks_at_the_checkpoint(tmp_path: Path) -> None:
    config, store = small_config(tmp_path), CheckpointStore(tmp_path / ".out.checkpoint", World.alone())
    store.save({"work": {"format": 0}, "seconds": {}}, {"a": torch.ones(3)})
    before = sorted(tmp_path.rglob("*"))
    (result,) = run_script([INIT, "--config", str(config), "--dry_run"], 1)
    assert result.code == 2 and "write resume: never to start over" in result.stderr
    succeed(run_script([INIT, "--config", str(config), "--dry_run", "--resume", "never"], 1))
    assert sorted(tmp_path.rglob("*")) == before


def test_init_refuses_what_cannot_fit(tmp_path: Path) -> None:
    model = sparse_model(tmp_path / "model")
    data = save_data(tmp_path / "data.jsonl", rows=4)
    config = write_config(config_tree(model, data, tmp_path / "out", gradient={"engine": "sketch"}))
    results = run_script([INIT, "--config", str(config)], 2)
    assert [result.code for result in results] == [2, 2], results[0].stderr
    (line,) = (line for line in results[0].stderr.splitlines() if line.startswith("loraga-dist:"))
    assert re.search(r"needs [\d.]+ GiB on rank 0, its device has [\d.]+ GiB free; ", line)
    assert "no number of ranks up to 4096 fits" in line
    assert not (tmp_path / "out").exists()


def partition_of_rank(model_dir: Path) -> tuple[int, int, int, int]:
    """Bytes of this rank's shards and elements of the largest module, each as planned and as ZeRO-3 made them."""
    world = World.start()
    loaded = load(model_dir, world)
    model: Any = loaded.model
    shape = ModelShape.of(loaded.meta_model, torch.float32)
    shards = [parameter.ds_tensor for parameter in model.parameters()]
    gathered = [sum(p.ds_numel for p in module.parameters(recurse=False)) for module in model.modules()]
    num_bytes = sum(shard.numel() * shard.element_size() for shard in shards)
    return shape.partition_bytes(world.size), num_bytes, shape.largest_module_numel, max(gathered)


def test_shards_are_as_planned(tmp_path: Path) -> None:
    for planned_bytes, num_bytes, planned_numel, numel in run_on_ranks(partition_of_rank, 3, save_model(tmp_path)):
        assert (planned_bytes, planned_numel) == (num_bytes, numel)
