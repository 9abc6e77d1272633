"""Tiny random models that read images and text, saved as their families' checkpoints on the hub are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from builders import VOCABULARY, byte_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 257, "tie_word_embeddings": False,
    "initializer_range": 0.1,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4,
    "out_hidden_size": 32,
}  # fmt: skip


def _rotary(*section: int, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)} | others}


KINDS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": _TEXT | _rotary(2, 1, 1),
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": _TEXT | _rotary(2, 1, 1) | {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        },
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "gemma3": {
        "text_config": _TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 8},
        "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 250, "boi_token_index": 251,
        "eoi_token_index": 252,
    },
    "llava": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 16}, "image_token_index": 250,
    },
    "llama4": {
        "text_config": _TEXT | {
            "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1, "attention_chunk_size": 64,
        },
        "vision_config": _VISION | {
            "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "intermediate_size": 64,
            "pixel_shuffle_ratio": 0.5,
        },
    },
    "qwen3_5": {
        "text_config": _TEXT | _rotary(1, 0, 0, partial_rotary_factor=0.25) | {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        "vision_config": _QWEN_VISION,
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8}, "image_token_index": 250,
    },
    "gemma4": {
        "text_config": _TEXT | {
            "sliding_window": 16, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY, "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": _VISION | {"head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 1},
        "image_token_id": 250, "audio_config": None,
    },
    "qwen2_vl": {
        "text_config": _TEXT | _rotary(2, 1, 1), "vision_config": _QWEN_VISION | {"hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _rotary(2, 1, 1), "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]},
    },
    "internvl": {
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _VISION | {"image_size": [16, 16], "patch_size": [8, 8]}, "image_token_id": 250,
    },
    "idefics3": {
        "text_config": _TEXT | {"model_type": "llama"}, "vision_config": _VISION, "image_token_id": 250,
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": _TEXT | {"model_type": "llama"}, "vision_config": _VISION, "image_token_id": 250,
        "scale_factor": 2,
    },
    "paligemma": {
        "text_config": _TEXT | {"model_type": "gemma"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model", "projection_dim": 32},
        "image_token_index": 250, "projection_dim": 32, "hidden_size": 32,
    },
    "mllama": {
        "text_config": _TEXT | {"cross_attention_layers": [1], "num_hidden_layers": 3},
        "vision_config": _VISION | {
            "num_global_layers": 1, "attention_heads": 2, "intermediate_layers_indices": [0], "vision_output_dim": 32,
            "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
        },
        "image_token_index": 250,
    },
}  # fmt: skip
"""What of their configs is not the default."""


def make_multimodal(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # what starts at 0 would hide a mistake
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save_multimodal(directory: Path, kind: str) -> Path:
    make_multimodal(kind).save_pretrained(directory)
    if kind == "qwen3_vl_moe":  # its own files have what transformers transposes
        file = directory / "model.safetensors"
        tensors = load_file(file).items()
        save_file({key: it.mT.contiguous() if it.ndim == 3 else it for key, it in tensors}, file, {"format": "pt"})
    byte_tokenizer().save_pretrained(directory)
    return directory


def as_trl_loads(directory: Path) -> Any:
    """Of the class that config.json names."""
    (architecture,) = AutoConfig.from_pretrained(directory).architectures
    return getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32)
