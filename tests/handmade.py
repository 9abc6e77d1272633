"""A whole output directory on a small model with random factors, made in a moment without a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from builders import report_tree, target_tree
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraga_dist.artifacts.adapter import AdapterFile, rank_and_scaling, write_adapter
from loraga_dist.artifacts.residual import (
    digest_base,
    finish_residual_base,
    plan_model_files,
    residual_entries,
    write_residual_file,
)
from loraga_dist.artifacts.tensors import entries_of
from loraga_dist.files.checksums import fingerprint, write_checksums
from loraga_dist.files.parallel import shares
from loraga_dist.files.safetensors_io import SafetensorsWriter
from loraga_dist.model.base import read_checkpoint_index
from loraga_dist.model.targets import Target, require_targets
from loraga_dist.ranks.world import World

K = 8


def save_llama(directory: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype=dtype,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (directory / "pytorch_model.bin").write_bytes(b"stale pickle")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "x.json").write_text("{}")
    return directory


def save_gpt2(directory: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, dtype=torch.float32)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def make_target(config: LoraConfig, name: str, M: int, N: int, transposed: bool) -> Target:
    r, lora_alpha, scaling = rank_and_scaling(config, name)
    return Target(
        name=name,
        weight_key=f"{name}.weight",
        M=M,
        N=N,
        r=r,
        lora_alpha=lora_alpha,
        scaling=scaling,
        transposed=transposed,
    )


def llama_targets(config: LoraConfig) -> list[Target]:
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}
    return [
        make_target(config, f"model.layers.{layer}.{module}", M, N, transposed=False)
        for layer in range(2)
        for module, (M, N) in shapes.items()
    ]


def gpt2_targets(config: LoraConfig) -> list[Target]:
    shapes = {"attn.c_attn": (96, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    return [
        make_target(config, f"transformer.h.{layer}.{module}", M, N, transposed=True)
        for layer in range(2)
        for module, (M, N) in shapes.items()
    ]


def lora_config(base: Path) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3},
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )


def write_output(
    base: Path,
    directory: Path,
    make_targets: Callable[[LoraConfig], list[Target]] = llama_targets,
    residual_dtype: str = "auto",
    residual_base: str = "full",
    max_shard_bytes: int = 5 * 10**9,
    world_size: int = 1,
) -> list[Target]:
    """A whole output directory with random factors, written by the code under test."""
    config = lora_config(base)
    targets = make_targets(config)
    generator = torch.Generator().manual_seed(1)
    svd = {
        target.name: torch.linalg.svd(torch.randn(target.M, target.N, generator=generator), full_matrices=False)
        for target in targets
    }

    def factors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        target = next(target for target in targets if target.name == name)
        U_MN, _, Vh_NN = svd[name]
        return 0.3 * Vh_NN[: target.r], 0.3 * U_MN[:, target.r : 2 * target.r]

    write_adapter(directory / "loraga_init", config, targets, factors)
    write_adapter(directory / "loraga_offset", config, targets, factors, negate_b=True)
    write_factors(directory / "factors", svd)

    index = read_checkpoint_index(base)
    require_targets(index, targets)
    if residual_base == "full":
        files = plan_model_files(residual_entries(entries_of(index), residual_dtype), max_shard_bytes)
        adapter = AdapterFile(directory / "loraga_init")
        destination = directory / "residual_base"
        digests = {}
        for share in shares(files, lambda file: file.num_bytes, world_size):
            for file in share:
                digests |= write_residual_file(file, index, targets, adapter, destination)
        finish_residual_base(base, destination, files, residual_dtype)
        base_digests = {key: pair[0] for key, pair in digests.items()}
        residual_fingerprint = fingerprint({key: pair[1] for key, pair in digests.items()})
    else:
        base_digests, residual_fingerprint = digest_base(index, index), None

    report = report_tree(
        config={
            "model": {"name_or_path": str(base)},
            "output": {"dir": str(directory), "residual_base": residual_base, "residual_dtype": residual_dtype},
        },
        base_fingerprint=fingerprint(base_digests),
        residual_fingerprint=residual_fingerprint,
    )
    report["targets"] = {
        target.name: target_tree(
            shape=[target.M, target.N],
            r=target.r,
            lora_alpha=target.lora_alpha,
            scaling=target.scaling,
            transposed=target.transposed,
            weight_key=target.weight_key,
        )
        for target in targets
    }
    write_report(directory, report)
    (directory / "resolved_config.yaml").write_text("model: {}\n")
    (directory / "README.md").write_text("# Output\n")
    write_checksums(directory, World.alone())
    return targets


def write_factors(directory: Path, svd: dict[str, Any]) -> None:
    weight_map = {}
    for number, (name, (U, S, Vh)) in enumerate(svd.items()):
        file = f"factors-{number}.safetensors"
        parts = {f"{name}.U": U[:, :K], f"{name}.S": S[:K], f"{name}.Vh": Vh[:K]}
        with SafetensorsWriter(
            directory / file, {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()}
        ) as writer:
            for key, part in parts.items():
                writer.append(key, part)
        weight_map |= dict.fromkeys(parts, file)
    (directory / "factors.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_report(directory: Path, report: dict[str, Any]) -> None:
    (directory / "loraga_report.json").write_text(json.dumps(report))


def edit(output: Path, part: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor and make the checksums fit again."""
    [path] = [path for path in (output / part).glob("*.safetensors") if key in load_file(path)]
    held = load_file(path)
    held[key] = change(held[key]).contiguous()
    save_file(held, path, {"format": "pt"})
    write_checksums(output, World.alone())
