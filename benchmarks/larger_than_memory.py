"""`loraga-dist init` on a random Llama of three times the memory that the process may take.

usage: python benchmarks/larger_than_memory.py [--size-gib 12] [--compare] [--tokens 16] [--directory DIR] [--json FILE]

--compare: the same without a limit, in block order with the model in memory, for its factors and its seconds.

The model has Llama-3-8B's widths, and layers by size; it is written block by block, and kept for the next run. The
limit is RLIMIT_DATA: all memory that the process asks for without a file behind it, touched or not. Pages of files that
the kernel caches, and can take back at any time, are not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from memory import DATA, END, PAD, hardware, write_texts
from rich.console import Console
from rich.table import Table
from torchrun import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from loraga_dist.files.safetensors_io import SafetensorsWriter, write_index
from loraga_dist.model.targets import meta_copy

SHARE_OF_MODEL = 3
"""One part of so many of the model's bytes is what the process may take."""
SEQUENCES = 2
SCALE = 0.02
"""Standard deviation of the weights, as Llamas start."""
CHUNK_ELEMENTS = 1 << 24
"""Drawn and written at a time."""
SAMPLE_SECONDS = 0.02
SAID = (
    "planned_peak_bytes_per_rank",
    "peak_bytes_per_rank",
    "calibration_bytes_read",
    "factors_fingerprint",
    "adapter_fingerprint",
)
"""Of the report."""


def llama_of(num_bytes: float) -> LlamaConfig:
    """Llama-3-8B's widths and the fewest layers that make the bfloat16 model at least this large."""
    shapes = ROOT / "benchmarks" / "shapes" / "llama-3-8b"
    ids = {"pad_token_id": PAD, "bos_token_id": END, "eos_token_id": END}
    config = LlamaConfig.from_pretrained(shapes, num_hidden_layers=1, **ids)
    sizes = {name: parameter.numel() for name, parameter in meta_copy(LlamaForCausalLM, config).named_parameters()}
    per_layer = sum(numel for name, numel in sizes.items() if _block_of(name).isdigit())
    layers = (num_bytes / torch.bfloat16.itemsize - sum(sizes.values()) + per_layer) / per_layer
    config.num_hidden_layers = max(1, math.ceil(layers))
    return config


def make_model(directory: Path, config: LlamaConfig, num_tokens: int) -> None:
    """A random bfloat16 Llama, a file per block and three more, with a tokenizer and texts; kept for the next run.

    No more than CHUNK_ELEMENTS of the model are in memory.
    """
    if directory.exists():
        return
    partial = directory.with_name(f"{directory.name}.partial")
    config.dtype = torch.bfloat16
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(partial)
    shapes = {name: tuple(p.shape) for name, p in meta_copy(LlamaForCausalLM, config).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, (_, names) in enumerate(groupby(shapes, key=_block_of), 1):
        entries = {name: (torch.bfloat16, shapes[name]) for name in names}
        with SafetensorsWriter(partial / f"model-{number:05d}.safetensors", entries) as writer:
            for name in entries:
                for chunk in _values(shapes[name], draw):
                    writer.append(name, chunk)
        weight_map |= dict.fromkeys(entries, writer.path.name)
        num_bytes += writer.num_bytes
    write_index(partial, "model", weight_map, num_bytes)
    torch.manual_seed(0)
    write_texts(partial, [num_tokens] * SEQUENCES)
    partial.rename(directory)


def _block_of(name: str) -> str:
    """The number of a parameter's layer; of those outside the layers, its name."""
    return name.split(".")[2] if name.startswith("model.layers.") else name


def _values(shape: Sequence[int], draw: torch.Generator) -> Iterator[torch.Tensor]:
    """A matrix is normal noise, a vector, of a norm, ones."""
    left = math.prod(shape)
    while left:
        chunk = torch.ones(min(left, CHUNK_ELEMENTS), dtype=torch.bfloat16)
        yield chunk.normal_(0, SCALE, generator=draw) if len(shape) > 1 else chunk
        left -= chunk.numel()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process, ended."""

    code: int
    seconds: float
    peak_anonymous_bytes: int
    """The highest sample of RssAnon."""
    num_bytes_read: int
    """By calls, from disk or from the kernel's cache, files of every kind; pages of mapped files are not counted."""


def run_within(command: Sequence[str], max_bytes: int | None) -> Run:
    """Run a command that may take so much memory; its output goes where ours does."""

    def limit() -> None:
        if max_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))

    # datasets' pyarrow would ask for 1 GiB at once, of which it touches little
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    began, peak_bytes, read_bytes = time.monotonic(), 0, 0
    with subprocess.Popen(command, preexec_fn=limit, cwd=ROOT, env=env) as process:
        try:
            while process.poll() is None:
                # a process that has just ended has neither
                with suppress(OSError, KeyError):
                    peak_bytes = max(peak_bytes, 1024 * _figure(process.pid, "status", "RssAnon"))
                    read_bytes = _figure(process.pid, "io", "rchar")
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
    return Run(
        code=process.returncode,
        seconds=time.monotonic() - began,
        peak_anonymous_bytes=peak_bytes,
        num_bytes_read=read_bytes,
    )


