"""Activations counted without data against a run on real tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TASKS, llama_config, make_model
from transformers import LlamaForCausalLM

from loraga_dist.config import Checkpointing, LoraSection
from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.forecast.activations import forecast_activations
from loraga_dist.forecast.in_blocks import InBlocks, Shown
from loraga_dist.gradients.experts import experts_tapped
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.head import LOGITS_AT_ONCE
from loraga_dist.gradients.stubs import Form, Stubs
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.base import BaseModel
from loraga_dist.model.blocks import MODEL_ORDER, Order, find_blocks
from loraga_dist.model.selection import select_targets
from loraga_dist.model.stacks import find_stacks
from loraga_dist.model.targets import Target, meta_copy
from loraga_dist.schemes import SCHEMES

SCHEME = SCHEMES["lora_ga"]
BATCH, LENGTH = 4, 96
EXPERTS = ("mixtral", "gpt_oss", "llama4")


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize(
    ("kind", "layers"),
    [("llama", 3), ("llama", 12), ("t5", 2), ("gpt2", 2), ("bert", 2), *((kind, 2) for kind in EXPERTS)],
)
def test_the_forecast_is_what_a_run_takes(kind: str, layers: int, checkpointing: Checkpointing) -> None:
    model = LlamaForCausalLM(llama_config(num_hidden_layers=layers)).eval() if kind == "llama" else make_model(kind)
    model.requires_grad_(False)
    task = TASKS[kind]
    labels = (BATCH,) if task == "SEQ_CLS" else (BATCH, LENGTH)
    shapes = {"input_ids": (BATCH, LENGTH), "attention_mask": (BATCH, LENGTH), "labels": labels}
    targets = targets_of(model, task)
    names = [target.name for target in targets]
    shown = Shown(tuple((name, 0) for name in names))
    forecast = forecast_activations(
        base_of(model), shapes, [shown], MODEL_ORDER, loss=LOSSES[task], checkpointing=checkpointing, gathers=False
    )
    assert forecast is not None
    measured = real_peak_bytes(model, shapes, names, task, checkpointing)
    assert forecast.backward_bytes == pytest.approx(measured, rel=0.1)
    if kind in EXPERTS:  # of grouped products, and of another implementation than the taps'
        microbatch = padded_microbatch(shapes)
        with torch.no_grad():
            forward_bytes = peak_of(lambda: forward(model, microbatch, torch.device("cpu")))
        assert forecast.forward_bytes == pytest.approx(forward_bytes, rel=0.15)


def targets_of(model: Any, task: str) -> list[Target]:
    lora = LoraSection(
        r=4,
        task_type=task,  # type: ignore[arg-type]
        exclude_modules=["classifier"] if task == "SEQ_CLS" else None,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if find_stacks(model) else None,
    )
    return select_targets(meta_copy(type(model), model.config), lora, SCHEME.num_triplets).targets


def base_of(model: torch.nn.Module) -> BaseModel:
    return BaseModel(directory=Path(), index={}, model_class=type(model), config=model.config, dtype=torch.float32)


def real_peak_bytes(
    model: torch.nn.Module,
    shapes: dict[str, tuple[int, ...]],
    names: list[str],
    task: str,
    checkpointing: Checkpointing,
) -> int:
    microbatch = padded_microbatch(shapes)
    taps = tapped(model, names, lambda *_: None, checkpointing=checkpointing)

    def backward() -> None:
        LOSSES[task](forward(model, microbatch, torch.device("cpu")), microbatch.inputs["labels"]).backward()

    with taps:
        return peak_of(backward)


def padded_microbatch(shapes: dict[str, tuple[int, ...]]) -> Microbatch:
    """With padding there is a mask in memory."""
    inputs = {name: torch.ones(shape, dtype=torch.long) for name, shape in shapes.items()}
    inputs["attention_mask"][0, -8:] = 0
    return Microbatch(inputs=inputs, num_supervised_tokens=1, index=0, sample_ids=())


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator had out at once meanwhile, from its own trace."""
    with torch.autograd.profiler.profile(profile_memory=True) as trace:
        result = work()
    del result
    assert trace.kineto_results is not None
    changes = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0, "the trace shows no memory"
    return peak


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", *EXPERTS])
def test_a_block_takes_what_the_forecast_says(kind: str) -> None:
    model = make_model(kind).requires_grad_(False)
    task, blocks = TASKS[kind], find_blocks(model)
    assert blocks is not None
    labels = (BATCH,) if task == "SEQ_CLS" else (BATCH, LENGTH)
    shapes = {"input_ids": (BATCH, LENGTH), "attention_mask": (BATCH, LENGTH), "labels": labels}
    targets = targets_of(model, task)
    order = Order(blocks=blocks, why="")
    groups = [[t.name for t in targets if order.stage_of(t.name) == stage] for stage in (blocks.count - 1, 0)]
    forecast = forecast_activations(
        base_of(model),
        shapes,
        [Shown(tuple((name, 0) for name in group)) for group in groups],
        order,
        loss=LOSSES[task],
        checkpointing="none",
        gathers=False,
    )
    assert forecast is not None and forecast.in_blocks is not None
    found = forecast.in_blocks
    measured = real_bytes_in_blocks(model, order, shapes, groups, task)
    assert found.hidden_bytes == measured.hidden_bytes == 4 * BATCH * LENGTH * model.config.hidden_size
    assert found.argument_bytes == pytest.approx(measured.argument_bytes, rel=0.1)
    assert found.forward_bytes == pytest.approx(measured.forward_bytes, rel=0.1)
    assert found.loss_bytes >= 0.9 * measured.loss_bytes, "the comparison of the first logits may take more"
    assert found.backward_bytes == pytest.approx(measured.backward_bytes, rel=0.1)


