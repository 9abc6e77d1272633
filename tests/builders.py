"""Small models, tokenizers and data sets on disk, made in seconds without a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from loraga_dist.commands.convert import Conversion

VOCABULARY = 258
"""256 bytes, then padding and end of sequence."""


def byte_tokenizer(*, add_eos: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<pad>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def llama_config(**changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
        # weights of this size make activations, and so gradients, differ clearly between tokens
        "initializer_range": 0.1,
    }
    return LlamaConfig(**(values | changes))


MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {
        "num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [0]},
    "deepseek_v3": {
        "n_routed_experts": 8, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "glm4_moe": {
        "n_routed_experts": 6, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "head_dim": 8, "use_qk_norm": True,
    },
    # more than 10, whose text order is not their order
    "olmoe": {"num_experts": 12},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 32, "max_position_embeddings": 131072},
    "llama4": {
        "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1, "attention_chunk_size": 64,
    },
    "granitemoe": {"num_local_experts": 6},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0},
}  # fmt: skip
"""Mixtures of experts, two layers each, by the family's own names for what they have."""


def _moe_model(kind: str) -> torch.nn.Module:
    values = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 128,
        "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 257, "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }  # fmt: skip
    config = AutoConfig.for_model("llama4_text" if kind == "llama4" else kind, **(values | MOE[kind]))
    model = AutoModelForCausalLM.from_config(config)
    # what starts at 0 or 1 would hide a mistake
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(tensor, std=0.1)
    return model.eval()


def make_model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random model of one of the families the tests cover: llama, tied, gpt2, t5, bert, bart, and those of `MOE`."""
    torch.manual_seed(seed)
    if kind in MOE:
        return _moe_model(kind)
    special = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 257}
    if kind == "llama":
        return LlamaForCausalLM(llama_config()).eval()
    if kind == "tied":
        return LlamaForCausalLM(llama_config(tie_word_embeddings=True)).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=128, **special)
        return GPT2LMHeadModel(config).eval()
    if kind == "t5":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4,
            pad_token_id=256, eos_token_id=257, decoder_start_token_id=256, dropout_rate=0.1,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval()
    if kind == "bart":
        config = BartConfig(
            vocab_size=VOCABULARY, d_model=48, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=80, decoder_ffn_dim=80, max_position_embeddings=128,
            num_labels=3, decoder_start_token_id=257, forced_eos_token_id=None, init_std=0.1, **special,
        )  # fmt: skip
        return BartForSequenceClassification(config).eval()
    assert kind == "bert"
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=128, num_labels=3, pad_token_id=256,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


TASKS = {
    "llama": "CAUSAL_LM",
    "tied": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bert": "SEQ_CLS",
    "bart": "SEQ_CLS",
    **dict.fromkeys(MOE, "CAUSAL_LM"),
}


def save_model(
    directory: Path, kind: str = "llama", *, dtype: torch.dtype = torch.float32, shards: bool = True, seed: int = 0
) -> Path:
    model = make_model(kind, seed).to(dtype)
    model.save_pretrained(directory, max_shard_size="100KB" if shards else "1GB")
    # BART's classifier reads the last end of sequence
    byte_tokenizer(add_eos=kind == "bart").save_pretrained(directory)
    return directory


SPECIAL_IDS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 257, "decoder_start_token_id": 257}
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "embedding_size": 32, "max_position_embeddings": 64, "num_labels": 3, **SPECIAL_IDS,
}  # fmt: skip
"""Sizes of a tiny encoder, in the words of BERT and its kind."""


def save_class(directory: Path, class_name: str, **values: Any) -> Path:
    """A random model of any class of transformers, by the values of its config."""
    model_class: Any = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**values))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # else a random model's layers hardly matter
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_data(path: Path, task_type: str = "CAUSAL_LM", rows: int = 24, seed: int = 0) -> Path:
    """JSONL of pseudo-random text whose rows differ in length, so that ranks hold different numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for row in range(rows):
            length = 10 + (row * 7) % 50
            letters = torch.randint(97, 123, (length,), generator=generator).tolist()
            text = "".join(chr(letter) for letter in letters)
            record: dict[str, Any] = {
                "CAUSAL_LM": {"text": text},
                "SEQ_2_SEQ_LM": {"prompt": text, "completion": text[::-1][:12]},
                "SEQ_CLS": {"text": text, "label": row % 3},
            }[task_type]
            file.write(json.dumps(record) + "\n")
    return path


