"""Tiny random models of every architecture that transformers has for a task, as checkpoints with a tokenizer and data.

A config is the class's own default with every number made small by what its name says it is.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from loraga_dist.config import TaskType

LABELS = 3
HIDDEN = 64
VOCABULARY = 320
MOST_PARAMETERS = 8_000_000


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A task's models in transformers."""

    title: str
    task_type: TaskType
    classes: Mapping[str, str]
    """Of its models, by the model type of their configs."""


KINDS = {
    "causal": Kind(
        title="Causal language models", task_type="CAUSAL_LM", classes=modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ),
    "seq2seq": Kind(
        title="Sequence to sequence",
        task_type="SEQ_2_SEQ_LM",
        classes=modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
    "classifier": Kind(
        title="Sequence classifiers",
        task_type="SEQ_CLS",
        classes=modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "image": Kind(
        title="Image and text to text, calibrated on text",
        task_type="CAUSAL_LM",
        classes=modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
}

_SIZES: tuple[tuple[str, int], ...] = (
    # the end of a name, and the most that its number may be; the first that matches decides
    (r"codebook_size", 256),
    (r"(num|max)_(tiles|frames|mel_bins)|mel_bins", 16),
    (r"vocab(_size.*)?|num_embeddings|buckets", VOCABULARY),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"(eos|sep|eod)_token_id", 2),
    (r"decoder_start_token_id", 0),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 8),
    (r"index_head_dim", 16),
    (
        r"head_?dim|d_kv|d_head|kv_channels|attention_head_size|mamba_d_head|mamba_headdim|dim_head|qk_head_dim|head_size|linear_\w+_head_dim",
        16,
    ),
    (r"(key_value|kv|kv_n)_heads|num_query_groups", 2),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"heads?|n_head", 4),
    (r"experts_per_tok(en)?|top_?k|moe_k", 2),
    (r"topk_group", 1),
    (r"index_kpool", 2),
    (r"n_group|expert_group|expert_num", 2),
    (r"num_experts|n_routed_experts|local_experts|moe_num_experts|experts", 4),
    (r"(hidden_)?layers|n_layers?|depth|num_blocks|layer_groups", 2),
    (r"image_size|crop_size|img_size|resolution", 32),
    (r"patch_size", 8),
    (r"positions?(_embeddings)?|max_seq_len|n_ctx|model_max_length|context_length|max_length", 128),
    (r"(lora_)?rank|dt_rank|time_step_rank", 16),
    (r"(intermediate|ffn|mlp|expert|inner|feed_forward)_?(dim|size|hidden_size)?|d_ff|dff|d_inner|dim_ff|ffn_dim", 96),
    (r"(d_)?state(_size)?|ssm_state_size", 16),
    (r"window(_size|_len)?|sliding_window|chunk_size|attn_chunk_length", 8),
    (
        r"hidden(_size)?|d_model|(embed|embd|hidden|proj|projection|out|output|in|input)_dim|n_embd|dim|width|hidden_size_\w+",
        HIDDEN,
    ),
    (r"(size|dim|channels|embed|channel)", HIDDEN),
    (r"latents|query_tokens|latent_query_num", 8),
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_SPECIAL: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 300, "IMGIMGAA": 301, "IMGIMGBB": 302}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "doge": {"keep_window_size": 2048},  # a shorter text than that sees no padding
    "dots1": _EXPERTS,
    "dots3_note_text": {
        "per_layer_config": {
            2: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "head_dim": 16,
            },
        },
    },
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "florence_vision": {
        "depths": (1, 1, 1, 1),
        "embed_dim": (16, 32, 32, 64),
        "num_heads": (2, 4, 4, 4),
        "num_groups": (2, 4, 4, 4),
    },
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
    },
    "encoder-decoder": {"pad_token_id": 0},
    "esmc": {"vocab_size": VOCABULARY},
    "glm4v_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm_ocr_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "paddleocr_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "qwen2_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lilt": {"hidden_size": 96},
    "mistral4": {"qk_rope_head_dim": 16},
    "nystromformer": {"conv_kernel_size": 65},
    "hunyuan_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "step3p5": {"sliding_window": 8},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": (16, 32, 32, 64)},
    "qwen2_5_omni_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "qwen3_omni_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 300, "vision_end_token_id": 301},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 300, "vision_end_token_id": 301},
    "radio": {"video_temporal_patch_size": 2},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 6400},
    "emu3": {"vocabulary_map": {"<image>": 300}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "gemma3n_text": {
        "intermediate_size": [96] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 1000,
        "hc_lowrank": 8,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
}
"""What the rules cannot know, by model type: fields of the config of that type, wherever it stands."""


def tokenizer(*, marks_ends: bool) -> PreTrainedTokenizerFast:
    """Bytes, after <pad>, <s>, </s> and <unk>, which are the ids that most configs have for them.

    marks_ends: puts a sequence between <s> and </s>, as tokenizers of encoders do.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={it: index for index, it in enumerate([*special, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if marks_ends:
        made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_config(config_class: type[PreTrainedConfig], **fields: Any) -> PreTrainedConfig:
    """The class's default config made small, its parts as well."""
    default = config_class()
    return config_class(**(_small(default) | _SPECIAL.get(config_class.model_type, {}) | fields))


def _small(default: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that change when it is made small."""
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    kept = _kept_layers(values)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            with_encoder = {"is_decoder": True, "add_cross_attention": True} if "encoder" in values else {}
            found[name] = tiny_config(type(value), **(with_encoder if name == "decoder" else {}))
        elif isinstance(value, list) and kept and len(value) == kept.total:
            found[name] = [value[index] for index in kept.indices]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = len(kept.indices) if kept and name in kept.names else _small_number(name, value)
            if name == "head_dim" and "qk_rope_head_dim" in values:
                small = 8  # the part that is rotated
            if "key_value_heads" in name and value == values.get(name.replace("key_value", "attention")):
                small = 4
            if small != value:
                found[name] = small
        elif name == "head_dim" and value is None:
            found[name] = 16
        elif isinstance(value, dict) and "mrope_section" in value:
            found[name] = value | {"mrope_section": _small_sections(value["mrope_section"])}
    return found


@dataclass(frozen=True)
class _Kept:
    """Which layers of a default are kept: one of every kind, two at least."""

    names: list[str]
    total: int
    indices: list[int]


def _kept_layers(values: Mapping[str, Any]) -> _Kept | None:
    names = [name for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in values]
    if not names:
        return None
    total = values[names[0]]
    of_layers = [value for value in values.values() if isinstance(value, list) and len(value) == total]
    first: dict[str, int] = {}
    for index in range(total):
        first.setdefault(repr([value[index] for value in of_layers]), index)
    indices = list(first.values())[:4]
    indices += [index for index in range(total) if index not in indices][: max(0, 2 - len(indices))]
    return _Kept(names, total, sorted(indices))


def _small_number(name: str, value: int) -> int:
    for pattern, most in _SIZES:
        if re.search(rf"(^|_)({pattern})$", name):
            return most if "token_id" in pattern else min(value, most)
    if name.endswith(("_id", "_index", "_token")) and value >= VOCABULARY:
        return 264 + value % 56
    return value


def _small_sections(sections: list[int]) -> list[int]:
    """Of multimodal rotary embeddings: parts of half a head's width."""
    rest = [max(1, section * 8 // sum(sections)) for section in sections[1:]]
    return [8 - sum(rest), *rest]


def build(kind: Kind, model_type: str) -> PreTrainedModel:
    """A random float32 model; raises whatever the config or the class does not take."""
    config_class = CONFIG_MAPPING[model_type]
    model_class = getattr(transformers, kind.classes[model_type])
    fields: dict[str, Any] = {"num_labels": LABELS} if kind.task_type == "SEQ_CLS" else {}
    if kind is KINDS["causal"] and hasattr(config_class, "is_decoder"):
        fields["is_decoder"] = True
    if config_class().is_encoder_decoder:
        fields["decoder_start_token_id"] = 0
    config = tiny_config(config_class, **fields)
    parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
    if not isinstance(config, model_class.config_class) and parts:
        config = parts[0]
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"has {num_parameters:,} parameters")
    torch.manual_seed(0)
    model = model_class(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # as they are made, many a layer would hardly matter, or not at all
            is_matrix = isinstance(module, nn.Linear | Conv1D | nn.Embedding) and name == "weight"
            if is_matrix or parameter.dim() == 3 or not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save(model: PreTrainedModel, kind: Kind, directory: Path) -> Path:
    """Write the checkpoint, and data beside it; the data's path."""
    model.save_pretrained(directory)
    tokenizer(marks_ends=kind.task_type != "CAUSAL_LM").save_pretrained(directory)
    data = directory.with_suffix(".jsonl")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for row, length in enumerate((17, 23, 12, 20)):
        text = "".join(chr(letter) for letter in torch.randint(97, 123, (length,), generator=draw).tolist())
        answered = {"prompt": text, "completion": text[::-1][: 5 + row]}
        rows.append(
            {
                "CAUSAL_LM": {"text": text} if kind is KINDS["causal"] else answered,
                "SEQ_2_SEQ_LM": answered,
                "SEQ_CLS": {"text": text, "label": row % LABELS},
            }[kind.task_type]
        )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data
