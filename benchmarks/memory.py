"""Peak memory per rank of `loraga-dist init` on random Llamas, beside what the plan said before.

usage: python benchmarks/memory.py [--size-gib 0.5,1] [--ranks 1,2,4] [--engine auto] [--order auto]
       [--tokens 256] [--large-vocabulary | --wide | --experts] [--directory DIR] [--json FILE]
       python benchmarks/memory.py --head [--json FILE]

The peak is what the run itself reports: resident host memory above the process's level after imports, over the whole
run from loading to the written residual base; on GPUs device memory. A single process maps the weights from the
checkpoint's files; their pages count.

--head: what head and loss alone take for one long sequence, forward and backward, above what stood before: by some
tokens at a time, and at once. Each in a process of its own, which has taken a short sequence before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchrun import ROOT, run_as_ranks
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from loraga_dist.data.losses import causal_lm
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients import head
from loraga_dist.gradients.stubs import Stubs
from loraga_dist.ranks.memory import PeakMemory, return_freed_memory_at_once

CPU = torch.device("cpu")

# TinyLlama-1.1B's shapes; the number of layers is chosen by size
HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
SEQUENCE_TOKENS = 256
SEQUENCES = 8
LARGE_VOCABULARY = 49152
"""Of a small, tied model of SmolLM2-135M's widths, with 10 of its layers and sequences of different lengths."""
WIDE_TOKENS, WIDE_SEQUENCES = 16, 2
"""Of two layers of Llama-3-70B's widths: products in bfloat16 take minutes where processors have no units for them."""
HEADS_OF: Sequence[tuple[int, int, bool]] = ((8192, 32768, False), (8192, 32768, True), (32768, 131072, False))
"""Tokens, vocabulary, and whether all logits are made at once."""
HEAD_HIDDEN = 32
"""So few columns that nothing but logits counts."""
TIME_LIMIT_SECONDS = 1200
DATA = "calibration.jsonl"
"""Beside the model."""

PAD, END = 256, 257
"""The byte tokenizer's."""


