"""Starts of quantized checkpoints as they ship, against those of the same numbers as floats, and in stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, save_data
from outputs import (
    EXPERTS,
    causal_lm,
    line_of,
    logits_of,
    make_output,
    make_outputs,
    read_adapter,
    relative,
    write_config,
)
from peft import PeftModel
from quantizing import by_transformers, save_bnb, save_compressed, save_floats, save_fp8, save_mxfp4
from training import batches, train

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main, main
from loraga_dist.ranks.world import World

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
SAVED: dict[str, Callable[[Path], Path]] = {
    "nf4": lambda to: save_bnb(to, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp8": lambda to: save_fp8(to, "deepseek_v3", block=8),
    "mxfp4": save_mxfp4,
    "int4": lambda to: save_compressed(to, "llama", "pack-quantized", **INT4),
}
"""nf4 and int4 are of a llama, the others of mixtures of experts."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantized")
    save_data(directory / "data.jsonl", rows=8)
    for kind, save in SAVED.items():
        save(directory / kind)
    return directory


def tree(root: Path, model: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A start that leaves the base alone, in float32, where ranks give what one process gives."""
    lora = {"target_parameters": EXPERTS} if model.name.startswith(("mxfp4", "fp8")) else {}
    sections = {"init": {"scheme": "rrr"}, "lora": lora} | sections
    found = config_tree(model, root / "data.jsonl", root / name, **sections)
    found["model"]["dtype"] = "float32"
    return found


@pytest.fixture(scope="module")
def outs(root: Path) -> dict[str, Path]:
    return {kind: make_output(tree(root, root / kind, f"{kind}-alone")) for kind in SAVED}


@pytest.mark.parametrize("kind", SAVED)
def test_the_start_is_that_of_the_same_numbers_as_floats(root: Path, outs: dict[str, Path], kind: str) -> None:
    floats = save_floats(root / kind, root / f"{kind}-floats")
    expected = read_adapter(make_output(tree(root, floats, f"{kind}-of-floats")))
    found = read_adapter(outs[kind])
    assert found.keys() == expected.keys() and verify(outs[kind]).ok
    for key, tensor in expected.items():
        # a matrix that is not quantized is bfloat16 in the one, and its factors too
        assert torch.equal(found[key], tensor) or torch.equal(found[key], tensor.bfloat16().float()), key
    assert not (outs[kind] / "residual_base").exists()
    adapter = json.loads((outs[kind] / "loraga_init" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(root / kind)


def test_a_dtype_of_residuals_changes_no_quantized_target(root: Path, outs: dict[str, Path]) -> None:
    """It has none; init, rebuild and verify round its factors alike."""
    rounded = make_output(tree(root, root / "nf4", "nf4-rounded", output={"residual_dtype": "bfloat16"}))
    assert main(["rebuild", str(rounded), "--to", str(root / "nf4-rebuilt")]) == 0
    for out in (rounded, root / "nf4-rebuilt"):
        assert verify(out).ok
        found = read_adapter(out)
        assert all(torch.equal(found[key], tensor) for key, tensor in read_adapter(outs["nf4"]).items())


def test_two_ranks_give_what_one_process_gives(root: Path, outs: dict[str, Path]) -> None:
    kinds = ("nf4", "fp8")
    trees = [tree(root, root / kind, f"{kind}-shared") for kind in kinds]
    for kind, out in zip(kinds, make_outputs(trees, 2), strict=True):
        assert verify(out).ok
        found = read_adapter(out)
        for key, tensor in read_adapter(outs[kind]).items():
            assert not tensor.any() and not found[key].any() or relative(found[key], tensor) < 1e-3, key


@pytest.mark.parametrize("kind", SAVED)
def test_stock_peft_starts_at_the_base_and_trains(outs: dict[str, Path], root: Path, kind: str) -> None:
    # an nf4 base stays as it is
    base = causal_lm(root / kind) if kind == "nf4" else by_transformers(root / kind, torch.float32)
    model = PeftModel.from_pretrained(base, outs[kind] / "loraga_init", is_trainable=True)
    with model.disable_adapter():
        expected = logits_of(model)
    assert torch.equal(logits_of(model), expected)
    losses = train(model, batches(0, 1, World.alone()) * 10, World.alone())
    assert losses[-1] < losses[0] - 0.01


def test_what_would_change_quantized_weights_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = "and those of the checkpoint are quantized (fp8); write"
    others = "lora_one, rrr, rrr_step, kaiming"
    down_proj = {"target_modules": ["up_proj"], "modules_to_save": ["down_proj"]}
    for section, changes, message in (
        ("init", {"scheme": "pissa"}, f"init.scheme: 'pissa': changes the base's weights, {held} rrr, or another that "
         f"leaves them alone ({others})"),
        ("lora", {"use_dora": True}, f"lora.use_dora: True: starts from norms of the base's weights, {held} false"),
        ("lora", down_proj, "lora.modules_to_save: 'model.layers.0.mlp.down_proj.weight': is quantized in the "
         "checkpoint; leave it out"),
    ):  # fmt: skip
        refused = write_config(tree(root, root / "fp8", "refused", **{section: changes}))
        assert init_main(["--config", str(refused)]) == 2
        assert line_of(capsys) == f"loraga-dist: {message}"
