"""Small quantized checkpoints, in the layouts of those on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from builders import byte_tokenizer, llama_config, save_model
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    Mxfp4Config,
)

BLOCK = 16
"""Divides every size of the small models."""


def save_fp8(directory: Path, kind: str = "llama", *, block: int = BLOCK, scale: torch.dtype = torch.bfloat16) -> Path:
    """As DeepSeek's and Qwen's: every projection in blocks, each with the scale that its largest element needs."""
    save_model(directory, kind, dtype=torch.bfloat16, shards=False)
    tensors = load_file(directory / "model.safetensors")
    for key in _projections(tensors):
        W_MN = tensors[key].float()
        scales = (_block_maxima(W_MN, block) / 448).to(scale)
        grown = scales.float().repeat_interleave(block, 0)[: len(W_MN)].repeat_interleave(block, 1)[:, : W_MN.shape[1]]
        tensors[key] = (W_MN / grown).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return _save(directory, tensors, config)


def save_mxfp4(directory: Path) -> Path:
    """As gpt-oss: experts of random bits."""
    config = GptOssConfig(
        vocab_size=258, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
        max_position_embeddings=131072, pad_token_id=256, bos_token_id=257, eos_token_id=257, initializer_range=0.1,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, N, M = tensors.pop(key).shape
        blocks = torch.randint(256, (E, M, N // 32, 16), generator=generator)
        exponents = torch.randint(100, 124, (E, M, N // 32), generator=generator)
        tensors |= {f"{key}_blocks": blocks.to(torch.uint8), f"{key}_scales": exponents.to(torch.uint8)}
    return _save(directory, tensors, {"quant_method": "mxfp4"})


def save_bnb(directory: Path, *, width: int = 128, **options: Any) -> Path:
    """By bitsandbytes itself. Its dequantization on CPUs is wrong for rows that are not whole blocks of 64."""
    plain = directory.with_name(f"{directory.name}-plain")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(intermediate_size=width)).to(torch.bfloat16).save_pretrained(plain)
    config = BitsAndBytesConfig(**options)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_compressed(directory: Path, kind: str, fmt: str, **weights: Any) -> Path:
    """By compressed-tensors' own compressors, with scales by its own rule."""
    save_model(directory, kind, dtype=torch.bfloat16, shards=False)
    tensors = load_file(directory / "model.safetensors")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=fmt)  # type: ignore[arg-type]
    compressor: Any = BaseCompressor.get_value_from_registry(fmt)
    for key in _projections(tensors):
        W_MN = tensors.pop(key)
        state = {"weight": W_MN} | _scales(W_MN, scheme.weights)
        module = key.removesuffix("weight")
        tensors |= {module + name: held.contiguous() for name, held in compressor.compress(state, scheme).items()}
    config = {
        "quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }  # fmt: skip
    return _save(directory, tensors, config)


def by_transformers(directory: Path, dtype: torch.dtype) -> Any:
    """The model with the weights that transformers dequantizes, all of one dtype."""
    method = json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"]
    options = {} if method == "bitsandbytes" else {"quantization_config": _DEQUANTIZE[method]}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    return (model.dequantize(dtype) if method == "bitsandbytes" else model).to(dtype)


def save_floats(quantized: Path, directory: Path) -> Path:
    """What transformers dequantizes as an ordinary checkpoint, float32."""
    config = AutoConfig.from_pretrained(quantized)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(by_transformers(quantized, torch.float32).state_dict())
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


_DEQUANTIZE: dict[str, Any] = {
    "fp8": FineGrainedFP8Config(dequantize=True),
    "mxfp4": Mxfp4Config(dequantize=True),
    "compressed-tensors": CompressedTensorsConfig(dequantize=True),
}


def _projections(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key, held in tensors.items() if key.endswith("_proj.weight") and held.ndim == 2]


def _block_maxima(W_MN: Tensor, block: int) -> Tensor:
    return torch.nn.functional.max_pool2d(W_MN.abs()[None], block, ceil_mode=True)[0]


def _scales(W_MN: Tensor, args: Any) -> dict[str, Tensor]:
    if args.strategy == "group":
        parts = W_MN.unflatten(1, (-1, args.group_size))
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "block":
        high = _block_maxima(W_MN.float(), args.block_structure[0]).to(W_MN.dtype)
        low = -high
    elif args.strategy == "channel":
        low, high = W_MN.amin(1, keepdim=True), W_MN.amax(1, keepdim=True)
    else:
        low, high = W_MN.min().view(1), W_MN.max().view(1)
    scale, zero_point = calculate_qparams(low, high, args)
    return {"weight_scale": scale, "weight_zero_point": zero_point}


def _save(directory: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return directory
