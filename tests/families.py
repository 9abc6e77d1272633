"""Tiny random models of many families, and microbatches for them, without files."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from loraga_dist.config import LoraSection
from loraga_dist.data.losses import IGNORED
from loraga_dist.data.microbatches import Microbatch, count_supervised_tokens
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import Target, meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.sharding.single import SingleProcess

WINDOW = 4
"""Of sliding attention: shorter than the sequences."""
_VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_MAMBA = {"mamba_d_state": 4, "n_mamba_heads": 8, "mamba_expand": 2, "mamba_ngroups": 1, "chunk_size": 8}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2}),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": WINDOW}),
    "phi3": ("Phi3ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_projected": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "bloom": ("BloomForCausalLM", {"n_layer": 3, "n_head": 4}),
    "falcon": ("FalconForCausalLM", {"head_dim": None}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {"state_size": 4}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": WINDOW}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "granite": ("GraniteForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "zamba2": (
        "Zamba2ForCausalLM",
        _MAMBA
        | {
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "adapter_rank": 4,
            "num_mem_blocks": 1,
        },
    ),
    "gemma3n": (
        "Gemma3nForCausalLM",
        {
            "num_hidden_layers": 4,
            "intermediate_size": [48] * 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": _VOCABULARY,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "xlnet": ("XLNetLMHeadModel", {"d_head": 8, "d_inner": 48, "max_position_embeddings": None}),
    "bert": ("BertForSequenceClassification", {"num_labels": 3}),
    "electra": ("ElectraForSequenceClassification", {"num_labels": 3, "embedding_size": 16}),
    "albert": ("AlbertForSequenceClassification", {"num_labels": 3, "embedding_size": 16}),
    "led": (
        "LEDForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "attention_window": WINDOW,
            "decoder_start_token_id": 2,
        },
    ),
    "longformer": (
        "LongformerForSequenceClassification",
        {"num_labels": 3, "attention_window": [WINDOW] * 3, "max_position_embeddings": 80},
    ),
    "roc_bert": (
        "RoCBertForSequenceClassification",
        {"num_labels": 3, "shape_vocab_size": _VOCABULARY, "pronunciation_vocab_size": _VOCABULARY},
    ),
    "llama_classifier": ("LlamaForSequenceClassification", {"num_labels": 3}),
}
TARGETS: dict[str, Any] = {
    "mamba": ["in_proj", "x_proj"],
    "xlnet": ["layer_1", "layer_2"],
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "gemma3n"), _ATTENTION),
}
"""Where not all linear layers: PEFT refuses some, others are no plain matrices."""


def tiny(kind: str, attention: str = "eager", **changes: Any) -> nn.Module:
    """A frozen random float32 model, in eval mode; `changes` go to its config."""
    class_name, of_kind = _KINDS[kind]
    model_class: Any = getattr(transformers, class_name)
    values = {name: value for name, value in (_COMMON | of_kind | changes).items() if value is not None}
    config = model_class.config_class(**values)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # else a random model's layers hardly matter
    return model.requires_grad_(False).eval()


def task_of(model: nn.Module) -> Any:
    return "SEQ_CLS" if type(model).__name__.endswith("SequenceClassification") else "CAUSAL_LM"


def targets_of(model: nn.Module, target_modules: str | list[str], r: int = 2) -> list[Target]:
    lora = LoraSection(r=r, target_modules=target_modules, task_type=task_of(model))
    return select_targets(meta_copy(type(model), model.config), lora, lambda r: 2 * r).targets


def padded_microbatches(
    task_type: Any = "CAUSAL_LM", count: int = 3, longest: int = 13, growth: int = 2
) -> list[Microbatch]:
    """Of two sequences, the second padded; each microbatch longer than the one before by so many tokens."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        length = longest - growth * (count - 1 - index)
        ids = torch.randint(3, _VOCABULARY, (2, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, length - 3 - index :] = 0
        ids[mask == 0] = 0
        labels = torch.where(mask == 1, ids, IGNORED)
        if task_type == "SEQ_CLS":
            labels = torch.randint(0, 3, (2,), generator=draw)
        inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        found.append(Microbatch(inputs, count_supervised_tokens(labels, task_type), index, ()))
    return found


def alone() -> SingleProcess:
    return SingleProcess(World.alone())
