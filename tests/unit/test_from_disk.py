"""Weights that stay in the checkpoint's files: what is held is what from_pretrained loads, and little else is there."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import llama_config, save_model
from launching import run
from safetensors.torch import save_file
from torch.nn import Parameter
from transformers import LlamaForCausalLM

from loraga_dist.config import Dtype, LoraSection, ModelConfig
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.safetensors_io import read_header
from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import BaseModel, find_base_model
from loraga_dist.model.blocks import find_blocks, pieces_of
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import pretrained
from loraga_dist.sharding.from_disk import FromDisk
from loraga_dist.sharding.single import SingleProcess
from loraga_dist.start.identity import flip_last_bits
from loraga_dist.start.place import add_adapter

IDS = torch.arange(40, 72)[None]
KINDS = ["llama", "tied", "gpt2", "mixtral", "deepseek_v3", "gpt_oss"]


@dataclass(frozen=True)
class Pair:
    """The same model on disk and in memory."""

    base: BaseModel
    disk: FromDisk
    model: Any
    in_memory: Any

    @property
    def blocks(self) -> list[list[Parameter]]:
        blocks = find_blocks(self.model)
        assert blocks is not None
        return [list(block.parameters()) for block in blocks.of(self.model)]

    @property
    def outside(self) -> list[Parameter]:
        """Tied ones twice."""
        return [parameter for piece in pieces_of(self.model)[len(self.blocks) :] for parameter in piece.parameters]

    def assert_same(self) -> None:
        """Of all parameters, read piece by piece."""
        expected, seen = dict(self.in_memory.named_parameters()), set()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for piece in pieces_of(self.model):
            with self.disk.hold(piece.parameters):
                for parameter in piece.parameters:
                    wanted = expected[names[parameter]]
                    assert parameter.dtype == wanted.dtype and torch.equal(parameter, wanted), names[parameter]
                    seen.add(names[parameter])
        assert seen == expected.keys()


def load(directory: Path, dtype: Dtype = "auto") -> Pair:
    base = find_base_model(ModelConfig(name_or_path=str(directory), dtype=dtype), "CAUSAL_LM", torch.device("cpu"))
    disk = FromDisk(World.alone())
    model = disk.load(base, stored_in(base))
    return Pair(base, disk, model, pretrained(base).requires_grad_(False).eval())


def stored_in(base: BaseModel) -> Mapping[str, StoredTensor] | None:
    return base.stored(meta_copy(base.model_class, base.config)).as_it_is


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several files, float32."""
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
        assert not thread.is_alive(), thread


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_holds_what_from_pretrained_loads(saved: Path, dtype: Dtype) -> None:
    pair = load(saved, dtype)
    assert len(list(saved.glob("*.safetensors"))) > 1
    assert [name for name, _ in pair.model.named_parameters()] == [n for n, _ in pair.in_memory.named_parameters()]
    assert not pair.model.training and not any(parameter.requires_grad for parameter in pair.model.parameters())
    pair.assert_same()
    buffers = dict(pair.model.named_buffers())
    for name, expected in pair.in_memory.named_buffers():
        assert buffers[name].dtype == expected.dtype and torch.equal(buffers[name], expected), name
    assert len(buffers) == len(dict(pair.in_memory.named_buffers()))


