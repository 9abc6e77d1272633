"""Activations counted without data against a run on real tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import TASKS, llama_config, make_model
from transformers import LlamaForCausalLM

from loraga_dist.config import Checkpointing, LoraSection
from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.forecast.activations import forecast_activations
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.base import BaseModel
from loraga_dist.model.targets import meta_copy, select_targets
from loraga_dist.schemes import SCHEMES

SCHEME = SCHEMES["lora_ga"]
BATCH, LENGTH = 4, 96


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
@pytest.mark.parametrize(("kind", "layers"), [("llama", 3), ("llama", 12), ("t5", 2), ("gpt2", 2), ("bert", 2)])
def test_the_forecast_is_what_a_run_takes(kind: str, layers: int, checkpointing: Checkpointing) -> None:
    model = LlamaForCausalLM(llama_config(num_hidden_layers=layers)).eval() if kind == "llama" else make_model(kind)
    model.requires_grad_(False)
    task = TASKS[kind]
    labels = (BATCH,) if task == "SEQ_CLS" else (BATCH, LENGTH)
    shapes = {"input_ids": (BATCH, LENGTH), "attention_mask": (BATCH, LENGTH), "labels": labels}
    lora = LoraSection(task_type=task, exclude_modules=["score", "classifier"] if task == "SEQ_CLS" else None)  # type: ignore[arg-type]
    targets = select_targets(meta_copy(type(model), model.config), lora, SCHEME.num_triplets).targets
    names = [target.name for target in targets]
    forecast = forecast_activations(
        base_of(model), shapes, names,
        loss=LOSSES[task], checkpointing=checkpointing, gathers=False, sink_bytes=lambda name: 0,
    )  # fmt: skip
    assert forecast is not None
    measured = real_peak_bytes(model, shapes, names, task, checkpointing)
    assert forecast.backward_bytes == pytest.approx(measured, rel=0.1)


def base_of(model: torch.nn.Module) -> BaseModel:
    return BaseModel(directory=Path(), index={}, model_class=type(model), config=model.config, dtype=torch.float32)


def real_peak_bytes(
    model: torch.nn.Module,
    shapes: dict[str, tuple[int, ...]],
    names: list[str],
    task: str,
    checkpointing: Checkpointing,
) -> int:
    """Most bytes that torch's allocator had out at once, from its own trace."""
    inputs = {name: torch.ones(shape, dtype=torch.long) for name, shape in shapes.items()}
    inputs["attention_mask"][0, -8:] = 0  # with padding there is a mask in memory
    microbatch = Microbatch(inputs=inputs, num_supervised_tokens=1, index=0, sample_ids=())
    taps = tapped(model, names, lambda *_: None, checkpointing=checkpointing)
    with torch.autograd.profiler.profile(profile_memory=True) as trace, taps:
        LOSSES[task](forward(model, microbatch, torch.device("cpu")), inputs["labels"]).backward()
    assert trace.kineto_results is not None
    changes = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0, "the trace shows no memory"
    return peak