def save_feedback(path: Path, kind: str) -> Path:
    """Rows of many lengths: sorted letters are preferred."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for row in range(40 if kind == "pairs" else 7):
        letters = "".join(chr(97 + int(i)) for i in torch.randint(26, (4 + row % 9,), generator=generator))
        good, bad = "".join(sorted(letters)), letters[: 3 + row % 5]
        if kind == "pairs":
            rows.append({"prompt": f"sort {letters}: ", "chosen": good, "rejected": bad})
        else:
            rows += [
                {"prompt": letters, "completion": good, "reward": 2},
                {"prompt": letters, "completion": bad, "reward": 0.5},
            ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_tree(
    model: Path, data: Path, out: Path, *, kind: str = "llama", r: int = 4, **sections: dict[str, Any]
) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(model)},
        "lora": {"r": r, "lora_alpha": 8, "task_type": TASKS[kind]},
        "gradient": {"engine": "exact", "oversampling": 8},
        "calibration": {"data_files": str(data), "max_length": 64, "per_device_batch_size": 2},
        "output": {"dir": str(out)},
    }
    for name, changes in sections.items():
        tree[name] = tree.get(name, {}) | changes
    return tree


def report_tree(**changes: Any) -> dict[str, Any]:
    """The JSON of a whole report on one target `t`, made by hand; changes are merged in, mappings key by key."""
    tree: dict[str, Any] = {
        "schema_version": 1,
        "config": {"model": {"name_or_path": "company/base"}, "output": {"dir": "out"}},
        "base_fingerprint": "sha256:1",
        "residual_fingerprint": "sha256:2",
        "adapter_fingerprint": "sha256:4",
        "factors_fingerprint": "sha256:5",
        "model_files": {"config.json": "6"},
        "base_quantization": None,
        "weights_written_ns": {"loraga_init/adapter_model.safetensors": 1_700_000_000_123_456_789},
        "versions": {"python": "3.11"},
        "world_size": 1,
        "device": "CPU",
        "data_fingerprint": "sha256:3",
        "engine": "exact",
        "order": "block",
        "order_reason": "a block is gathered once for all microbatches",
        "calibration_bytes_read": None,
        "refine_passes": 0,
        "loss": "cross_entropy",
        "num_sequences": 24,
        "num_supervised_tokens": 500,
        "stopped_by": "data",
        "split_half_cosine": 0.5,
        "mean_loss": 5.5,
        "step": None,
        "seconds": {"load": 1.0, "total": 2.0},
        "peak_bytes_per_rank": [2**20],
        "planned_peak_bytes_per_rank": [2**21],
        "state_bytes_per_rank": 0,
        "targets": {"t": target_tree()},
        "rank_budget": None,
        "saved_parameters": {},
        "identity_check": {
            "max_abs_logit_diff": 1e-6,
            "max_abs_logit": 3.0,
            "dtype": "float32",
            "kl": 1e-3,
            "kl_of_rounding": 2e-3,
            "mean_loss_before": 5.25,
            "mean_loss_after": 5.5,
        },  # fmt: skip
        "coverage": {
            "num_parameters": 400,
            "num_covered": 200,
            "num_trained_whole": 0,
            "left_out": {"embeddings": 150},
        },
        "left_out": [],
        "cautions": [],
        "warnings": [],
    }
    return _merged(tree, changes)


def conversion(**changes: Any) -> Conversion:
    values: dict[str, Any] = {
        "init": "init", "trained": "trained", "base": "company/base", "revision": None, "task_type": "CAUSAL_LM",
        "trust_remote_code": False, "num_targets": 1, "saved_parameters": [], "warnings": [],
    }  # fmt: skip
    return Conversion(**(values | changes))


def target_tree(**changes: Any) -> dict[str, Any]:
    """The JSON of one target's part of a report, of which there is nothing to warn."""
    return {
        "shape": [20, 10],
        "r": 2,
        "lora_alpha": 4,
        "scaling": 2.0,
        "transposed": False,
        "weight_key": "t.weight",
        "stack": None,
        "by_parameter": False,
        "singular_values": [4.0, 3.0, 2.0, 1.0],
        "num_converged": 4,
        "numerical_rank": 4,
        "captured_energy": 0.9,
        "split_half_cosine": 0.5,
        "subspace_cosine": 0.6,
        "input_rank": None,
        "window_capture": 0.7,
        "engine": "exact",
        "offset_ratio": 1.0,
        "owner_rank": 0,
    } | changes


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(tree[key], value) if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        for key, value in changes.items()
    }
    return tree | both