def test_parameters_have_shapes_and_no_memory(saved: Path) -> None:
    pair = load(saved, "bfloat16")
    for name, parameter in pair.model.named_parameters():
        assert parameter.shape == pair.in_memory.get_parameter(name).shape
        assert parameter.untyped_storage().nbytes() == torch.bfloat16.itemsize
    with pair.disk.hold(pair.model.parameters()):
        held = {parameter.untyped_storage().data_ptr() for parameter in pair.model.parameters()}
        assert len(held) == 1, "one buffer"
    assert all(parameter.untyped_storage().nbytes() == 2 for parameter in pair.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passing_gives_the_same_logits(saved: Path, dtype: Dtype) -> None:
    pair = load(saved, dtype)
    with torch.no_grad(), pair.disk.passing(pieces_of(pair.model)):
        logits = pair.model(input_ids=IDS).logits
    assert torch.equal(logits, pair.in_memory(input_ids=IDS).logits)


def test_bytes_read_are_counted(llama: Path) -> None:
    pair = load(llama)
    model_bytes = sum(parameter.nbytes for parameter in pair.in_memory.parameters())
    assert pair.disk.num_bytes_read == 0
    with torch.no_grad(), pair.disk.passing(pieces_of(pair.model)):
        pair.model(input_ids=IDS)
    assert pair.disk.num_bytes_read == model_bytes


def test_reading_ahead_gives_the_same(saved: Path) -> None:
    """Also beside others that are held, and when what was read ahead is not what comes next. All is read once."""
    pair = load(saved)
    first, second, *_ = pair.blocks
    outside = pair.outside
    names = {parameter: name for name, parameter in pair.model.named_parameters()}

    def check(parameters: list[Parameter]) -> None:
        for parameter in parameters:
            assert torch.equal(parameter, pair.in_memory.get_parameter(names[parameter])), names[parameter]

    with pair.disk.hold(outside, then=first):
        with pair.disk.hold(first, then=second):
            check(first)
        with pair.disk.hold(second):
            check(second)
        check(outside)
    read = [*first, *second, *dict.fromkeys(outside)]
    assert pair.disk.num_bytes_read == sum(parameter.nbytes for parameter in read)
    with pair.disk.hold(first, then=second):
        with pair.disk.hold(outside):
            check([*first, *outside])
        check(first)
    with pair.disk.hold(first, then=outside):
        with pair.disk.hold([*first, *second]):
            check(second)
        check(first)
    with pair.disk.hold(second):
        check(second)
    with pair.disk.hold(outside):
        check(outside)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edits_are_made_whenever_a_weight_is_read(saved: Path, dtype: Dtype) -> None:
    """As in memory bit by bit: each is rounded once."""
    pair, memory = load(saved, dtype), SingleProcess(World.alone())
    meta_model = meta_copy(pair.base.model_class, pair.base.config)
    section = LoraSection(r=2, target_modules=r".*attn\.\w+_proj|.*\.c_\w+")
    targets = select_targets(meta_model, section, lambda r: r).targets
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):
        for target in targets:
            A_RN, B_MR = (torch.randn(shape, generator=draw) for shape in ((2, target.N), (target.M, 2)))
            for sharding, model in ((pair.disk, pair.model), (memory, pair.in_memory)):
                sharding.subtract_lowrank(model.get_parameter(target.parameter_name), target, A_RN, B_MR)
        if dtype == "bfloat16":
            flip_last_bits(pair.model, targets, pair.disk)
            flip_last_bits(pair.in_memory, targets, memory)
    pair.assert_same()
    pair.assert_same()
    weights = [[model.get_parameter(it.parameter_name) for it in targets] for model in (pair.model, pair.in_memory)]
    alone = [[target] for target in targets]
    of_disk, of_memory = (
        sharding.square_norms(list(zip(own, alone, strict=True)))
        for sharding, own in ((pair.disk, weights[0]), (memory, weights[1]))
    )
    assert torch.equal(of_disk, of_memory)
    for target, on_disk, expected in zip(targets, *weights, strict=True):
        assert torch.equal(pair.disk.weight_on(on_disk, target, 0), expected)


def test_an_edit_after_reading_ahead_is_seen(llama: Path) -> None:
    pair = load(llama)
    first, second, *_ = pair.blocks
    with pair.disk.hold(first, then=second):
        pair.disk.edit(second[0], lambda elements, start: elements.zero_())
        with pytest.raises(AssertionError, match="held"):
            pair.disk.edit(first[0], lambda elements, start: elements.zero_())
    with pair.disk.hold(second):
        assert not second[0].any() and second[1].any()


def test_an_adapter_is_in_memory(saved: Path) -> None:
    pair = load(saved)
    lora = LoraSection(r=2, target_modules="all-linear")
    meta_model = meta_copy(pair.base.model_class, pair.base.config)
    targets = select_targets(meta_model, lora, lambda r: r).targets
    on_disk = add_adapter(pair.model, lora, targets, pair.disk)
    in_memory = add_adapter(pair.in_memory, lora, targets, SingleProcess(World.alone()))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in on_disk.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad and parameter.is_contiguous() and not ("lora_B" in name and parameter.any())
            values = torch.randn(parameter.shape, generator=draw)
            pair.disk.put(parameter, values)
            pair.disk.edit(parameter, lambda elements, start: elements.mul_(2))
            in_memory.get_parameter(name).data.copy_(2 * values)
        else:
            assert parameter.untyped_storage().nbytes() == parameter.dtype.itemsize, name
    with torch.no_grad(), pair.disk.passing(pieces_of(pair.model)):
        logits = on_disk(input_ids=IDS).logits
    assert torch.equal(logits, in_memory(input_ids=IDS).logits)


