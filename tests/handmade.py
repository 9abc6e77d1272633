"""Made by hand: whole output directories with random factors, in a moment and without a run; and a strange model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from builders import report_tree, target_tree
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from loraga_dist.artifacts.adapter import AdapterFile, rank_and_scaling, write_adapter
from loraga_dist.artifacts.residual import (
    digest_base,
    finish_residual_base,
    plan_model_files,
    residual_entries,
    write_residual_file,
)
from loraga_dist.files.checksums import fingerprint, write_checksums
from loraga_dist.files.parallel import shares
from loraga_dist.files.safetensors_io import SafetensorsWriter
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.model.base import read_checkpoint_index
from loraga_dist.model.targets import Target, require_targets
from loraga_dist.ranks.world import World
from loraga_dist.schemes import LoraFactors

K = 8
PATTERNS: dict[str, Any] = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}


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
        **PATTERNS,
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
    seed: int = 1,
) -> list[Target]:
    """A whole output directory with random factors, written by the code under test. seed: of the factors."""
    config = lora_config(base)
    targets = make_targets(config)
    generator = torch.Generator().manual_seed(seed)
    svd = {
        target.name: torch.linalg.svd(torch.randn(target.M, target.N, generator=generator), full_matrices=False)
        for target in targets
    }

    def factors(target: Target) -> LoraFactors:
        """LoRA-GA's, in its paper's scale."""
        U_MN, _, Vh_NN = svd[target.name]
        scale = target.M**0.25 / 4
        return LoraFactors(A_RN=scale * Vh_NN[: target.r], B_MR=scale * U_MN[:, target.r : 2 * target.r])

    for name in ("loraga_offset", "loraga_init", "factors", *(["residual_base"] if residual_base == "full" else [])):
        (directory / name).mkdir(parents=True, exist_ok=True)
    write_adapter(directory / "loraga_offset", config, targets, factors, negate_b=True)
    of_residual = copy.copy(config)
    of_residual.base_model_name_or_path = f"{directory}/residual_base"
    write_adapter(directory / "loraga_init", of_residual, targets, factors)
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
                digests |= write_residual_file(file, index, targets, adapter.factors, destination)
        finish_residual_base(base, destination, files, residual_dtype)
        base_digests = {key: pair[0] for key, pair in digests.items()}
        residual_fingerprint = fingerprint({key: pair[1] for key, pair in digests.items()})
    else:
        base_digests, residual_fingerprint = digest_base(index, index), None

    report = report_tree(
        config={
            "model": {"name_or_path": str(base)},
            "output": {"dir": str(directory), "residual_base": residual_base, "residual_dtype": residual_dtype},
            "lora": {"r": 4, "lora_alpha": 8, "use_rslora": True} | PATTERNS,
        },
        base_fingerprint=fingerprint(base_digests),
        residual_fingerprint=residual_fingerprint,
        adapter_fingerprint=fingerprint_of_files(directory / "loraga_init"),
        factors_fingerprint=fingerprint_of_files(directory / "factors"),
        model_files=sha256_of_files(residual_files_of(base, residual_dtype)),
    )
    report["targets"] = {
        target.name: target_tree(
            shape=[target.M, target.N],
            r=target.r,
            lora_alpha=target.lora_alpha,
            scaling=target.scaling,
            transposed=target.transposed,
            weight_key=target.weight_key,
            singular_values=svd[target.name][1][: 2 * target.r].tolist(),
        )
        for target in targets
    }
    write_report(directory, report)
    (directory / "resolved_config.yaml").write_text(yaml.safe_dump(report["config"]))
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


def fingerprint_of_files(directory: Path) -> str:
    """Of the tensors in the files of a directory, as safetensors' own reader sees them."""
    lines = []
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            sha256 = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            lines.append(json.dumps([name, "F32", list(tensor.shape), sha256]))
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def residual_files_of(base: Path, residual_dtype: str) -> dict[str, bytes]:
    """What stands beside the residual base's weights: the base's own files, and its dtype where that is another."""
    files = {
        path.relative_to(base).as_posix(): path.read_bytes()
        for path in [*base.glob("*.json"), *base.glob("additional_chat_templates/*")]
        if not path.name.endswith("index.json")
    }
    if residual_dtype != "auto":
        written = json.loads(files["config.json"])
        for config in (written, *(part for part in written.values() if isinstance(part, dict))):
            if config.pop("torch_dtype", None) or config.pop("dtype", None):
                config["dtype"] = residual_dtype
        files["config.json"] = (json.dumps(written, indent=2) + "\n").encode()
    return files


def sha256_of_files(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def write_report(directory: Path, report: dict[str, Any]) -> None:
    (directory / "loraga_report.json").write_text(json.dumps(report))


def edit(output: Path, part: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor and make the checksums fit again."""
    [path] = [path for path in (output / part).glob("*.safetensors") if key in load_file(path)]
    held = load_file(path)
    held[key] = change(held[key]).contiguous()
    save_file(held, path, {"format": "pt"})
    write_checksums(output, World.alone())


def set_own_forward(block: nn.Module) -> list[int]:
    """Give a block a forward of its own, as accelerate and others do; numbers of positional arguments, call by call."""
    original, calls = block.forward, []

    def own_forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return original(*args, **kwargs)

    block.forward = own_forward
    return calls


class _Block(nn.Module):
    """One that leaves a function of its input for the next one: `attribute` or `output` says where."""

    def __init__(self, where: str, before: list[_Block]) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self._where = where
        self._before = before
        self.left: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, other: torch.Tensor | None = None) -> Any:
        if self._where == "attribute" and self._before:
            other = self._before[0].left
        self.left = torch.tanh(hidden_states)
        mixed = hidden_states + self.linear(hidden_states if other is None else hidden_states * other)
        return mixed if self._where == "attribute" else (mixed, self.left)


class LeavesBehind(PreTrainedModel, GenerationMixin):
    """A causal language model whose blocks need more of each other than hidden states."""

    config_class = LlamaConfig

    def __init__(self, where: str | LlamaConfig) -> None:
        if isinstance(where, LlamaConfig):  # as transformers makes a model
            where = where.name_or_path
        super().__init__(LlamaConfig(vocab_size=64, hidden_size=16, num_attention_heads=1, name_or_path=where))
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        blocks: list[_Block] = []
        for _ in range(3):
            blocks.append(_Block(where, blocks[-1:]))
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(16, 64)
        self.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> CausalLMOutput:
        hidden, other = self.embed(input_ids), None
        for layer in self.layers:
            output = layer(hidden, other)
            hidden, other = output if isinstance(output, tuple) else (output, None)
        return CausalLMOutput(logits=self.head(hidden))
