"""Gradients by blocks are those by the whole model, in every family that is a sequence of blocks; others are seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from builders import make_model
from families import TARGETS, alone, padded_microbatches, targets_of, task_of, tiny
from handmade import LeavesBehind
from outputs import relative
from pieces import exact_gradients
from torch import Tensor, nn

import loraga_dist
from loraga_dist.config import GradientConfig
from loraga_dist.data.losses import IGNORED, LOSSES
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients import head
from loraga_dist.gradients.block_order import NotInBlocks
from loraga_dist.gradients.forward import forward
from loraga_dist.model.blocks import choose_order, find_blocks
from loraga_dist.model.targets import Target
from loraga_dist.ranks.memory import PeakMemory, return_freed_memory_at_once

BY_BLOCKS, BY_MODEL = (GradientConfig(order=order, checkpointing="none") for order in ("block", "model"))
FAMILIES = [
    *("llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "opt", "bloom", "falcon", "mixtral", "qwen3_moe"),
    *("olmo2", "gpt_neox", "mamba", "starcoder2", "cohere2", "gpt_oss", "granite", "smollm3", "gpt2", "zamba2"),
    *("bert", "llama_classifier"),
]
SDPA = ["llama", "gemma3", "opt", "gpt2", "bert"]


def gradients(
    model: nn.Module, targets: list[Target], microbatches: list[Microbatch], config: GradientConfig
) -> dict[str, Tensor]:
    found = exact_gradients(model, alone(), targets, microbatches, config, LOSSES[task_of(model)])
    return {name: G_MN.clone() for name, G_MN in found}


@pytest.mark.parametrize(
    ("kind", "attention"), [*((kind, "eager") for kind in FAMILIES), *((kind, "sdpa") for kind in SDPA)]
)
def test_every_family_bit_by_bit(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    targets, microbatches = targets_of(model, TARGETS.get(kind, "all-linear")), padded_microbatches(task_of(model))
    by_blocks, by_model = (gradients(model, targets, microbatches, config) for config in (BY_BLOCKS, BY_MODEL))
    assert by_blocks.keys() == by_model.keys() == {target.name for target in targets}
    for name, G_MN in by_model.items():
        assert G_MN.any() and torch.equal(by_blocks[name], G_MN), name


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_no_single_sequence(kind: str) -> None:
    model = make_model(kind)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    order = choose_order("auto", type(model).__name__, find_blocks(model), names, in_pieces=True)
    assert order.name == "model"
    assert order.why == f"{type(model).__name__} is no single sequence of blocks with targets in it"


OTHERWISE = {
    # kind of model: targets, and why it cannot go by blocks
    "gemma3n": (TARGETS["gemma3n"], "block 2 uses what a block before it left behind"),
    "albert": (["query", "ffn"], "they are not called one after the other, each once"),
    "opt_projected": ("all-linear", "the target model.decoder.project_in runs before the last of them"),
    "electra": ("all-linear", "the target electra.embeddings_project runs before the last of them"),
    "attribute": (["linear"], "block 1 uses what a block before it left behind"),
    "output": (["linear"], "block 1 is given what only running the blocks before it makes"),
}
"""The last two are made by hand."""


def otherwise(kind: str) -> nn.Module:
    return LeavesBehind(kind) if kind in ("attribute", "output") else tiny(kind)


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("kind", OTHERWISE)
def test_what_is_no_sequence_is_seen_before_anything_is_shown(kind: str, num_microbatches: int) -> None:
    model, (target_modules, why) = otherwise(kind), OTHERWISE[kind]
    microbatches = padded_microbatches(task_of(model), num_microbatches, growth=0)
    with pytest.raises(NotInBlocks, match=why) as error:
        gradients(model, targets_of(model, target_modules), microbatches, BY_BLOCKS)
    assert str(error.value).startswith(f"{type(model).__name__} is no sequence of its blocks; ")
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", OTHERWISE)
def test_what_is_no_sequence_gets_its_start_in_model_order(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    target_modules, why = OTHERWISE[kind]
    batches = [microbatch.inputs for microbatch in padded_microbatches(task_of(otherwise(kind)), growth=0)]
    starts = {}
    for order in ("block", "model"):
        model = otherwise(kind)
        config = {
            "lora": {"r": 2, "target_modules": target_modules, "task_type": task_of(model)},
            "gradient": {"engine": "exact", "order": order},
        }
        start = loraga_dist.initialize(model, batches, config)
        assert start.gradients is not None and start.gradients.order.name == "model"
        starts[order] = start
    assert why in starts["block"].gradients.order.why and why in capsys.readouterr().err
    assert starts["block"].factors.keys() == starts["model"].factors.keys()
    for name, factors in starts["model"].factors.items():
        assert torch.equal(starts["block"].factors[name].A_RN, factors.A_RN), name
        assert torch.equal(starts["block"].factors[name].B_MR, factors.B_MR), name


def few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that the longest of two sequences takes four parts, the last one shorter."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2 * 64 * 4)


@contextmanager
def heads_called(model: Any) -> Iterator[list[int]]:
    """Of how many tokens the model's head makes logits, call by call."""
    calls: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *hooked: calls.append(hooked[2].shape[1]))
    yield calls
    handle.remove()


