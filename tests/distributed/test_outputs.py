"""Output directories of 1, 2 and 4 ranks and every model family, against autograd, torch.linalg.svd, stock PEFT."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import TASKS, byte_tokenizer, config_tree, make_model, save_data, save_model
from launching import INIT, ROOT, run, succeed
from outputs import IDS, make_output, read_adapter, read_products, read_report, relative, write_config
from peft import PeftModel
from pieces import autograd_gradients, microbatches_of
from safetensors.torch import load_file, save_file

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import main

R, ALPHA, GAMMA = 4, 8, 16
AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class Case:
    """One way to run: what is unusual about it is its id."""

    kind: str = "llama"
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    shards: bool = True
    keys: str = "own"
    """`bare`: GPT-2's checkpoint without the language-model prefix; `legacy`: BERT's norms as gamma and beta, which
    transformers renames as it loads."""
    overrides: tuple[str, ...] = ()


CASES = {
    "llama-1": Case(),
    "llama-1-zero3": Case(overrides=("--deepspeed", str(ROOT / "configs/deepspeed/zero3_offload_cpu.json"))),
    "llama-1-seed": Case(overrides=("--init.seed", "7")),
    "llama-1-single-file": Case(shards=False),
    "llama-2": Case(world_size=2),
    "llama-2-few-at-a-time": Case(world_size=2, overrides=("--gradient.max_targets_in_flight", "3")),
    "llama-4": Case(world_size=4),
    "llama-1-sketch": Case(overrides=("--gradient.engine", "sketch")),
    "llama-2-sketch": Case(world_size=2, overrides=("--gradient.engine", "sketch")),
    "llama-1-bf16": Case(dtype=torch.bfloat16),
    "llama-2-bf16": Case(world_size=2, dtype=torch.bfloat16),
    "llama-2-fp16": Case(world_size=2, dtype=torch.float16),
    "tied-1": Case("tied"),
    "tied-2": Case("tied", 2),
    "gpt2-1": Case("gpt2"),
    "gpt2-2": Case("gpt2", 2),
    "gpt2-2-bare": Case("gpt2", 2, keys="bare"),
    "t5-1": Case("t5"),
    "t5-2": Case("t5", 2),
    "bart-1": Case("bart", overrides=("--lora.modules_to_save", "[classification_head]")),
    "bart-2": Case("bart", 2, overrides=("--lora.modules_to_save", "[classification_head]")),
    "bert-1": Case("bert"),
    "bert-2": Case("bert", 2),
    "bert-1-bf16": Case("bert", dtype=torch.bfloat16),
    "bert-2-legacy": Case("bert", 2, keys="legacy"),
}


@dataclass(frozen=True)
class Run:
    case: Case
    base: Path
    data: Path
    out: Path

    @property
    def report(self) -> dict[str, Any]:
        return read_report(self.out)


def rename_norms(base: Path) -> None:
    def legacy(key: str) -> str:
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    for path in base.glob("*.safetensors"):
        save_file({legacy(key): tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {legacy(key): name for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by case id, each made once, when first asked for."""
    root, made = tmp_path_factory.mktemp("outputs"), {}

    def get(name: str) -> Run:
        if name not in made:
            case = CASES[name]
            base = root / f"{case.kind}-{case.dtype}-{case.shards}-{case.keys}".replace("torch.", "")
            data, out = root / f"{case.kind}.jsonl", root / name
            if not base.exists():
                if case.keys == "bare":
                    make_model(case.kind).transformer.save_pretrained(base)
                    byte_tokenizer().save_pretrained(base)
                else:
                    save_model(base, case.kind, dtype=case.dtype, shards=case.shards)
                if case.keys == "legacy":
                    rename_norms(base)
            save_data(data, TASKS[case.kind], rows=21)
            tree = config_tree(base, data, out, kind=case.kind, r=R)
            make_output(tree, case.world_size, *case.overrides, forked="--deepspeed" in case.overrides)
            made[name] = Run(case, base, data, out)
        return made[name]

    return get