def layers_for(num_bytes: float) -> int:
    """Fewest layers that make the bfloat16 model at least this large."""
    attention = 2 * HIDDEN * (HIDDEN // HEADS) * (HEADS + KEY_VALUE_HEADS)
    per_layer = attention + 3 * HIDDEN * INTERMEDIATE
    embeddings = 2 * VOCABULARY * HIDDEN
    return max(1, math.ceil((num_bytes / torch.bfloat16.itemsize - embeddings) / per_layer))


def large_llama(num_layers: int) -> LlamaConfig:
    return _llama(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        tie_word_embeddings=False,
    )


def small_llama() -> LlamaConfig:
    return _llama(
        vocab_size=LARGE_VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def wide_llama() -> LlamaConfig:
    return _llama(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=2,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


def experts() -> Qwen3MoeConfig:
    """Of 1.6 GiB, most of it 64 experts a layer, 8 of them for a token."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=448,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
    )


def make_model(directory: Path, config: PretrainedConfig, lengths: Sequence[int]) -> None:
    """A random bfloat16 model in several files, a byte tokenizer, and texts to calibrate on; kept for the next run."""
    if directory.exists():
        return
    partial = directory.with_name(f"{directory.name}.partial")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial, max_shard_size="200MB")
    write_texts(partial, lengths)
    partial.rename(directory)


def write_texts(directory: Path, lengths: Sequence[int]) -> None:
    """A byte tokenizer, and random texts of so many tokens to calibrate on."""
    _byte_tokenizer().save_pretrained(directory)
    letters = [torch.randint(97, 123, (length,)).tolist() for length in lengths]
    (directory / DATA).write_text("".join(json.dumps({"text": bytes(row).decode()}) + "\n" for row in letters))


def measure(model: Path, num_ranks: int, start: str, order: str, calibration: dict[str, Any], scratch: Path) -> Any:
    """The report of one run of `launch/init.py` on `num_ranks` ranks of this machine, with these keys of the sections
    gradient and calibration."""
    output = scratch / f"{num_ranks}-ranks"
    config = scratch / f"{num_ranks}-ranks.yaml"
    has_experts = "num_experts_per_tok" in json.loads((model / "config.json").read_text())
    method = {"init": {"scheme": start}} if start == "pissa" else {"gradient": {"engine": start, "order": order}}
    tree = {
        **method,
        "model": {"name_or_path": str(model)},
        "lora": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"] if has_experts else None},
        "calibration": {"data_files": str(model / DATA), **calibration},
        "output": {"dir": str(output), "residual_base": "full"},
    }
    config.write_text(yaml.safe_dump(tree))
    init = ROOT / "launch" / "init.py"
    run_as_ranks(init, num_ranks, "--config", str(config), timeout_seconds=TIME_LIMIT_SECONDS)
    return json.loads((output / "loraga_report.json").read_text())


def head_peak_bytes(num_tokens: int, vocabulary: int, at_once: bool) -> int:
    """The peak of this process while one float32 sequence goes through head and loss."""
    return_freed_memory_at_once()  # as every run does
    if at_once:
        head.LOGITS_AT_ONCE = num_tokens * vocabulary
    torch.manual_seed(0)
    config = _llama(
        vocab_size=vocabulary, hidden_size=HEAD_HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    stubs = Stubs(model, list(model.model.layers), CPU)
    ids, hidden = torch.randint(0, vocabulary, (1, num_tokens)), torch.randn(1, num_tokens, HEAD_HIDDEN)
    with stubs.installed():
        for length in (64, num_tokens):  # the first is to have all code there
            inputs = dict.fromkeys(("input_ids", "labels"), ids[:, :length])
            with PeakMemory(CPU) as memory:
                head.Head(model, stubs, causal_lm).backward(Microbatch(inputs, length - 1, 0, ()), hidden[:, :length])
    return memory.peak_bytes


def head_runs() -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        return [
            {
                "tokens": num_tokens,
                "vocabulary": vocabulary,
                "at_once": at_once,
                "logits_bytes": 4 * num_tokens * vocabulary,
                "peak_bytes": processes.submit(head_peak_bytes, num_tokens, vocabulary, at_once).result(),
            }
            for num_tokens, vocabulary, at_once in HEADS_OF
        ]


def print_head_table(runs: Sequence[dict[str, Any]]) -> None:
    table = Table(title="head and loss of one sequence, MiB")
    for column in ("tokens", "vocabulary", "logits", "made", "measured peak"):
        table.add_column(column, justify="right")
    for run in runs:
        made = "at once" if run["at_once"] else "in parts"
        logits_mib, peak_mib = (f"{run[key] / 2**20:.0f}" for key in ("logits_bytes", "peak_bytes"))
        table.add_row(str(run["tokens"]), str(run["vocabulary"]), logits_mib, made, peak_mib)
    Console().print(table)


def figures(report: dict[str, Any]) -> dict[str, Any]:
    peaks, planned = report["peak_bytes_per_rank"], report["planned_peak_bytes_per_rank"]
    return {
        "ranks": report["world_size"],
        "peak_bytes_per_rank": peaks,
        "planned_peak_bytes_per_rank": planned,
        "state_bytes_per_rank": report["state_bytes_per_rank"],
        "planned_to_measured": [plan / peak for peak, plan in zip(peaks, planned, strict=True)],
        "seconds": report["seconds"],
    }


def hardware() -> dict[str, Any]:
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory_bytes / 2**30), "gpus": gpus}


def print_table(runs: Sequence[dict[str, Any]]) -> None:
    table = Table(title="MiB per rank")
    for column in (
        "model",
        "start",
        "ranks",
        "rank",
        "engine state",
        "planned peak",
        "measured peak",
        "planned / measured",
    ):
        table.add_column(column, justify="right")
    for run in runs:
        rows = zip(run["planned_peak_bytes_per_rank"], run["peak_bytes_per_rank"], strict=True)
        for rank, (planned, peak) in enumerate(rows):
            sizes = (run["state_bytes_per_rank"], planned, peak)
            amounts = [f"{num_bytes / 2**20:.0f}" for num_bytes in sizes]
            model_mib = f"{run['model_bytes'] / 2**20:.0f}"
            table.add_row(model_mib, run["start"], str(run["ranks"]), str(rank), *amounts, f"{planned / peak:.3f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", default="0.5,1", help="least sizes of the models (default 0.5,1)")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks to run on (default 1,2,4)")
    parser.add_argument("--engine", default="auto", choices=("auto", "sketch", "exact"))
    parser.add_argument("--order", default="auto", choices=("auto", "block", "model"))
    parser.add_argument("--wide", action="store_true", help="two layers of Llama-3-70B's widths, 7.1 GiB, instead")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts of 1.6 GiB instead")
    parser.add_argument("--tokens", type=int, default=SEQUENCE_TOKENS, help="of a sequence (default 256)")
    parser.add_argument("--large-vocabulary", action="store_true", help="a small model with 49152 tokens instead")
    parser.add_argument("--head", action="store_true", help="head and loss of one long sequence instead")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "benchmarks", help="where the model is kept")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()

    if options.head:
        runs = head_runs()
        print_head_table(runs)
        write(options.json, {"torch": torch.__version__}, runs)
        return
    runs = []
    versions: dict[str, str] = {}
    calibration = {"max_length": options.tokens, "per_device_batch_size": 1 + options.large_vocabulary}
    if options.wide:
        starts, models = [options.engine], [(wide_llama(), [WIDE_TOKENS] * WIDE_SEQUENCES)]
        calibration["max_length"] = WIDE_TOKENS
    elif options.experts:
        starts, models = [options.engine], [(experts(), [options.tokens] * SEQUENCES)]
    elif options.large_vocabulary:
        config, starts = small_llama(), ["sketch", "exact", "pissa"]
        generator = torch.Generator().manual_seed(0)
        models = [(config, [SEQUENCE_TOKENS, *torch.randint(64, SEQUENCE_TOKENS, (11,), generator=generator).tolist()])]
    else:
        sizes, starts = map(float, options.size_gib.split(",")), [options.engine]
        models = [(large_llama(layers_for(size * 2**30)), [SEQUENCE_TOKENS] * SEQUENCES) for size in sizes]
    for config, lengths in models:
        model = (
            options.directory
            / f"{config.model_type}-{config.num_hidden_layers}-{config.hidden_size}-{len(lengths)}-texts"
        )
        make_model(model, config, lengths)
        model_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for start, num_ranks in itertools.product(starts, map(int, options.ranks.split(","))):
            with tempfile.TemporaryDirectory(dir=options.directory, prefix="memory-") as scratch:
                report = measure(model, num_ranks, start, options.order, calibration, Path(scratch))
            runs.append({
                "model_bytes": model_bytes, "num_layers": config.num_hidden_layers, "start": start, **figures(report)
            })  # fmt: skip
            versions = report["versions"]
    print_table(runs)
    write(options.json, versions, runs)


def write(path: Path | None, versions: dict[str, str], runs: Sequence[dict[str, Any]]) -> None:
    if path is not None:
        content = {"hardware": hardware(), "versions": versions, "runs": runs}
        path.write_text(json.dumps(content, indent=2) + "\n")


def _llama(**shapes: Any) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=END, eos_token_id=END, **shapes)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate([*alphabet, "<pad>", "</s>"])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


if __name__ == "__main__":
    main()
