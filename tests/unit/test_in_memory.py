"""What a training script may hand to `initialize`: the start is the same however it comes, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from builders import TASKS, make_model
from torch import Tensor

import loraga_dist

LORA = {"r": 2, "lora_alpha": 8}
Batch = dict[str, Tensor]


def batches(count: int = 4, size: int = 2) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(97, 123, (count, size, 20), generator=draw)
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def started(data: Any, kind: str = "llama", model: Any = None, **sections: Any) -> Any:
    config = {"lora": {**LORA, "task_type": TASKS[kind]}, "gradient": {"engine": "exact"}}
    return loraga_dist.initialize(make_model(kind) if model is None else model, data, {**config, **sections})


def rows(start: Any) -> dict[str, Tensor]:
    """The projector onto the rows of every A0."""
    bases = {name: torch.linalg.qr(factors.A_RN.double().T).Q for name, factors in start.factors.items()}
    return {name: Q_NR @ Q_NR.T for name, Q_NR in bases.items()}


def assert_same(one: Any, other: Any) -> None:
    found, expected = rows(one), rows(other)
    for name, projector in expected.items():
        assert torch.allclose(found[name], projector, atol=1e-4), name


def test_a_dataloader_may_fill_its_buffers_again() -> None:
    data = batches()
    buffer = {name: torch.empty_like(tensor) for name, tensor in data[0].items()}

    def refilled() -> Iterator[Batch]:
        for batch in data:
            for name, tensor in batch.items():
                buffer[name].copy_(tensor)
            yield buffer

    assert_same(started(refilled()), started(data))


def test_a_script_may_have_float32_multiplied_in_fewer_bits() -> None:
    model, seen = make_model("llama"), set[str]()
    hook = model.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("medium")
    try:
        start = started(batches(), model=model)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        hook.remove()
    assert seen == {"highest"}  # which only some processors show in the logits
    assert start.identity_check.max_abs_logit_diff < 1e-5 * start.identity_check.max_abs_logit
    assert_same(start, started(batches()))


def test_integers_of_any_width_are_labels() -> None:
    data = batches()
    assert_same(started([{name: tensor.int() for name, tensor in batch.items()} for batch in data]), started(data))


CLASSES = {"input_ids": torch.arange(97, 121).view(2, 12), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("kind", "task", "says"),
    [
        ("t5", "CAUSAL_LM", "is of an encoder and a decoder; write SEQ_2_SEQ_LM"),
        ("llama", "SEQ_2_SEQ_LM", "is not of an encoder and a decoder; write CAUSAL_LM"),
        ("llama", "SEQ_CLS", "gives logits of tokens; load it by AutoModelForSequenceClassification"),
        ("bert", "CAUSAL_LM", "generates nothing, as PEFT wants of models for it; write SEQ_CLS for a classifier"),
    ],
)
def test_another_task_is_refused(kind: str, task: str, says: str) -> None:
    data = [CLASSES] if kind == "bert" else batches()
    with pytest.raises(loraga_dist.UserError, match="^lora.task_type: ") as error:
        started(data, kind, lora={**LORA, "task_type": task})
    assert says in str(error.value)


@pytest.mark.parametrize(("kind", "labels", "shape"), [("llama", [0, 1], "[2]"), ("bert", [[0] * 12] * 2, "[2, 12]")])
def test_labels_of_sequences_are_none_of_tokens(kind: str, labels: list[Any], shape: str) -> None:
    task = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}[kind]
    with pytest.raises(loraga_dist.UserError, match="^lora.task_type: ") as error:
        started([CLASSES | {"labels": torch.tensor(labels)}], kind, lora={**LORA, "task_type": task})
    assert f"batch 0 has labels of shape {shape}" in str(error.value)


@pytest.mark.parametrize(
    ("values", "labels", "key", "says"),
    [
        ({"num_labels": 1}, torch.tensor([0.3, 0.4]), "init.scheme", "num_labels 1"),
        ({"problem_type": "regression"}, torch.rand(2, 3), "init.scheme", "problem_type regression"),
        ({"problem_type": None}, torch.eye(3)[:2], "dataloader", "labels that are no integers"),
    ],
)
def test_classifiers_that_tell_no_classes_apart_are_refused(
    values: dict[str, Any], labels: Tensor, key: str, says: str
) -> None:
    model = make_model("bert")
    for name, value in values.items():
        setattr(model.config, name, value)
    with pytest.raises(loraga_dist.UserError, match=f"^{key}: ") as error:
        started([CLASSES | {"labels": labels}], "bert", model)
    assert says in str(error.value)


def test_sequences_without_labels_count_among_inputs_however_they_are_batched() -> None:
    singly = batches(8, size=1)
    for batch in singly[1::2]:
        batch["labels"][:] = -100
    by_two = [
        {name: torch.cat([one[name], other[name]]) for name in one}
        for one, other in zip(singly[::2], singly[1::2], strict=True)
    ]
    init = {"scheme": "rrr", "whitening": "exact"}
    assert_same(started(singly, init=init), started(by_two, init=init))


@pytest.mark.parametrize(
    ("without", "says"), [([3], "searched, have no label"), ([0, 1, 2], "no batch has a label but the last 1")]
)
def test_a_step_is_searched_on_labels_and_from_labels(without: list[int], says: str) -> None:
    data = batches()
    for index in without:
        data[index]["labels"][:] = -100
    with pytest.raises(loraga_dist.UserError, match="^dataloader: 4: ") as error:
        started(data, init={"scheme": "rrr_step"})
    assert says in str(error.value)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "another device": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("scheme", ["lora_ga", "rrr_step", "pissa"])
def test_what_a_script_has_switched_on_changes_nothing(scheme: str, surroundings: str) -> None:
    model, init = make_model("llama"), {"scheme": scheme}
    plain = started(batches(), init=init)
    data = batches()
    with SURROUNDINGS[surroundings]():
        start = started(data, model=model, init=init)
    expected = dict(plain.model.named_parameters())
    for name, parameter in start.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad
    assert start.identity_check == plain.identity_check


def test_a_model_trains_as_before_after_an_error() -> None:
    model: Any = make_model("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    before = [(name, module.training) for name, module in model.named_modules()]
    trainable = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(loraga_dist.RunError, match="the loss is nan"):
        started(batches(), model=model)
    assert [(name, module.training) for name, module in model.named_modules()] == before
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == trainable


def test_a_model_on_several_devices_is_refused() -> None:
    model: Any = make_model("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(loraga_dist.UserError, match="has parameters on cpu and meta; load it whole on one device"):
        started(batches(), model=model)


def test_weights_beside_an_embedding_in_float32_are_judged_by_their_own_rounding() -> None:
    model: Any = make_model("llama").to(torch.bfloat16)
    model.model.embed_tokens.float()
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
    check = started(batches(), model=model).identity_check
    assert check.dtype == "bfloat16" and check.kl_of_rounding is not None
