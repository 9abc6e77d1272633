"""The residual base: stock PEFT on it is the original model, whatever its dtype, its files and its chunks."""

from __future__ import annotations

import ast
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from handmade import edit, gpt2_targets, llama_targets, lora_config, save_gpt2, save_llama, write_output
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraga_dist.artifacts import tensors as stored_tensors
from loraga_dist.artifacts.residual import digest_base, plan_model_files
from loraga_dist.artifacts.verify import verify
from loraga_dist.commands.materialize import materialize_base
from loraga_dist.config import InitConfig, ModelConfig, OutputConfig, SchemeConfig
from loraga_dist.errors import UserError
from loraga_dist.files.checksums import fingerprint
from loraga_dist.files.disk import MAX_JSON_BYTES
from loraga_dist.files.parallel import shares
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.model.base import is_model_file, read_checkpoint_index
from loraga_dist.model.targets import require_targets
from loraga_dist.ranks.world import World
from loraga_dist.request.request import understand

TOKENS = torch.arange(24).view(2, 12) % 50


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


def test_stock_peft_on_the_residual_base_is_the_original(llama: Path, finished: Path) -> None:
    original = logits(load(llama))
    residual_model = load(finished / "residual_base")
    assert (logits(residual_model) - original).abs().max() > 1e-2 * original.abs().max()
    adapted = PeftModel.from_pretrained(residual_model, str(finished / "loraga_init"))
    assert (logits(adapted) - original).abs().max() < 1e-5 * original.abs().max()
    config = json.loads((finished / "loraga_init" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 6
    assert config["init_lora_weights"] is True and config["inference_mode"] is True
    assert config["fan_in_fan_out"] is False
    assert config["base_model_name_or_path"] == str(finished / "residual_base")


def test_merging_the_offset_rebuilds_the_residual_base(llama: Path, finished: Path) -> None:
    merged = PeftModel.from_pretrained(load(llama), str(finished / "loraga_offset")).merge_and_unload().state_dict()
    for key, tensor in tensors(finished / "residual_base").items():
        assert torch.allclose(merged[key], tensor, rtol=0, atol=1e-6), key


def test_conv1d(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path / "base")
    write_output(base, tmp_path / "out", gpt2_targets)
    original = logits(load(base))
    adapted = PeftModel.from_pretrained(load(tmp_path / "out" / "residual_base"), str(tmp_path / "out" / "loraga_init"))
    assert (logits(adapted) - original).abs().max() < 1e-5 * original.abs().max()
    assert json.loads((tmp_path / "out" / "loraga_init" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    result = verify(tmp_path / "out")
    assert result.problems == [] and result.residual_checked and result.num_targets == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_one_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_llama(tmp_path / "base", dtype)
    targets = write_output(base, tmp_path / "out")
    original, written = tensors(base), tensors(tmp_path / "out" / "residual_base")
    adapter = load_file(tmp_path / "out" / "loraga_init" / "adapter_model.safetensors")
    offset_model = PeftModel.from_pretrained(load(base), str(tmp_path / "out" / "loraga_offset"))
    merged = offset_model.merge_and_unload().state_dict()
    for target in targets:
        A, B = (adapter[f"base_model.model.{target.name}.lora_{side}.weight"].double() for side in "AB")
        exact = original[target.weight_key].double() - target.lora_alpha / target.r**0.5 * B @ A
        stored = written.pop(target.weight_key)
        assert stored.dtype == dtype
        # nothing representable lies nearer than what was stored
        for direction in (torch.inf, -torch.inf):
            neighbour = torch.nextafter(stored, torch.full_like(stored, direction)).double()
            slack = 1e-6 * exact.abs()
            assert ((stored.double() - exact).abs() <= (neighbour - exact).abs() + slack).all()
        merged_weight = merged[target.weight_key].double()
        largest = torch.stack([stored.double().abs(), original[target.weight_key].double().abs()]).amax(0)
        offset = (exact - original[target.weight_key].double()).abs()
        # PEFT rounds the product and then the sum
        assert ((merged_weight - stored.double()).abs() <= torch.finfo(dtype).eps * (largest + offset)).all()
    assert written and all(torch.equal(tensor, original[key]) for key, tensor in written.items())
    result = verify(tmp_path / "out")
    assert result.problems == [] and 0.9 < result.max_rounding_units < 1.001


def test_residual_dtype_casts_the_whole_model(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.bfloat16)
    config_path = base / "config.json"
    config = json.loads(config_path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config_path.write_text(json.dumps(config | {"text_config": {"torch_dtype": "bfloat16"}, "other_config": {"x": 1}}))
    write_output(base, tmp_path / "out", residual_dtype="float32")
    residual_dir = tmp_path / "out" / "residual_base"
    assert {tensor.dtype for tensor in tensors(residual_dir).values()} == {torch.float32}
    written = json.loads((residual_dir / "config.json").read_text())
    assert written["dtype"] == "float32" and "torch_dtype" not in written
    assert written["text_config"] == {"dtype": "float32"} and written["other_config"] == {"x": 1}
    assert verify(tmp_path / "out").problems == []


def test_value_out_of_range_names_the_remedy(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"output.residual_dtype: 'float16': cannot hold values of model.norm.weight"):
        write_output(base, tmp_path / "out", residual_dtype="float16")


def test_only_what_a_model_needs_is_copied(llama: Path, finished: Path) -> None:
    names = {
        path.relative_to(finished / "residual_base").as_posix() for path in (finished / "residual_base").rglob("*")
    }
    weights = {name for name in names if name.startswith("model-")}
    assert names - weights == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "additional_chat_templates",
        "additional_chat_templates/tool.jinja",
        "model.safetensors.index.json",
    }
    for name in ("config.json", "tokenizer.json"):
        assert (finished / "residual_base" / name).read_bytes() == (llama / name).read_bytes()


def test_the_files_of_every_tokenizer_are_copied() -> None:
    """Those that the tokenizers of transformers name, read from its source: importing all would take every library."""
    names: set[str] = set()
    for path in Path(transformers.__file__).parent.rglob("*token*.py"):
        assigned = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assign)]
        constants = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assigned}
        for node in assigned:
            if ast.unparse(node.targets[0]).lower() == "vocab_files_names" and isinstance(node.value, ast.Dict):
                values = [ast.unparse(value) for value in node.value.values]
                names |= {ast.literal_eval(constants.get(value, value)) for value in values}
    assert {"tokenizer.json", "source.spm", "bpe.codes", "prophetnet.tokenizer"} <= names
    assert [name for name in sorted(names) if not is_model_file(name)] == []


@pytest.mark.parametrize("name", ["tokenizer.model", "additional_chat_templates"])
def test_a_link_out_of_the_model_is_refused_before_the_work(
    llama: Path, finished: Path, tmp_path: Path, name: str
) -> None:
    """Its target's content would be in the output, and on the hub with it."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shutil.rmtree(model / "additional_chat_templates")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.json").write_text("{}")
    (model / name).symlink_to(tmp_path / "elsewhere" / ("secret.json" if name.endswith(".model") else ""))
    problem = f"{name}.* is a link out of it, to {tmp_path}/elsewhere/secret.json; put a copy in the link's place"
    with pytest.raises(UserError, match=problem):
        materialize_base(finished, to=tmp_path / "out", base=model)
    config = InitConfig(model=ModelConfig(name_or_path=str(model)), output=OutputConfig(dir=str(tmp_path / "out")))
    with pytest.raises(UserError, match=problem):
        understand(config, World.alone(), reads_data=False)
    assert not (tmp_path / "out").exists()
    assert understand(config.model_copy(update={"init": SchemeConfig(scheme="kaiming")}), World.alone()), "no copy"


@pytest.mark.parametrize(
    ("name", "num_bytes", "problem"),
    [
        ("notes.txt", MAX_JSON_BYTES + 1, "notes.txt has more than 268435456 bytes and would be copied; move it out"),
        ("a\\b.txt", 1, "cannot be written into a list of files; give it another"),
        ("a\nb.txt", 1, "cannot be written into a list of files; give it another"),
        (os.fsdecode(b"\xff.txt"), 1, "cannot be written into a list of files; give it another"),
    ],
)
def test_a_file_that_cannot_be_copied_is_refused_before_the_work(
    llama: Path, tmp_path: Path, name: str, num_bytes: int, problem: str
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    with (model / name).open("wb") as file:
        file.truncate(num_bytes)
    config = InitConfig(model=ModelConfig(name_or_path=str(model)), output=OutputConfig(dir=str(tmp_path / "out")))
    with pytest.raises(UserError, match=problem):
        understand(config, World.alone(), reads_data=False)


def test_links_inside_a_hub_cache_and_inside_the_model_are_copied(llama: Path, finished: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--company--llama"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in llama.iterdir() if path.is_file()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (snapshot / "vocab.txt").symlink_to("config.json")
    residual = materialize_base(finished, to=tmp_path / "out", base=snapshot)
    assert not any(path.is_symlink() for path in residual.iterdir())
    assert (residual / "vocab.txt").read_bytes() == (llama / "config.json").read_bytes()
    (tmp_path / "other").touch()
    (snapshot / "merges.txt").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="merges.txt is a link out of it"):
        materialize_base(finished, to=tmp_path / "again", base=snapshot)


def test_three_ranks_write_what_one_writes(llama: Path, finished: Path, tmp_path: Path) -> None:
    write_output(llama, tmp_path, max_shard_bytes=20_000, world_size=3)
    files = sorted(path.name for path in (finished / "residual_base").iterdir() if path.is_file())
    assert sum(name.endswith(".safetensors") for name in files) >= 3
    for name in files:
        assert (tmp_path / "residual_base" / name).read_bytes() == (finished / "residual_base" / name).read_bytes()


def test_chunks_do_not_show(llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "CHUNK_ELEMENTS", 100)
    write_output(llama, tmp_path, max_shard_bytes=20_000)
    for path in (finished / "residual_base").glob("*.safetensors"):
        assert (tmp_path / "residual_base" / path.name).read_bytes() == path.read_bytes()
    assert verify(tmp_path).ok
    edit(tmp_path, "residual_base", "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.flip(0))
    assert any("roundings away" in problem for problem in verify(tmp_path).problems)


def test_assignment_is_even_and_complete(llama: Path) -> None:
    files = plan_model_files(entries_of(read_checkpoint_index(llama)), 8_000)
    dealt = shares(files, lambda file: file.num_bytes, 3)
    assert sorted(file.name for share in dealt for file in share) == sorted(file.name for file in files)
    loads = [sum(file.num_bytes for file in share) for share in dealt]
    assert max(loads) - min(loads) <= max(file.num_bytes for file in files)
    assert shares(files[:1], lambda file: file.num_bytes, 3) == [files[:1], [], []]


def test_fingerprint_does_not_depend_on_the_split(llama: Path, tmp_path: Path) -> None:
    single = save_llama(tmp_path / "single")
    indexes = read_checkpoint_index(llama), read_checkpoint_index(single)
    assert len({slot.path for slot in indexes[0].values()}) > 1
    first, second = (fingerprint(digest_base(index, index)) for index in indexes)
    assert first == second
    other = read_checkpoint_index(save_llama(tmp_path / "other", seed=1))
    assert fingerprint(digest_base(other, other)) != first


def test_targets_that_the_checkpoint_does_not_hold(llama: Path) -> None:
    index = read_checkpoint_index(llama)
    target = llama_targets(lora_config(llama))[1]
    with pytest.raises(UserError, match="is not in the checkpoint"):
        require_targets(index, [replace(target, weight_key="x")])
    with pytest.raises(UserError, match="has shape"):
        require_targets(index, [replace(target, transposed=True)])
    quantized = replace(index[target.weight_key], dtype=torch.float8_e4m3fn)
    with pytest.raises(UserError, match="F8_E4M3; write the path of an unquantized checkpoint"):
        require_targets({target.weight_key: quantized}, [target])


def test_scaling_is_what_peft_gives(llama: Path) -> None:
    config = lora_config(llama)
    config.target_modules = {"q_proj", "v_proj", "down_proj"}  # type: ignore[assignment]
    model: Any = PeftModel(load(llama), config)
    targets = llama_targets(config)
    assert len({(target.r, target.lora_alpha) for target in targets}) == 3
    for target in targets:
        layer = model.base_model.model.get_submodule(target.name)
        assert (layer.r["default"], layer.scaling["default"]) == (target.r, target.scaling)