def require_same_start(run: Run, reference: Run, bar: float) -> None:
    found, expected = read_products(run.out), read_products(reference.out)
    assert found.keys() == expected.keys()
    for target, product in expected.items():
        assert relative(found[target], product) < bar, target


def example(kind: str) -> dict[str, torch.Tensor]:
    ids = IDS.clone()
    if kind == "bart":
        ids[:, -1] = 257
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if kind == "t5" else {"input_ids": ids}


@pytest.mark.parametrize("name", CASES)
def test_stock_peft_starts_at_the_original(runs: Any, name: str) -> None:
    run = runs(name)
    auto = AUTO[TASKS[run.case.kind]]
    original = auto.from_pretrained(run.base).eval()
    model = PeftModel.from_pretrained(
        auto.from_pretrained(run.out / "residual_base"), run.out / "loraga_init", is_trainable=True
    ).eval()
    with torch.no_grad():
        expected = original(**example(run.case.kind)).logits.float()
        found = model(**example(run.case.kind)).logits.float()
    bar = 1e-5 if run.case.dtype == torch.float32 else 3e-2
    assert (found - expected).abs().max() < bar * expected.abs().max()
    with model.disable_adapter(), torch.no_grad():
        shifted = (model(**example(run.case.kind)).logits.float() - expected).abs().max()
    assert shifted > 100 * 1e-5 * expected.abs().max(), "the residual base alone must differ: else nothing was tested"
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(lora) == 2 * len(run.report["targets"]) and all(p.requires_grad for p in lora.values())
    assert all(p.abs().max() > 0 for p in lora.values())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_merging_the_offset_gives_the_residual(runs: Any, name: str) -> None:
    run = runs(name)
    auto = AUTO[TASKS[run.case.kind]]
    merged = PeftModel.from_pretrained(auto.from_pretrained(run.base), run.out / "loraga_offset").merge_and_unload()
    residual = auto.from_pretrained(run.out / "residual_base").state_dict()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, residual[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_directory_verifies_and_keeps_the_contract(runs: Any, name: str) -> None:
    run = runs(name)
    assert verify(run.out).problems == []
    report = run.report
    assert {
        "schema_version", "config", "base_fingerprint", "data_fingerprint", "versions", "world_size", "engine",
        "num_sequences", "num_supervised_tokens", "seconds", "peak_bytes_per_rank", "planned_peak_bytes_per_rank",
        "state_bytes_per_rank", "targets", "identity_check", "stopped_by", "split_half_cosine", "warnings",
    } <= report.keys()  # fmt: skip
    assert set(report["seconds"]) == {"load", "calibrate", "factorize", "write", "total"}
    assert report["world_size"] == run.case.world_size == len(report["peak_bytes_per_rank"])
    check = report["identity_check"]
    assert check["max_abs_logit_diff"] < (1e-5 if check["dtype"] == "float32" else 5e-2) * check["max_abs_logit"]
    owners = {target["owner_rank"] for target in report["targets"].values()}
    assert owners == set(range(run.case.world_size))
    for target in report["targets"].values():
        assert 0 < target["captured_energy"] <= 1 + 1e-6
        assert len(target["singular_values"]) == 2 * R
    assert (run.out / "residual_base" / "tokenizer.json").exists()
    assert not list(run.out.parent.glob(".*partial*"))


def test_factors_are_those_of_the_reference_gradient(runs: Any) -> None:
    run = runs("llama-1")
    gradients, products = autograd_gradients(run.base, microbatches_of(run.base, run.data)), read_products(run.out)
    for name, target in run.report["targets"].items():
        G_MN = gradients[name]
        U, S, Vh = torch.linalg.svd(G_MN.double(), full_matrices=False)
        expected = U[:, R : 2 * R] @ Vh[:R] * (G_MN.shape[0] ** 0.5 / GAMMA)
        # products of vectors from different triplets: each keeps an unknown sign pair, so compare term by term
        found = products[name]
        projected = (U[:, R : 2 * R].T @ found @ Vh[:R].T).diagonal().sign()
        assert relative(found, (U[:, R : 2 * R] * projected) @ Vh[:R] * (G_MN.shape[0] ** 0.5 / GAMMA)) < 1e-4, name
        assert abs(expected.norm() - found.norm()) < 1e-4 * expected.norm()
        torch.testing.assert_close(torch.tensor(target["singular_values"]), S[: 2 * R].float(), rtol=1e-4, atol=0)
        captured = (S[: 2 * R].square().sum() / S.square().sum()).item()
        assert target["captured_energy"] == pytest.approx(captured, abs=1e-5)


@pytest.mark.parametrize("name", ["llama-1-seed", "llama-1-single-file", "llama-2", "llama-2-few-at-a-time", "llama-4"])
def test_seeds_ranks_and_layouts_agree(runs: Any, name: str) -> None:
    reference, run = runs("llama-1"), runs(name)
    require_same_start(run, reference, 1e-4)
    for field in ("base_fingerprint", "data_fingerprint", "num_supervised_tokens"):
        assert run.report[field] == reference.report[field]


@pytest.mark.parametrize("name", ["llama-2-sketch", "llama-2-bf16", "bert-2"])
def test_rebuilding_under_the_same_settings_changes_nothing(runs: Any, name: str, tmp_path: Path) -> None:
    run = runs(name)
    assert main(["rebuild", str(run.out), "--to", str(tmp_path / "again")]) == 0
    for adapter in ("loraga_init", "loraga_offset"):
        file = f"{adapter}/adapter_model.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (run.out / file).read_bytes()


@pytest.mark.parametrize("kind", ["tied", "gpt2", "t5", "bert", "bart"])
def test_families_agree_between_one_and_two_ranks(runs: Any, kind: str) -> None:
    require_same_start(runs(f"{kind}-2"), runs(f"{kind}-1"), 1e-3)


def test_checkpoint_keys_without_prefix_load_the_same(runs: Any) -> None:
    require_same_start(runs("gpt2-2-bare"), runs("gpt2-2"), 1e-3)


def test_conv1d_scales_by_its_output_dimension(runs: Any) -> None:
    run = runs("gpt2-1")
    target = run.report["targets"]["transformer.h.0.attn.c_attn"]
    assert target["shape"] == [144, 48] and target["transposed"]
    A_RN = read_adapter(run.out)["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
    torch.testing.assert_close(A_RN.norm(dim=1), torch.full((R,), 144**0.25 / GAMMA**0.5), rtol=1e-5, atol=0)


def test_a_deepspeed_section_needs_no_launcher(tmp_path: Path) -> None:
    tree = config_tree(save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl"), tmp_path / "out")
    config = write_config(tree | {"deepspeed": {"zero_optimization": {"stage": 3}}})
    succeed(run([sys.executable, INIT, "--config", str(config)]))
    assert verify(tmp_path / "out").problems == []


def test_each_phase_is_said_with_what_it_has_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl")
    make_output(config_tree(base, data, tmp_path / "out"))
    said = capsys.readouterr().err
    expected = [
        r"read: 24 sequences, 21 targets in \d+\.\d s; 1 rank on CPU",
        r"adapters: [\d.]+ k of [\d.]+ k parameters \(\d+\.\d %\); without adapter: .*embeddings [\d.]+ k.*",
        r"plan: 12 microbatches per rank, \d[\d.e-]* to \d[\d.e-]* seconds of arithmetic; model order",
        r"load weights: [\d.]+kB",
        "calibrate: 12 microbatches",
        r"calibrate: 12 microbatches in \d+\.\d s",
        r"write: [\d.]+kB in \d+\.\d s",
        r"verify: [\d.]+[kM]B in \d+\.\d s",
    ]
    at = [re.search(rf"^{line}$", said, flags=re.MULTILINE) for line in expected]
    assert all(at), said
    assert sorted(at, key=lambda found: found.start() if found else 0) == at, said
