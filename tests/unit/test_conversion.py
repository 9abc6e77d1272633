"""Where parameters lie in checkpoints, held against what from_pretrained loads, for families that it makes of parts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MOE, TASKS, make_model, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BartForConditionalGeneration, DeepseekV4ForCausalLM

from loraga_dist.config import ModelConfig
from loraga_dist.errors import UserError
from loraga_dist.files.safetensors_io import TensorSlot
from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import BaseModel, find_base_model
from loraga_dist.model.conversion import StoredModel, require_ties, require_whole, stored_model
from loraga_dist.model.targets import meta_copy
from loraga_dist.sharding.base import pretrained

EXPERTS = "model.layers.1.mlp.experts"


def places(stored: StoredModel) -> dict[str, tuple[str, int]]:
    """The parameter that every tensor of the checkpoint is in, and its first element there."""
    return {
        slot.name: (name, start)
        for name, tensor in stored.tensors.items()
        for slot, start in zip(tensor.slots, tensor.starts, strict=False)
    }


def find(directory: Path, kind: str = "llama") -> tuple[BaseModel, StoredModel]:
    base = find_base_model(ModelConfig(name_or_path=str(directory)), TASKS[kind], torch.device("cpu"))
    return base, base.stored(meta_copy(base.model_class, base.config))


def read(stored: StoredTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    elements = torch.empty(stored.numel, dtype=dtype)
    stored.read_into(0, elements)
    return elements.view(stored.shape)


def change(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Edit the tensors of a checkpoint of one file."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.mark.parametrize("kind", [*MOE, "llama", "tied", "gpt2", "t5", "bert", "bart"])
def test_everything_lies_where_transformers_takes_it_from(kind: str, tmp_path: Path) -> None:
    base, stored = find(save_model(tmp_path, kind), kind)
    assert stored.as_it_is == stored.tensors
    model = pretrained(base)
    state = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in stored.tensors}
    assert state.keys() == stored.tensors.keys()
    for name, tensor in state.items():
        assert stored.tensors[name].shape == tensor.shape
        assert torch.equal(read(stored.tensors[name]), tensor), name
    assert places(stored).keys() == base.index.keys()
    for key, (name, start) in places(stored).items():  # the other way round
        part = state[name].flatten()[start:][: base.index[key].numel]
        assert torch.equal(base.index[key].read().flatten(), part), key


def test_rows_of_fused_experts_are_found_in_their_files(tmp_path: Path) -> None:
    """Of 12 experts, whose numbers are not in the order of their letters."""
    base, stored = find(save_model(tmp_path, "olmoe"), "olmoe")
    gate_up = stored.tensors[f"{EXPERTS}.gate_up_proj"]
    keys = [f"{EXPERTS}.{e}.{part}.weight" for e in range(12) for part in ("gate_proj", "up_proj")]
    assert (gate_up.shape, [slot.name for slot in gate_up.slots]) == ((12, 48, 32), keys)
    assert places(stored)[f"{EXPERTS}.11.up_proj.weight"][1] == (11 * 48 + 24) * 32
    assert places(stored)[f"{EXPERTS}.2.down_proj.weight"][1] == 2 * 32 * 24
    first_row = (10 * 48 + 20) * 32  # of expert 10: the last rows of gate, the first of up
    found = [(slot.name, first, past) for slot, first, past in gate_up.pieces(first_row, first_row + 10 * 32)]
    assert found == [(keys[20], 20 * 32, 24 * 32), (keys[21], 0, 6 * 32)]
    assert any(len({slot.path for slot in tensor.slots}) > 1 for tensor in stored.tensors.values()), "in several files"


def test_any_range_is_read_and_cast(mixtral: Path) -> None:
    _, stored = find(mixtral)
    tensor = stored.tensors[f"{EXPERTS}.gate_up_proj"]
    whole = read(tensor).flatten()
    chance = random.Random(0)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(50):
            start, end = sorted(chance.choices(range(tensor.numel + 1), k=2))
            elements = torch.empty(end - start, dtype=dtype)
            tensor.read_into(start, elements)
            assert torch.equal(elements, whole[start:end].to(dtype))


def test_parts_of_several_dtypes_are_read(tmp_path: Path) -> None:
    def half_of_them(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: value.bfloat16() for key, value in tensors.items() if "w1" in key})

    base, stored = find(change(save_model(tmp_path, "mixtral", shards=False), half_of_them))
    name = f"{EXPERTS}.gate_up_proj"
    assert torch.equal(read(stored.tensors[name]), pretrained(base).get_parameter(name))


def test_the_base_of_a_model_is_found_without_its_prefix(tmp_path: Path) -> None:
    """As transformers loads it: only the head is missing."""
    model: Any = make_model("mixtral")
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    base, stored = find(tmp_path)
    assert config["architectures"] == ["MixtralModel"]
    assert (stored.lacking, stored.changed, stored.as_it_is) == (["lm_head.weight"], [], None)
    with pytest.raises(UserError, match=r"'lm_head.weight': the checkpoint lacks it; write one that holds the whole"):
        require_whole(meta_copy(base.model_class, base.config), stored)
    assert torch.equal(read(stored.tensors[f"{EXPERTS}.down_proj"]), model.get_parameter(f"{EXPERTS}.down_proj"))
    assert stored.key_of("model.layers.1.mlp.gate.weight") == "layers.1.block_sparse_moe.gate.weight"


def test_experts_that_are_fused_in_the_file_are_one_tensor(tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    save_model(tmp_path, "qwen3_moe", shards=False)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    _, stored = find(tmp_path)
    assert stored.key_of(f"{EXPERTS}.gate_up_proj") == f"{EXPERTS}.gate_up_proj"
    assert torch.equal(read(stored.tensors[f"{EXPERTS}.down_proj"]), model.get_parameter(f"{EXPERTS}.down_proj"))


def test_names_that_only_look_like_those_of_files_are_kept() -> None:
    """DeepSeek-V4 calls `norm.weight` in its files what is `kv_norm.weight` in memory, and has a `norm.weight`, too."""
    config = AutoConfig.for_model("deepseek_v4", num_hidden_layers=2)
    meta_model = meta_copy(DeepseekV4ForCausalLM, config)
    index = {
        name: TensorSlot(name, Path("model.safetensors"), torch.float32, tuple(tensor.shape), 0, 4 * tensor.numel())
        for name, tensor in meta_model.state_dict().items()
    }
    stored = stored_model(meta_model, index)
    assert stored.as_it_is is not None
    assert {name: stored.key_of(name) for name in stored.tensors} == dict(zip(index, index, strict=True))


@pytest.mark.parametrize("missing", ["3.w1", "0.w3", "7.w1"])
def test_a_missing_expert_is_named(missing: str, tmp_path: Path) -> None:
    key = f"model.layers.1.block_sparse_moe.experts.{missing}.weight"
    change(save_model(tmp_path, "mixtral", shards=False), lambda tensors: tensors.__delitem__(key))
    with pytest.raises(UserError, match=rf"{EXPERTS}\.gate_up_proj': the checkpoint lacks experts\.{missing}\.weight"):
        find(tmp_path)


def test_fewer_experts_than_the_config_says_have_another_shape(tmp_path: Path) -> None:
    def without_the_last(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".experts.7." in key]:
            del tensors[key]

    _, stored = find(change(save_model(tmp_path, "mixtral", shards=False), without_the_last))
    assert stored.tensors[f"{EXPERTS}.gate_up_proj"].shape == (7, 48, 32)


def test_a_stack_of_unequal_experts_is_left_to_transformers(tmp_path: Path) -> None:
    def transpose_one(tensors: dict[str, Tensor]) -> None:
        key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
        tensors[key] = tensors[key].t().contiguous()

    _, stored = find(change(save_model(tmp_path, "mixtral", shards=False), transpose_one))
    assert (stored.changed, stored.as_it_is) == ([f"{EXPERTS}.down_proj"], None)


def test_tensors_that_transformers_cuts_are_left_to_it(tmp_path: Path) -> None:
    """HRM's gate and up are one tensor in its files and two in memory."""
    config = AutoConfig.for_model(
        "hrm_text", vocab_size=258, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, pad_token_id=256, bos_token_id=257, eos_token_id=257,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base, stored = find(tmp_path)
    assert stored.as_it_is is None
    assert not stored.tensors.keys() & set(stored.changed)
    for part in ("mlp.gate_proj", "mlp.up_proj", "self_attn.v_proj"):
        assert f"model.L_module.layers.0.{part}.weight" in stored.changed
    require_whole(meta_copy(base.model_class, base.config), stored)


@pytest.mark.parametrize("kind", ["bart", "tied"])
def test_what_transformers_does_without_is_not_missing(kind: str, tmp_path: Path) -> None:
    """A buffer that the class says it need not find, and a tied parameter under its other name."""
    model: Any = make_model(kind)
    model = BartForConditionalGeneration(model.config) if kind == "bart" else model
    name, others = ("final_logits_bias", []) if kind == "bart" else ("model.embed_tokens.weight", ["lm_head.weight"])
    model.save_pretrained(tmp_path)

    def move(tensors: dict[str, Tensor]) -> None:
        tensors.update(dict.fromkeys(others, tensors.pop(name)))

    base, stored = find(change(tmp_path, move), "t5" if kind == "bart" else kind)
    assert stored.lacking == [name]
    require_whole(meta_copy(base.model_class, base.config), stored)
    expected, found = model.state_dict(), pretrained(base).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_has_no_tensor_of_its_own_has_no_key(mixtral: Path) -> None:
    _, stored = find(mixtral)
    assert stored.key_of("model.layers.1.mlp.gate.weight") == "model.layers.1.block_sparse_moe.gate.weight"
    for name, why in (
        (f"{EXPERTS}.gate_up_proj", "transformers makes it of other tensors of the checkpoint"),
        ("model.layers.9.mlp.gate.weight", "has no tensor of this name, so its residual cannot be written"),
    ):
        with pytest.raises(UserError, match=why):
            stored.key_of(name)


def test_tied_names_that_are_both_stored_must_be_one_tensor(tmp_path: Path) -> None:
    """transformers unties them where they differ, whatever the config says."""

    def require() -> None:
        base, stored = find(tmp_path, "tied")
        require_ties(meta_copy(base.model_class, base.config), stored, base.dtype)

    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def change_last(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"][-1, -1] += 1

    save_model(tmp_path, "tied", shards=False)
    require()
    with pytest.raises(UserError, match="modules_to_save: 'lm_head.weight': is tied to model.embed_tokens.weight"):
        find(tmp_path, "tied")[1].key_of("lm_head.weight")
    change(tmp_path, add_head)
    require()
    assert find(tmp_path, "tied")[1].key_of("lm_head.weight") == "lm_head.weight"
    change(tmp_path, change_last)
    with pytest.raises(UserError, match=r"'lm_head.weight': is another tensor .*: false there"):
        require()
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    require()
    base, stored = find(tmp_path, "tied")
    assert torch.equal(read(stored.tensors["lm_head.weight"]), pretrained(base).get_parameter("lm_head.weight"))
