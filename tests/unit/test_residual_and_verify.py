from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraga_dist.artifacts import residual
from loraga_dist.artifacts import verify as verification
from loraga_dist.artifacts.adapter import AdapterFile, rank_and_scaling, write_adapter
from loraga_dist.artifacts.residual import digest_base, finish_residual_base, plan_residual_files, write_residual_files
from loraga_dist.artifacts.verify import VerifyResult, verify
from loraga_dist.errors import UserError
from loraga_dist.files.checksums import check_checksums, fingerprint, write_checksums
from loraga_dist.files.parallel import shares
from loraga_dist.files.safetensors_io import SafetensorsWriter
from loraga_dist.model.base import read_checkpoint_index
from loraga_dist.model.targets import Target, require_targets
from loraga_dist.ranks.world import World

TOKENS = torch.arange(24).view(2, 12) % 50
K = 8


def save_llama(directory: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype=dtype,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (directory / "pytorch_model.bin").write_bytes(b"stale pickle")
    (directory / ".cache").mkdir()
    (directory / ".cache" / "x.json").write_text("{}")
    return directory


def save_gpt2(directory: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, dtype=torch.float32)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def make_target(config: LoraConfig, name: str, M: int, N: int, transposed: bool) -> Target:
    r, lora_alpha, scaling = rank_and_scaling(config, name)
    return Target(
        name=name,
        weight_key=f"{name}.weight",
        M=M,
        N=N,
        r=r,
        lora_alpha=lora_alpha,
        scaling=scaling,
        transposed=transposed,
    )


def llama_targets(config: LoraConfig) -> list[Target]:
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.down_proj": (32, 48)}
    return [
        make_target(config, f"model.layers.{layer}.{module}", M, N, transposed=False)
        for layer in range(2)
        for module, (M, N) in shapes.items()
    ]


def gpt2_targets(config: LoraConfig) -> list[Target]:
    shapes = {"attn.c_attn": (96, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    return [
        make_target(config, f"transformer.h.{layer}.{module}", M, N, transposed=True)
        for layer in range(2)
        for module, (M, N) in shapes.items()
    ]


def lora_config(base: Path) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3},
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )


def write_output(
    base: Path,
    directory: Path,
    make_targets: Callable[[LoraConfig], list[Target]] = llama_targets,
    residual_dtype: str = "auto",
    residual_base: str = "full",
    max_shard_bytes: int = 5 * 10**9,
    world_size: int = 1,
) -> list[Target]:
    """A whole output directory with random factors, written by the code under test."""
    config = lora_config(base)
    targets = make_targets(config)
    generator = torch.Generator().manual_seed(1)
    svd = {
        target.name: torch.linalg.svd(torch.randn(target.M, target.N, generator=generator), full_matrices=False)
        for target in targets
    }

    def factors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        target = next(target for target in targets if target.name == name)
        U_MN, _, Vh_NN = svd[name]
        return 0.3 * Vh_NN[: target.r], 0.3 * U_MN[:, target.r : 2 * target.r]

    write_adapter(directory / "loraga_init", config, targets, factors)
    write_adapter(directory / "loraga_offset", config, targets, factors, negate_b=True)
    write_factors(directory / "factors", svd)

    index = read_checkpoint_index(base)
    require_targets(index, targets)
    if residual_base == "full":
        files = plan_residual_files(index, residual_dtype, max_shard_bytes)
        adapter = AdapterFile(directory / "loraga_init")
        destination = directory / "residual_base"
        digests = {}
        for share in shares(files, lambda file: file.num_bytes, world_size):
            digests |= write_residual_files(share, index, targets, adapter, destination)
        finish_residual_base(base, destination, files, residual_dtype)
        base_digests = {key: pair[0] for key, pair in digests.items()}
        residual_fingerprint = fingerprint({key: pair[1] for key, pair in digests.items()})
    else:
        base_digests, residual_fingerprint = digest_base(index, index), None

    report = {
        "schema_version": 1,
        "config": {
            "model": {"name_or_path": str(base), "revision": None},
            "lora": {"use_dora": False},
            "init": {"scheme": "lora_ga"},
            "output": {"dir": str(directory), "residual_base": residual_base, "residual_dtype": residual_dtype},
        },
        "base_fingerprint": fingerprint(base_digests),
        "residual_fingerprint": residual_fingerprint,
        "targets": {
            target.name: {
                "shape": [target.M, target.N],
                "r": target.r,
                "weight_key": target.weight_key,
                "transposed": target.transposed,
            }
            for target in targets
        },
    }
    write_report(directory, report)
    (directory / "resolved_config.yaml").write_text("model: {}\n")
    (directory / "README.md").write_text("# Output\n")
    write_checksums(directory, World.alone())
    return targets


def write_factors(directory: Path, svd: dict[str, Any]) -> None:
    weight_map = {}
    for number, (name, (U, S, Vh)) in enumerate(svd.items()):
        file = f"factors-{number}.safetensors"
        parts = {f"{name}.U": U[:, :K], f"{name}.S": S[:K], f"{name}.Vh": Vh[:K]}
        with SafetensorsWriter(
            directory / file, {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()}
        ) as writer:
            for key, part in parts.items():
                writer.append(key, part)
        weight_map |= dict.fromkeys(parts, file)
    (directory / "factors.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_report(directory: Path, report: dict[str, Any]) -> None:
    (directory / "loraga_report.json").write_text(json.dumps(report))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), shard_size="20KB")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    write_output(llama, directory, max_shard_bytes=20_000)
    return directory


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "output"))


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
    assert config["base_model_name_or_path"] == str(llama)


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


