"""What a training script may hand to `initialize`: the start is the same however it comes, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def test_integers_of_any_width_are_labels() -> None:
    data = batches()
    assert_same(started([{name: tensor.int() for name, tensor in batch.items()} for batch in data]), started(data))


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
