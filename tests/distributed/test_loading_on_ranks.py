"""Models on ranks: each reads its own ranges of the checkpoint's tensors, and together they hold the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import save_model
from ranks import run_on_ranks

from loraga_dist.config import ModelConfig
from loraga_dist.errors import UserError
from loraga_dist.model.base import find_base_model
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.world import PeerError, World
from loraga_dist.sharding.base import pretrained
from loraga_dist.sharding.zero3 import Zero3


def load_slices(directory: Path) -> tuple[list[int], dict[str, torch.Tensor]]:
    """This rank's numbers of elements, and the whole model."""
    world = World.start()
    base = find_base_model(ModelConfig(name_or_path=str(directory)), "CAUSAL_LM", world.device)
    stored = base.stored(meta_copy(base.model_class, base.config)).as_it_is
    assert stored is not None, "else transformers loads it on rank 0"
    sharding = Zero3(world, None)
    model = sharding.load(base, stored)
    sizes = [sharding.own_slice(parameter)[0].numel() for parameter in model.parameters()]
    state: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        with sharding.hold([parameter]):
            state[name] = parameter.detach().clone()
    return sizes, state


@pytest.mark.parametrize(
    ("kind", "world_size", "dtype"),
    [
        ("mixtral", 2, torch.float32),
        ("olmoe", 3, torch.float32),
        ("qwen3_moe", 3, torch.bfloat16),
        ("deepseek_v3", 2, torch.bfloat16),
        ("gpt_oss", 3, torch.float32),
        ("granitemoe", 2, torch.bfloat16),
        ("llama", 2, torch.bfloat16),
    ],
)
def test_ranks_hold_what_from_pretrained_loads(kind: str, world_size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(tmp_path, kind, dtype=dtype)
    base = find_base_model(ModelConfig(name_or_path=str(tmp_path)), "CAUSAL_LM", torch.device("cpu"))
    model = pretrained(base)
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    results = run_on_ranks(load_slices, world_size, tmp_path)
    for sizes, state in results:
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        assert max(sizes) < max(parameter.numel() for parameter in model.parameters())
    assert sum(sum(sizes) for sizes, _ in results) == sum(parameter.numel() for parameter in model.parameters())


def refuse(directory: Path) -> str:
    try:
        load_slices(directory)
    except (UserError, PeerError) as error:
        return str(error)
    return ""


def test_another_number_of_experts_is_refused_on_every_rank(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3_moe")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_local_experts": 8', '"num_local_experts": 6'))
    for words in run_on_ranks(refuse, 2, tmp_path):
        assert "gate_up_proj has shape (8, 48, 32), the model's config says (6, 48, 32)" in words
