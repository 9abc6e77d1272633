"""Quantized checkpoints: every range of every weight is what transformers dequantizes, in every way that it is held."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from quantizing import by_transformers, save_bnb, save_compressed, save_fp8, save_mxfp4
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from loraga_dist.config import Dtype, ModelConfig
from loraga_dist.errors import UserError
from loraga_dist.files.quantized import QuantizedSlot, dequantized
from loraga_dist.files.safetensors_io import scan_checkpoint
from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import DTYPES, BaseModel, find_base_model
from loraga_dist.model.blocks import pieces_of
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.sharding.from_disk import FromDisk
from loraga_dist.sharding.single import SingleProcess

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"}
KINDS: dict[str, Callable[[Path], Path]] = {
    "fp8": save_fp8,
    "fp8 experts": lambda to: save_fp8(to, "deepseek_v3", block=8, scale=torch.float32),
    "mxfp4": save_mxfp4,
    "nf4": lambda to: save_bnb(to, **NF4),
    "nf4 double": lambda to: save_bnb(to, **NF4, **DOUBLE),
    "fp4": lambda to: save_bnb(to, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": lambda to: save_bnb(to, load_in_8bit=True),
    "int4 experts": lambda to: save_compressed(to, "deepseek_v3", "pack-quantized", **INT4),
    "int4 asymmetric": lambda to: save_compressed(to, "llama", "pack-quantized", symmetric=False, **INT4),
    "int8 channel": lambda to: save_compressed(to, "llama", "int-quantized", num_bits=8, strategy="channel"),
    "float8 block": lambda to: save_compressed(
        to, "llama", "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]
    ),
    "float8 tensor": lambda to: save_compressed(
        to, "llama", "float-quantized", num_bits=8, type="float", strategy="tensor"
    ),
}


def stored_in(directory: Path, dtype: Dtype = "auto") -> tuple[BaseModel, Mapping[str, StoredTensor]]:
    base = find_base_model(ModelConfig(name_or_path=str(directory), dtype=dtype), "CAUSAL_LM", torch.device("cpu"))
    stored = base.stored(meta_copy(base.model_class, base.config)).as_it_is
    assert stored is not None
    return base, stored


def read(tensor: StoredTensor, start: int, end: int, dtype: torch.dtype) -> Tensor:
    elements = torch.empty(end - start, dtype=dtype)
    tensor.read_into(start, elements)
    return elements


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_what_transformers_makes_of_it(kind: str, tmp_path: Path) -> None:
    directory = KINDS[kind](tmp_path / "model")
    chance, dtypes = random.Random(0), ("float32", "bfloat16")
    for dtype in dtypes:
        base, stored = stored_in(directory, dtype)
        expected = by_transformers(directory, DTYPES[dtype]).state_dict()
        assert expected.keys() == stored.keys()
        for name, tensor in stored.items():
            assert tensor.shape == expected[name].shape
            whole, ends = expected[name].flatten(), range(tensor.numel + 1)
            for start, end in [(0, tensor.numel), *(sorted(chance.choices(ends, k=2)) for _ in range(3))]:
                assert torch.equal(read(tensor, start, end, whole.dtype), whole[start:end]), name
        quantized = [slot for tensor in stored.values() for slot in tensor.slots if isinstance(slot, QuantizedSlot)]
        assert len(quantized) >= 4 and all(2 * slot.num_bytes < 3 * slot.numel for slot in quantized)

        in_memory, disk = SingleProcess(World.alone()).load(base, stored), FromDisk(World.alone())
        on_disk = disk.load(base, stored)
        assert all(torch.equal(parameter, expected[name]) for name, parameter in in_memory.named_parameters())
        for piece in pieces_of(on_disk):
            with disk.hold(piece.parameters):
                for name, parameter in on_disk.named_parameters():
                    assert parameter not in set(piece.parameters) or torch.equal(parameter, expected[name]), name


def test_layers_of_several_groups_are_each_read_by_their_own(tmp_path: Path) -> None:
    """As Kimi's: attention in 8 bits, the rest in 4."""
    kinds = {"self_attn": "float8 tensor", "mlp": "int4 asymmetric"}
    directories = {part: KINDS[kind](tmp_path / part) for part, kind in kinds.items()}
    tensors, groups = {}, {}
    for part, directory in directories.items():
        held = load_file(directory / "model.safetensors")
        tensors |= {key: tensor for key, tensor in held.items() if f".{part}." in key or "_proj." not in key}
        config = json.loads((directory / "config.json").read_text())
        groups[part] = config["quantization_config"]["config_groups"]["group_0"] | {"targets": [f"re:.*{part}.*"]}
    config["quantization_config"] |= {"format": "mixed-precision", "config_groups": groups}
    both = shutil.copytree(directories["mlp"], tmp_path / "both")
    (both / "config.json").write_text(json.dumps(config))
    save_file(tensors, both / "model.safetensors", {"format": "pt"})
    _, stored = stored_in(both)
    for part, directory in directories.items():
        expected = by_transformers(directory, torch.bfloat16).state_dict()
        for name, tensor in stored.items():
            if f".{part}." in name:
                assert torch.equal(read(tensor, 0, tensor.numel, torch.bfloat16), expected[name].flatten()), name