@pytest.mark.parametrize("config", [BY_BLOCKS, BY_MODEL], ids=lambda config: config.order)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_long_sequences_take_the_head_in_parts(
    kind: str, config: GradientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(kind, tie_word_embeddings=False)
    targets, microbatches = targets_of(model, "all-linear"), padded_microbatches()
    of_head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    targets += targets_of(model, of_head)
    whole = gradients(model, targets, microbatches, BY_MODEL)
    few_logits_at_once(monkeypatch)
    with heads_called(model) as calls:
        in_parts = gradients(model, targets, microbatches, config)
    assert max(calls) == 4, "never more logits than there is room for"
    for name, G_MN in whole.items():
        assert relative(in_parts[name], G_MN) < 1e-6, name


@pytest.mark.parametrize(
    ("kind", "config", "growth"),
    [("gemma3n", BY_MODEL, 2), ("xlnet", BY_MODEL, 2), ("xlnet", BY_BLOCKS, 5)],
    ids=lambda it: getattr(it, "order", it),
)
def test_hidden_states_of_another_form_take_the_head_at_once(
    kind: str, config: GradientConfig, growth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma3n has several in one tensor, XLNet tokens before sequences. By blocks the first microbatch is a short one,
    which shows nothing of that."""
    few_logits_at_once(monkeypatch)
    model, microbatches = tiny(kind), padded_microbatches(longest=14, growth=growth)
    targets = targets_of(model, TARGETS[kind])
    found = gradients(model, targets, microbatches, config)
    weights = {it.name: model.get_parameter(it.parameter_name).requires_grad_(True) for it in targets}
    for microbatch in microbatches:
        logits = forward(model, microbatch, torch.device("cpu"))
        LOSSES["CAUSAL_LM"](logits, microbatch.inputs["labels"], None).backward()
    for name, weight in weights.items():
        assert weight.grad is not None
        G_MN = weight.grad / sum(microbatch.num_terms for microbatch in microbatches)
        assert G_MN.any() and relative(found[name], G_MN) < 1e-6, name


def test_parts_without_a_label_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (microbatch, *_) = tiny("llama"), padded_microbatches(count=1, longest=40)
    targets = targets_of(model, ["down_proj"])
    labels = microbatch.inputs["labels"].clone()
    labels[:, 1:21] = IGNORED  # what positions 0 to 19 predict
    completion = dataclasses.replace(
        microbatch, inputs=microbatch.inputs | {"labels": labels}, num_supervised_tokens=int((labels != IGNORED).sum())
    )
    whole = gradients(model, targets, [completion], BY_MODEL)
    few_logits_at_once(monkeypatch)
    with heads_called(model) as all_calls:
        gradients(model, targets, [microbatch], BY_BLOCKS)
    with heads_called(model) as calls:
        in_parts = gradients(model, targets, [completion], BY_BLOCKS)
    assert len(calls) == len(all_calls) - 4, "of five parts without a label, all but the first"
    for name, G_MN in whole.items():
        assert relative(in_parts[name], G_MN) < 1e-6, name


@pytest.mark.parametrize("config", [BY_BLOCKS, BY_MODEL], ids=lambda config: config.order)
def test_a_long_microbatch_without_any_label(config: GradientConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, microbatches = tiny("llama"), padded_microbatches()
    silent = torch.full_like(microbatches[1].inputs["labels"], IGNORED)
    microbatches[1] = dataclasses.replace(
        microbatches[1], inputs=microbatches[1].inputs | {"labels": silent}, num_supervised_tokens=0
    )
    targets = targets_of(model, "all-linear")
    whole = gradients(model, targets, microbatches, BY_MODEL)
    few_logits_at_once(monkeypatch)
    in_parts = gradients(model, targets, microbatches, config)
    assert all(relative(in_parts[name], G_MN) < 1e-6 for name, G_MN in whole.items())


@pytest.mark.parametrize("room", ["some", "all"])
def test_head_and_loss_of_a_long_sequence_take_what_the_plan_says(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the logits at a time, 40 MiB."""
    return_freed_memory_at_once()  # as every run does; else the heap keeps what earlier tests made it large enough for
    num_tokens, vocabulary = 1280, 2**15
    part = num_tokens // 4 * vocabulary
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", part if room == "some" else 4 * part)
    limit_bytes = 4 * part * 4
    model = tiny("llama", "sdpa", vocab_size=vocabulary, num_hidden_layers=1, max_position_embeddings=num_tokens)
    targets = targets_of(model, ["down_proj"])
    ids = torch.randint(0, vocabulary, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    for length in (64, num_tokens):  # the first is to have all code there
        microbatch = Microbatch({"input_ids": ids[:, :length], "labels": ids[:, :length]}, length - 1, 0, ())
        with PeakMemory(torch.device("cpu")) as memory:
            gradients(model, targets, [microbatch], BY_BLOCKS)
    if room == "some":
        assert memory.peak_bytes < limit_bytes
    else:
        assert memory.peak_bytes > 2 * limit_bytes, "else this measures nothing"