def real_bytes_in_blocks(
    model: torch.nn.Module, order: Order, shapes: dict[str, tuple[int, ...]], groups: list[list[str]], task: str
) -> InBlocks:
    """The same of real tensors, of the blocks' forward and of the stages of the groups."""
    assert order.blocks is not None
    blocks, microbatch = order.blocks.of(model), padded_microbatch(shapes)
    assert BATCH * LENGTH * 258 < LOGITS_AT_ONCE, "all logits are there at a time"
    stubs = Stubs(model, blocks, torch.device("cpu"))
    stubs.form = Form(None)
    with stubs.installed(), experts_tapped(model):
        found = stubs.enter(microbatch, {})
        hidden, calls = found.hidden, found.calls
        tensors = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for call in calls
            for each in (*call.args, *call.kwargs.values(), *call.kwargs.get("position_embeddings", ()))
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() != hidden.data_ptr()
        }

        def forward_of(index: int) -> object:  # a graph, as in the first chunk
            return stubs.run_block(
                index, hidden.detach().requires_grad_(), calls[index]
            )  # a graph, as in the first chunk

        def backward(names: list[str]) -> int:
            stage = order.stage_of(names[0])
            entry = hidden.detach().requires_grad_(stage > 0)
            gradient = torch.ones_like(hidden)

            def run() -> None:
                stubs.form.hidden(stubs.run_block(stage, entry, calls[stage])).backward(gradient)

            with tapped(model, names, lambda *_: None, checkpointing="none"):
                return peak_of(run)

        def leave() -> None:
            leaf = hidden.detach().requires_grad_()
            LOSSES[task](stubs.leave(microbatch, leaf), microbatch.inputs["labels"]).backward()

        return InBlocks(
            hidden_bytes=hidden.nbytes,
            argument_bytes=sum(tensors.values()),
            forward_bytes=max(peak_of(functools.partial(forward_of, index)) for index in range(order.blocks.count)),
            loss_bytes=peak_of(leave),
            backward_bytes=tuple(map(backward, groups)),
        )