def test_blocks_may_be_cut_off_at_the_ends(tmp_path: Path) -> None:
    """As those of DeepSeek-V3, which transformers refuses: 112 rows and columns, in blocks of 32."""
    _, stored = stored_in(save_fp8(tmp_path, block=32))
    tensors = load_file(tmp_path / "model.safetensors")
    for end in ("up_proj", "down_proj"):
        name = f"model.layers.0.mlp.{end}.weight"
        codes, scales = tensors[name].float(), tensors[f"{name}_scale_inv"].float()
        expected = torch.stack(
            [
                torch.stack([codes[m, n] * scales[m // 32, n // 32] for n in range(codes.shape[1])])
                for m in range(len(codes))
            ]
        )
        tensor = stored[name]
        assert torch.equal(read(tensor, 0, tensor.numel, torch.float32), expected.flatten())


def test_blocks_of_4_bits_may_reach_over_rows(tmp_path: Path) -> None:
    """Rows of 112 in blocks of 64, which bitsandbytes takes for whole blocks on CPUs."""
    _, stored = stored_in(save_bnb(tmp_path / "model", width=112, load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    packed = tensors[name].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()
    expected = tensors[f"{name}.quant_map"][codes].view(-1, 64) * tensors[f"{name}.absmax"][:, None]
    found = read(stored[name], 0, stored[name].numel, torch.float32)
    assert torch.equal(found, expected.flatten().bfloat16().float()), "rounded to the dtype it was quantized from"


def test_pairs_of_4_bits_are_read(tmp_path: Path) -> None:
    """As DeepSeek-V4's experts: blocks of 32 in a row, exponents for scales; against transformers' own operation."""
    weight = torch.randint(-128, 128, (8, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.randint(120, 130, (8, 2)).to(torch.uint8)
    save_file({"x.weight": weight, "x.scale": scale.view(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    index = scan_checkpoint(tmp_path)
    slot = dequantized(index, {"quant_method": "fp8", "weight_block_size": [128, 128]}, torch.bfloat16)["x.weight"]
    expected = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scale})["weight"]
    assert isinstance(expected, Tensor) and slot.shape == (8, 64)
    assert torch.equal(read(StoredTensor(slot.shape, (slot,)), 0, 8 * 64, torch.bfloat16), expected.flatten())


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    directory = save_fp8(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(weights)
    key = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file(tensors | {key: torch.ones(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"has shape \(3, 3\), which are no blocks of a weight of shape \(64, 64\)"):
        stored_in(directory)
    config.write_text(config.read_text().replace('"fp8"', '"gptq"'))
    with pytest.raises(
        UserError, match="'gptq': is how the checkpoint is quantized, and what can be read is fp8, mxfp4"
    ):
        stored_in(directory)


def test_a_weight_that_is_not_there_is_named(tmp_path: Path) -> None:
    directory = save_fp8(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.self_attn.q_proj.weight"
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{key}': is not in the checkpoint, which is quantized \(fp8\)"):
        stored_in(directory)