def _figure(pid: int, file: str, key: str) -> int:
    pairs = (line.split(":") for line in Path(f"/proc/{pid}/{file}").read_text().splitlines())
    return int(dict(pairs)[key].split()[0])


def init(model: Path, scratch: Path, max_bytes: int | None) -> dict[str, Any]:
    """Run `loraga-dist init` on the model: figures of the process, and of its report where it completed."""
    output = scratch / "output"
    tree = {
        # of very few tokens, whose gradients the sketch holds without loss: the pass that `auto` adds where they are so
        # few would read the model's data again for nothing
        "gradient": {"engine": "sketch", "order": "block", "refine_passes": 0},
        "model": {"name_or_path": str(model)},
        "calibration": {"data_files": str(model / DATA), "per_device_batch_size": 1},
        "output": {"dir": str(output), "residual_base": "full"},
    }
    config = scratch / "init.yaml"
    config.write_text(yaml.safe_dump(tree))
    run = run_within([sys.executable, str(ROOT / "launch" / "init.py"), "--config", str(config)], max_bytes)
    report = json.loads((output / "loraga_report.json").read_text()) if run.code == 0 else {}
    of_report = {key: report[key] for key in SAID if report}
    return {"max_bytes": max_bytes, **asdict(run), "report_seconds": report.get("seconds", {}), **of_report}


def print_table(model_bytes: int, runs: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=f"a model of {model_bytes / 2**30:.1f} GiB")
    for column in (
        "limit",
        "completed",
        "planned peak",
        "anonymous peak",
        "read by calibration",
        "calibrate, s",
        "all, s",
    ):
        table.add_column(column, justify="right")
    for run in runs:
        planned = run.get("planned_peak_bytes_per_rank", [math.nan])[0]
        sizes = (run["max_bytes"] or math.inf, planned, run["peak_anonymous_bytes"])
        limit, *peaks = (f"{num_bytes / 2**30:.2f} GiB" for num_bytes in sizes)
        read = f"{(run.get('calibration_bytes_read') or 0) / model_bytes:.2f} x"
        seconds = run.get("report_seconds", {}).get("calibrate", math.nan)
        completed = "yes" if run["code"] == 0 else "no"
        table.add_row(limit, completed, *peaks, read, f"{seconds:.0f}", f"{run['seconds']:.0f}")
    Console().print(table)
    if len(runs) > 1:
        same = len({run.get("factors_fingerprint") for run in runs}) == 1
        print(f"factors: {'the same bits' if same else 'other bits'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=float, default=12, help="least size of the model (default 12)")
    parser.add_argument("--compare", action="store_true", help="with the same model in memory")
    parser.add_argument("--tokens", type=int, default=16, help=f"in each of {SEQUENCES} sequences (default 16)")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "benchmarks", help="where the model is kept")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()

    config = llama_of(options.size_gib * 2**30)
    model = options.directory / f"llama-{config.num_hidden_layers}-{config.hidden_size}-{options.tokens}-tokens"
    make_model(model, config, options.tokens)
    model_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="larger-") as scratch:
        runs = []
        for index, limit in enumerate([model_bytes // SHARE_OF_MODEL, *([None] if options.compare else [])]):
            (run_scratch := Path(scratch) / str(index)).mkdir()
            runs.append(init(model, run_scratch, limit))
            print_table(model_bytes, runs)
            shutil.rmtree(run_scratch)
    if options.json:
        content = {"hardware": hardware(), "model_bytes": model_bytes, "runs": runs}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if any(run["code"] for run in runs):
        raise SystemExit("init did not complete")


if __name__ == "__main__":
    main()