def test_parameters_that_a_class_wants_in_float32_are(llama: Path) -> None:
    class Careful(LlamaForCausalLM):
        _keep_in_fp32_modules_strict = ["layers.*.mlp.gate_proj", "input_layernorm"]

    plain = find_base_model(ModelConfig(name_or_path=str(llama)), "CAUSAL_LM", torch.device("cpu"))
    base = replace(plain, model_class=Careful)
    disk = FromDisk(World.alone())
    pair = Pair(base, disk, disk.load(base, stored_in(base)), pretrained(base))
    assert {parameter.dtype for parameter in pair.in_memory.parameters()} == {torch.float32, torch.bfloat16}
    pair.assert_same()


def test_buffers_of_the_checkpoint_are_read(llama: Path) -> None:
    class WithBuffer(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("bias", torch.zeros(3))

    plain = find_base_model(ModelConfig(name_or_path=str(llama)), "CAUSAL_LM", torch.device("cpu"))
    save_file({"bias": torch.arange(3.0)}, llama / "buffer.safetensors")
    base = replace(plain, model_class=WithBuffer, index=plain.index | read_header(llama / "buffer.safetensors"))
    model = FromDisk(World.alone()).load(base, stored_in(base))
    assert torch.equal(model.get_buffer("bias"), torch.arange(3, dtype=torch.bfloat16))


def test_weights_that_do_not_fit_are_refused(llama: Path) -> None:
    base = find_base_model(ModelConfig(name_or_path=str(llama)), "CAUSAL_LM", torch.device("cpu"))
    stored = stored_in(base)
    assert stored is not None
    with pytest.raises(UserError, match="transformers has to convert its tensors"):
        FromDisk(World.alone()).load(base, None)
    name = "model.norm.weight"
    wrong = {**stored, name: replace(stored[name], shape=(8, 8))}
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(8, 8\), the model's config says \(64,\)"):
        FromDisk(World.alone()).load(base, wrong)


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    """By the hold that wants it, also where a thread had read ahead; others go on."""
    pair = load(save_model(tmp_path))
    path = pair.base.index["model.layers.1.mlp.down_proj.weight"].path
    blocks = pair.blocks
    with pair.disk.hold(blocks[0]):
        expected = blocks[0][0].detach().clone()
    with path.open("r+b") as file:
        file.truncate(1000)
    with pair.disk.hold(blocks[0], then=blocks[1]):
        pass
    message = rf"{path} ended at byte \d+, within .*it changed during the run"
    for _ in range(2):
        with pytest.raises(RunError, match=message), pair.disk.hold(blocks[1], then=blocks[0]):
            raise AssertionError("not to be reached")
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in pair.model.parameters())
    with pair.disk.hold(blocks[0]):
        assert torch.equal(blocks[0][0], expected)


MEMORY = """
import sys
from pathlib import Path
import torch
from loraga_dist.config import ModelConfig
from loraga_dist.model.base import find_base_model
from loraga_dist.model.blocks import find_blocks, pieces_of
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.sharding.from_disk import FromDisk

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

base = find_base_model(ModelConfig(name_or_path=sys.argv[1]), "CAUSAL_LM", torch.device("cpu"))
stored = base.stored(meta_copy(base.model_class, base.config)).as_it_is
import transformers.initialization  # code counts for little, but not for nothing
start = anonymous_bytes()
disk = FromDisk(World.alone())
model = disk.load(base, stored)
loaded = anonymous_bytes()
layers = list(model.model.layers)
highest = 0
for _ in range(3):
    for block, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        with disk.hold(block.parameters(), then=following.parameters()):
            highest = max(highest, anonymous_bytes())
block_bytes = sum(parameter.nbytes for parameter in layers[0].parameters())
print(block_bytes, loaded - start, highest - start)
disk.hold(layers[0].parameters(), then=layers[2].parameters()).__enter__()
"""


def test_memory_is_that_of_two_blocks(tmp_path: Path) -> None:
    """And a process ends as it should while a thread reads."""
    config = llama_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=16, num_key_value_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="20MB")
    finished = run([sys.executable, "-c", MEMORY, str(tmp_path)])
    assert (finished.code, finished.stderr) == (0, "")
    block_bytes, loaded_bytes, highest_bytes = map(int, finished.stdout.split())
    assert block_bytes > 4 * 10**6
    assert loaded_bytes < block_bytes
    assert highest_bytes < 3 * block_bytes
