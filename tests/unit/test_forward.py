"""The model's own forward gives the logits whose loss is the model's own, and no cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from outputs import relative
from ranks import run_on_ranks
from torch import nn

from loraga_dist.data.losses import IGNORED, LOSSES
from loraga_dist.data.microbatches import Microbatch, count_supervised_tokens
from loraga_dist.gradients.forward import forward, full_float32_matmul, outputs

CPU = torch.device("cpu")
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
SEAMLESS = BART | {
    "hidden_size": 32, "speech_encoder_layers": 1, "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 48, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    # with a shift of their own; FSMT's writes into its labels
    "BartForConditionalGeneration": BART,
    "PLBartForConditionalGeneration": BART,
    "FSMTForConditionalGeneration": {"src_vocab_size": 64, "tgt_vocab_size": 64, "langs": ["en", "de"]} | BART,
    # which only their forward shifts
    "BlenderbotForConditionalGeneration": BART,
    "BlenderbotSmallForConditionalGeneration": BART,
    "M2M100ForConditionalGeneration": BART,
    "NllbMoeForConditionalGeneration": BART | {"num_experts": 4, "expert_capacity": 64, "router_jitter_noise": 0.0},
    "SeamlessM4TForTextToText": SEAMLESS,
}


def build(class_name: str, **values: Any) -> Any:
    model_class: Any = getattr(transformers, class_name)
    values.pop("vocab_size" if "FSMT" in class_name else "", None)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**values))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)  # else a random model's layers hardly matter
    return model.eval()


def translations() -> Microbatch:
    """Two of them, of which both sides of one are padded."""
    ids, labels = torch.randint(3, 64, (2, 9)), torch.randint(3, 64, (2, 7))
    ids[1, 5:], labels[1, 4:] = 0, IGNORED
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    return Microbatch(inputs, count_supervised_tokens(labels, "SEQ_2_SEQ_LM"), 0, ())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the matrices that take part, embeddings and experts among them."""
    matrices = {name: p.grad for name, p in model.named_parameters() if p.ndim > 1 and p.grad is not None}
    model.zero_grad()
    return {name: G for name, G in matrices.items() if G.any()}


@pytest.mark.parametrize("class_name", MODELS)
def test_the_gradient_is_that_of_the_models_own_loss(class_name: str) -> None:
    model, microbatch = build(class_name, **MODELS[class_name]), translations()
    texts = [
        {"input_ids": ids[ids != 0][None], "labels": labels[labels != IGNORED][None]}
        for ids, labels in zip(microbatch.inputs["input_ids"], microbatch.inputs["labels"], strict=True)
    ]
    loss = LOSSES["SEQ_2_SEQ_LM"](forward(model, microbatch, CPU), microbatch.inputs["labels"])
    (loss / microbatch.num_supervised_tokens).backward()
    found = gradients(model)

    for alone in texts:
        if "FSMT" in class_name:  # its forward shifts no labels
            alone["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(alone["labels"].clone())
        (model(**alone).loss * alone["labels"].numel() / microbatch.num_supervised_tokens).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 20
    assert max(relative(found[name], expected[name]) for name in found) < 1e-4


def test_a_classifier_that_hands_arguments_down_makes_no_cache() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    model = build("Gemma3ForSequenceClassification", text_config=text, vision_config=sizes, num_labels=3)
    ids = torch.randint(3, 64, (1, 9))
    assert model(input_ids=ids).past_key_values is not None
    microbatch = Microbatch({"input_ids": ids, "labels": torch.tensor([1])}, 1, 0, ())
    assert outputs(model, microbatch, CPU).past_key_values is None


def precisions() -> dict[str, str | None]:
    backends: Any = torch.backends
    holders = {"all": backends, "cuda": backends.cuda.matmul, "cpu": backends.mkldnn, "cpu's": backends.mkldnn.matmul}
    found: dict[str, str | None] = {name: holder.fp32_precision for name, holder in holders.items()}
    try:
        found["general"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["general"] = None
    return found


def set_precision(holder: Any, precision: str) -> None:
    holder.fp32_precision = precision


BACKENDS: Any = torch.backends
WAYS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "general": lambda: torch.set_float32_matmul_precision("high"),
    "lowest": lambda: torch.set_float32_matmul_precision("medium"),
    "flag": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "all": lambda: set_precision(BACKENDS, "tf32"),
    "cuda": lambda: set_precision(BACKENDS.cuda.matmul, "tf32"),
    "cpu": lambda: set_precision(BACKENDS.mkldnn, "bf16"),
    "cpu's": lambda: set_precision(BACKENDS.mkldnn.matmul, "bf16"),
}


def within(way: str) -> list[dict[str, str | None]]:
    """Before, within and after, and when all backends have been given another."""
    WAYS[way]()
    seen = [precisions()]
    with full_float32_matmul():
        seen.append(precisions())
    seen.append(precisions())
    set_precision(BACKENDS, "tf32")
    return [*seen, precisions()]


@pytest.mark.parametrize("way", WAYS)
def test_precision_is_full_and_then_as_it_was_however_it_was_set(way: str) -> None:
    before, during, after, then = run_on_ranks(within, 1, way)[0]
    assert (during["cuda"], during["cpu's"], during["general"]) == ("ieee", "ieee", "highest")
    assert after == before
    if way == "none":
        assert (then["cuda"], then["cpu's"]) == ("tf32", "tf32")
