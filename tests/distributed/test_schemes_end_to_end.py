"""Directions and scales through the whole pipeline, and the scale `peft` against stock PEFT's own initialization."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from builders import byte_tokenizer, config_tree, save_model
from gradient_worker import PROJECTIONS
from launching import INIT, run_ranks, succeed
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("schemes")
    data = root / "data.jsonl"
    generator = torch.Generator().manual_seed(3)
    with data.open("w") as file:  # rows of one length: PEFT averages over batches, not over tokens
        for _ in range(12):
            letters = torch.randint(97, 123, (40,), generator=generator).tolist()
            file.write(json.dumps({"text": "".join(map(chr, letters))}) + "\n")
    return root, save_model(root / "model"), data


def arguments(paths: tuple[Path, Path, Path], name: str, **changes: object) -> tuple[list[str], Path]:
    root, model, data = paths
    tree = config_tree(model, data, root / name)
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        tree.setdefault(section, {})[leaf] = value
    (root / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(root / f"{name}.yaml")], root / name


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "loraga_init" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("direction", "scale"),
    [("ArB2r", "unit"), ("A2rBr", "stable"), ("ArBr", "gd"), ("random", "stable"), ("ArB2r", "weight_svd")],
)
def test_two_ranks_give_the_single_process_factors(paths: tuple, direction: str, scale: str) -> None:
    changes = {
        "init__direction": direction,
        "init__scale": scale,
        "lora__use_rslora": True,
        "lora__rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "lora__alpha_pattern": {"v_proj": 3},
        "lora__target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    alone, alone_out = arguments(paths, f"{direction}-{scale}-1", **changes)
    sharded, sharded_out = arguments(paths, f"{direction}-{scale}-2", **changes)
    assert init_main(alone) == 0
    succeed(run_ranks([INIT, *sharded], 2))
    assert verify(alone_out).ok and verify(sharded_out).ok
    found, expected = adapter(sharded_out), adapter(alone_out)
    assert found["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape[0] == 6
    assert found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 2
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() < 1e-4 * tensor.norm(), key


def test_scale_peft_is_what_stock_peft_computes(paths: tuple) -> None:
    _, model_dir, data = paths
    # r = 16 makes PEFT sketch with the full width of 64, so that its own randomized SVD is exact
    command, out = arguments(paths, "peft", init__scale="peft", lora__r=16)
    assert init_main(command) == 0
    ours = adapter(out)

    tokenizer = byte_tokenizer()
    rows = [tokenizer(json.loads(line)["text"] + "</s>")["input_ids"] for line in data.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def train_step() -> None:
        for row in rows:
            ids = torch.tensor([row])
            model(input_ids=ids, labels=ids).loss.backward()

    config = LoraConfig(
        r=16, lora_alpha=8, target_modules=PROJECTIONS[:-1], init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )  # fmt: skip
    torch.manual_seed(0)
    preprocess_loraga(model, config, train_step)
    stock = get_peft_model(model, config).state_dict()
    checked = 0
    for key, A_RN in ours.items():
        if "lora_A" not in key:
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        prefix = f"base_model.model.{module}"
        stock_A, stock_B = stock[f"{prefix}.lora_A.default.weight"], stock[f"{prefix}.lora_B.default.weight"]
        B_MR = ours[key.replace("lora_A", "lora_B")]
        for found, expected in ((A_RN.T, stock_A.T), (B_MR, stock_B)):
            signs = (found * expected).sum(dim=0).sign()
            assert (found * signs - expected).norm() < 1e-3 * expected.norm(), (
                key,
                (found * signs - expected).norm() / expected.norm(),
            )
        residual = stock[f"{prefix}.base_layer.weight"]
        offset = base[f"{module}.weight"] - residual
        assert (offset.norm() / (0.5 * (stock_B @ stock_A)).norm()).item() == pytest.approx(1, abs=1e-4)
        checked += 1
    assert checked == 21