def test_three_ranks_write_what_one_writes(llama: Path, finished: Path, tmp_path: Path) -> None:
    write_output(llama, tmp_path, max_shard_bytes=20_000, world_size=3)
    files = sorted(path.name for path in (finished / "residual_base").iterdir() if path.is_file())
    assert sum(name.endswith(".safetensors") for name in files) >= 3
    for name in files:
        assert (tmp_path / "residual_base" / name).read_bytes() == (finished / "residual_base" / name).read_bytes()


def test_chunks_do_not_show(llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (residual, verification):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 100)
    write_output(llama, tmp_path, max_shard_bytes=20_000)
    for path in (finished / "residual_base").glob("*.safetensors"):
        assert (tmp_path / "residual_base" / path.name).read_bytes() == path.read_bytes()
    assert verify(tmp_path).ok
    edit(tmp_path, "residual_base", "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.flip(0))
    assert any("roundings away" in problem for problem in verify(tmp_path).problems)


def test_assignment_is_even_and_complete(llama: Path) -> None:
    files = plan_residual_files(read_checkpoint_index(llama), "auto", 8_000)
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


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_accepts_the_checksums(output: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=output, capture_output=True, timeout=60).returncode == 0
    (output / "README.md").write_text("other")
    assert subprocess.run(command, cwd=output, capture_output=True, timeout=60).returncode == 1


def test_checksums_see_changed_missing_and_added_files(output: Path) -> None:
    (output / "README.md").write_text("other")
    (output / "factors" / "factors-0.safetensors").unlink()
    (output / "residual_base" / "adapter_config.json").write_text("{}")
    (output / "notes.txt").write_text("mine")
    assert sorted(check_checksums(output, World.alone())) == [
        "README.md: does not match SHA256SUMS",
        "factors/factors-0.safetensors: is missing",
        "residual_base/adapter_config.json: is not listed in SHA256SUMS",
    ]


def test_verify_accepts_a_finished_directory(llama: Path, output: Path) -> None:
    num_bytes: list[int] = []
    result = verify(output, on_progress=num_bytes.append)
    assert result == VerifyResult([], 6, result.max_rounding_units, residual_checked=True) and result.ok
    assert 0.5 < result.max_rounding_units <= 1
    listed = sum(path.stat().st_size for path in output.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    assert sum(num_bytes) == listed + sum(slot.num_bytes for slot in read_checkpoint_index(llama).values())


def test_verify_with_the_base_elsewhere(llama: Path, output: Path, tmp_path: Path) -> None:
    report = json.loads((output / "loraga_report.json").read_text())
    report["config"]["model"]["name_or_path"] = str(tmp_path / "gone")
    write_report(output, report)
    write_checksums(output, World.alone())
    result = verify(output)
    assert not result.residual_checked and [str(tmp_path / "gone") in problem for problem in result.problems] == [True]
    assert verify(output, base=llama).ok


def test_verify_without_residual_base(llama: Path, tmp_path: Path) -> None:
    write_output(llama, tmp_path / "out", residual_base="none")
    assert verify(tmp_path / "out") == VerifyResult([], 6, 0.0, residual_checked=False)
    other = save_llama(tmp_path / "other", seed=1)
    assert "is not the base" in only(verify(tmp_path / "out", base=other))


def only(result: VerifyResult) -> str:
    assert len(result.problems) == 1, result.problems
    return result.problems[0]


def test_verify_names_another_base(output: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    result = verify(output, base=other)
    assert only(result).startswith(f"base: {other} is not the base") and not result.residual_checked
    bfloat16 = save_llama(tmp_path / "bfloat16", torch.bfloat16)
    assert f"by the base {bfloat16} and the report it is BF16" in only(verify(output, base=bfloat16))


def test_verify_sees_one_flipped_byte_in_any_file(output: Path) -> None:
    dice = random.Random(0)
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    assert len(paths) > 15
    for path in paths:
        content = path.read_bytes()
        position = dice.randrange(len(content))
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert verify(output).problems, (path, position)
        path.write_bytes(content)
    assert verify(output).ok


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_verify_never_raises_for_a_damaged_file_with_fitting_checksums(output: Path) -> None:
    dice = random.Random(0)
    for name in (
        "loraga_report.json",
        "loraga_init/adapter_config.json",
        "loraga_init/adapter_model.safetensors",
        "factors/factors.safetensors.index.json",
        "factors/factors-0.safetensors",
        "residual_base/model.safetensors.index.json",
    ):
        content = (output / name).read_bytes()
        for _ in range(10):
            position = dice.randrange(min(len(content), 2000))
            damaged = bytes([content[position] ^ 1 << dice.randrange(8)])
            (output / name).write_bytes(content[:position] + damaged + content[position + 1 :])
            write_checksums(output, World.alone())
            verify(output)
        (output / name).write_bytes(content)


def test_verify_sees_every_missing_file(output: Path) -> None:
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        assert any(path.name in problem for problem in verify(output).problems), path
        path.write_bytes(content)


def edit(output: Path, part: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor and make the checksums fit again."""
    [path] = [path for path in (output / part).glob("*.safetensors") if key in load_file(path)]
    held = load_file(path)
    held[key] = change(held[key]).contiguous()
    save_file(held, path, {"format": "pt"})
    write_checksums(output, World.alone())


def two_neighbours_up(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    for _ in range(2):
        tensor[3, 5] = torch.nextafter(tensor[3, 5], torch.tensor(torch.inf, dtype=tensor.dtype))
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_verify_sees_one_entry_that_is_off(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_llama(tmp_path / "base", dtype)
    out = tmp_path / "out"
    write_output(base, out)
    key = "model.layers.1.mlp.down_proj.weight"
    edit(out, "residual_base", key, two_neighbours_up)
    problems = verify(out).problems
    assert any(key in problem and "roundings away" in problem for problem in problems)
    assert any("residual_fingerprint" in problem for problem in problems)


def test_verify_sees_a_changed_tensor_that_is_no_target(output: Path) -> None:
    edit(output, "residual_base", "model.norm.weight", lambda tensor: -tensor)
    assert any("model.norm.weight is no target, but differs" in problem for problem in verify(output).problems)


def adapter_key(name: str, side: str) -> str:
    return f"base_model.model.model.layers.{name}.lora_{side}.weight"


def test_verify_sees_factors_of_another_target(output: Path) -> None:
    for part in ("loraga_init", "loraga_offset"):
        path = output / part / "adapter_model.safetensors"
        held = load_file(path)
        for side in "AB":
            first, second = (adapter_key(f"{layer}.mlp.down_proj", side) for layer in range(2))
            held[first], held[second] = held[second], held[first]
        save_file(held, path, {"format": "pt"})
    write_checksums(output, World.alone())
    problems = verify(output).problems
    assert len(problems) == 2 and all("down_proj.weight is" in p and "roundings away" in p for p in problems)


def test_verify_sees_offset_that_is_not_minus_the_init(output: Path) -> None:
    edit(output, "loraga_offset", adapter_key("0.mlp.down_proj", "B"), lambda tensor: -tensor)
    assert "loraga_offset" in only(verify(output)) and "lora_B" in only(verify(output))


def test_verify_sees_another_scaling(output: Path) -> None:
    for part in ("loraga_init", "loraga_offset"):
        path = output / part / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": False}))
    write_checksums(output, World.alone())
    assert len(verify(output).problems) == 6
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    write_checksums(output, World.alone())
    assert any("init_lora_weights true" in problem for problem in verify(output).problems)


def test_verify_sees_another_rank_in_the_report(output: Path) -> None:
    report = json.loads((output / "loraga_report.json").read_text())
    report["targets"]["model.layers.1.mlp.down_proj"]["r"] = 3
    write_report(output, report)
    write_checksums(output, World.alone())
    assert "gives model.layers.1.mlp.down_proj rank 4, loraga_report.json says 3" in verify(output).problems[0]


def test_verify_sees_values_that_are_not_finite(output: Path) -> None:
    edit(output, "loraga_init", adapter_key("0.mlp.down_proj", "A"), lambda tensor: tensor * torch.nan)
    problems = verify(output).problems
    assert any("not finite" in problem for problem in problems)
    assert any("inf roundings" in problem for problem in problems)


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("U", lambda U: U * 1.001, "not orthonormal"),
        ("Vh", lambda Vh: Vh * torch.nan, "not orthonormal"),
        ("S", lambda S: S.flip(0), "descending"),
        ("S", lambda S: S[:-1], "is not U"),
    ],
)
def test_verify_sees_factors_that_are_no_svd(
    output: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor], problem: str
) -> None:
    edit(output, "factors", f"model.layers.0.mlp.down_proj.{part}", change)
    assert problem in only(verify(output))


def test_verify_of_something_else(tmp_path: Path) -> None:
    assert "is this the directory of a finished run" in only(verify(tmp_path))
    write_report(tmp_path, {"schema_version": 2})
    assert "schema_version" in only(verify(tmp_path))
