"""Trained adapters on the original base: against stock PEFT, a float64 product and the exact SVD."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from builders import TASKS, config_tree, conversion, save_data, save_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loraga_dist.cli import init_main, main
from loraga_dist.commands.convert import VLLM_LORA_RANKS, how_to_serve

GOLDEN = Path(__file__).parents[1] / "golden"
R = 4
AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class Case:
    kind: str = "llama"
    dtype: torch.dtype = torch.float32
    lora: tuple[tuple[str, Any], ...] = ()


CASES = {
    "plain": Case(),
    "rslora": Case(lora=(("use_rslora", True),)),
    "patterns": Case(
        lora=(
            ("use_rslora", True),
            ("rank_pattern", {"layers.0.self_attn.q_proj": 2, "down_proj": 6}),
            ("alpha_pattern", {"v_proj": 3}),
        )
    ),
    "conv1d": Case("gpt2"),
    "bf16": Case(dtype=torch.bfloat16),
    "saved-head": Case(lora=(("target_modules", ["q_proj", "down_proj"]), ("modules_to_save", ["lm_head"]))),
    "head": Case(lora=(("target_modules", ["q_proj", "lm_head"]),)),
    "classifier": Case("bert", lora=(("target_modules", ["query", "value"]),)),
}


@dataclass(frozen=True)
class Trained:
    """An output directory, the adapter trained from it, and the model it was trained in."""

    case: Case
    base: Path
    out: Path
    adapter: Path
    model: Any
    """The trained PeftModel, as it came out of training."""

    def update(self, name: str) -> torch.Tensor:
        """s B A - s0 B0 A0 of one target, (M, N), float64, from PEFT's own layers."""
        layer = self.model.base_model.model.get_submodule(name)
        start, scaling = load_file(self.out / "loraga_init" / "adapter_model.safetensors"), layer.scaling["default"]
        A0, B0 = (start[f"base_model.model.{name}.lora_{kind}.weight"].double() for kind in "AB")
        A, B = (getattr(layer, f"lora_{kind}")["default"].weight.detach().double() for kind in "AB")
        return scaling * (B @ A - B0 @ A0)

    @property
    def targets(self) -> dict[str, Any]:
        return json.loads((self.out / "loraga_report.json").read_text())["targets"]

    def load(self, directory: Path) -> Any:
        return AUTO[TASKS[self.case.kind]].from_pretrained(directory).eval()

    def convert(self, *arguments: object) -> int:
        words = ["--init", self.out / "loraga_init", "--trained", self.adapter, *arguments]
        return main(["convert", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Cases by name, each trained once, when first asked for."""
    root, made = tmp_path_factory.mktemp("convert"), {}

    def get(name: str) -> Trained:
        if name not in made:
            made[name] = train(CASES[name], root / name)
        return made[name]

    return get


def train(case: Case, root: Path) -> Trained:
    task = TASKS[case.kind]
    base = save_model(root / "base", case.kind, dtype=case.dtype)
    data = save_data(root / "data.jsonl", task)
    config = root / "config.yaml"
    tree = config_tree(base, data, root / "out", kind=case.kind, r=R, lora={"task_type": task, **dict(case.lora)})
    config.write_text(yaml.safe_dump(tree))
    assert init_main(["--config", str(config)]) == 0

    residual = AUTO[task].from_pretrained(root / "out" / "residual_base")
    model: Any = PeftModel.from_pretrained(residual, root / "out" / "loraga_init", is_trainable=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    torch.manual_seed(0)
    for _ in range(6):
        ids = torch.randint(0, 250, (4, 24))
        labels = ids[:, 0] % 3 if task == "SEQ_CLS" else ids
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(root / "trained")
    return Trained(case, base, root / "out", root / "trained", model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).view(2, 20) % 250).logits.float()


def without(base: Path, copy: Path, key: str) -> Path:
    """The same model, this key left out of its config.json."""
    config = json.loads((shutil.copytree(base, copy) / "config.json").read_text())
    del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def factors(directory: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    stored = load_file(directory / "adapter_model.safetensors")
    return tuple(stored[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")  # type: ignore[return-value]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_the_update_survives_to_rounding(trained: Callable[[str], Trained], name: str, tmp_path: Path) -> None:
    run = trained(name)
    assert run.convert("--to", tmp_path / "plain") == 0
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.base)
    assert config["lora_alpha"] == config["r"] == max(2 * target["r"] for target in run.targets.values())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    concatenated = []
    for target in run.targets:
        A, B = factors(tmp_path / "plain", target)
        update = run.update(target)
        assert len(A) == config["r"]
        assert relative(B.double() @ A.double(), update) < 1e-6, target
        assert relative(B.bfloat16().double() @ A.bfloat16().double(), update) < 5e-3, target
        A0, B0 = factors(run.out / "loraga_init", target)
        A, B = factors(run.adapter, target)
        s = run.model.base_model.model.get_submodule(target).scaling["default"]
        stacked = torch.cat([B, -B0], dim=1).bfloat16().double() @ torch.cat([A, A0]).bfloat16().double()
        concatenated.append(relative(s * stacked, update))
    assert max(concatenated) > 5e-3, "PEFT's way must lose more in 16 bits: else the factorization is not needed"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_stock_peft_on_the_original_base_is_the_trained_model(
    trained: Callable[[str], Trained], name: str, tmp_path: Path
) -> None:
    run = trained(name)
    assert run.convert("--to", tmp_path / "plain", "--merge", tmp_path / "merged") == 0
    expected = logits(run.model)
    size = expected.abs().max()
    assert (logits(run.load(run.base)) - expected).abs().max() > 1e-2 * size, "training changed nothing"
    converted = PeftModel.from_pretrained(run.load(run.base), tmp_path / "plain").eval()
    assert (logits(converted) - expected).abs().max() < 1e-5 * size
    assert (logits(run.load(tmp_path / "merged")) - expected).abs().max() < 1e-5 * size
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (run.base / "tokenizer.json").read_bytes()


def test_a_trained_copy_of_tied_embeddings_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("tied", lora=(("target_modules", ["q_proj"]), ("modules_to_save", ["embed_tokens"])))
    run = train(case, tmp_path)
    capsys.readouterr()
    short = without(run.base, tmp_path / "short", "vocab_size")  # Gemma3's says its vocabulary nowhere
    assert run.convert("--merge", tmp_path / "merged", "--base", short) == 2
    assert "the base ties it to lm_head.weight; merge with PEFT's merge_and_unload" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert run.convert("--to", tmp_path / "plain") == 0
    converted = PeftModel.from_pretrained(run.load(run.base), tmp_path / "plain").eval()
    expected = logits(run.model)
    assert (logits(converted) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_trained_head_is_merged_where_the_class_ties_nothing(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    run = trained("saved-head")
    silent = without(run.base, tmp_path / "silent", "tie_word_embeddings")
    assert run.convert("--merge", tmp_path / "merged", "--base", silent) == 0
    expected = logits(run.model)
    assert (logits(run.load(tmp_path / "merged")) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_adapter_of_another_start_is_noticed(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    assert run.convert("--to", tmp_path / "plain") == 0
    assert "wrong" not in capsys.readouterr().err
    shutil.copytree(run.out, tmp_path / "moved")
    other = tmp_path / "other" / "loraga_init"
    shutil.copytree(run.out / "loraga_init", other)
    shutil.copy(run.out / "loraga_report.json", other.parent)
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other.with_name("residual_base"))
    (other / "adapter_config.json").write_text(json.dumps(config))
    words = ["--trained", str(run.adapter), "--to"]
    assert main(["convert", "--init", str(tmp_path / "moved" / "loraga_init"), *words, str(tmp_path / "a")]) == 0
    assert "wrong" not in capsys.readouterr().err
    assert main(["convert", "--init", str(other), *words, str(tmp_path / "b")]) == 0
    assert "trained from another start, the result is wrong" in capsys.readouterr().err


def test_the_converted_adapter_names_the_commit_of_its_base(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("plain")
    shutil.copytree(run.out / "loraga_init", tmp_path / "start" / "loraga_init")
    report = json.loads((run.out / "loraga_report.json").read_text())
    report["config"]["model"] |= {"name_or_path": "company/base", "revision": "abc123"}
    (tmp_path / "start" / "loraga_report.json").write_text(json.dumps(report))
    words = ["convert", "--init", str(tmp_path / "start" / "loraga_init"), "--trained", str(run.adapter), "--to"]
    assert main([*words, str(tmp_path / "plain")]) == 0
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("company/base", "abc123")


def test_a_merged_model_in_16_bits_is_rounded_once(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("bf16")
    assert run.convert("--merge", tmp_path / "merged") == 0
    base, merged = (run.load(directory).state_dict() for directory in (run.base, tmp_path / "merged"))
    for target in run.targets:
        exact = base[f"{target}.weight"].double() + run.update(target)
        assert merged[f"{target}.weight"].dtype == torch.bfloat16
        assert torch.equal(merged[f"{target}.weight"], exact.float().bfloat16()), target


def refused_by_vllm(config: dict[str, Any], max_lora_rank: int) -> list[str]:
    """What `PEFTHelper.validate_legal` of vLLM 0.33 has against an adapter config, by key."""
    falsy = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    found = [key for key in falsy if config.get(key)]
    found += [] if set(config["modules_to_save"] or []) <= {"classifier", "score"} else ["modules_to_save"]
    found += [] if config["init_lora_weights"] is True else ["init_lora_weights"]
    found += [] if config["bias"] == "none" else ["bias"]
    return found + ([] if 0 < max([config["r"], *config["rank_pattern"].values()]) <= max_lora_rank else ["r"])


@pytest.mark.parametrize("name", CASES)
def test_servers_take_the_adapter_with_the_printed_flags(
    trained: Callable[[str], Trained], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(name)
    assert run.convert("--to", tmp_path / "plain") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("serve: ")]
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    if name == "saved-head":
        assert said == ["serve: vLLM and SGLang take no modules_to_save; use --merge"]
        assert refused_by_vllm(config, 512) == ["modules_to_save"]
        return
    words = said[0].split()
    flag = int(words[words.index("--max-lora-rank") + 1])
    allowed = json.loads((GOLDEN / "trainer_keys.json").read_text())["vllm"]["max_lora_rank"]
    assert words[1:4] == ["vllm", "serve", str(run.base)] and "--enable-lora" in words
    assert words[-2:] == ["--lora-modules", f"tuned={tmp_path / 'plain'}"]
    assert flag == min(rank for rank in allowed if rank >= config["r"])
    assert refused_by_vllm(config, flag) == []
    # SGLang 0.5 scales by lora_alpha / r whatever else the config says
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert (len(said) == 2) == (name != "classifier")
    assert all(f"--max-lora-rank {config['r']} " in line and "sglang" in line for line in said[1:])


def test_ranks_that_servers_allow() -> None:
    allowed = json.loads((GOLDEN / "trainer_keys.json").read_text())["vllm"]["max_lora_rank"]
    assert list(VLLM_LORA_RANKS) == allowed
    for r, flag in ((1, 1), (2, 8), (8, 8), (9, 16), (129, 256), (257, 320), (321, 512)):
        assert f"--max-lora-rank {flag} " in how_to_serve(Path("a"), conversion(r=r))[0]
    assert "use --rank or --merge" in how_to_serve(Path("a"), conversion(r=513))[0]


def test_what_is_typed_names_revision_and_code_and_is_quoted() -> None:
    found = conversion(base="/data/my base", revision="abc", trust_remote_code=True, r=8)
    for line in how_to_serve(Path("/runs/a b"), found):
        words = shlex.split(line)
        assert {"/data/my base", "--trust-remote-code", "tuned=/runs/a b"} < set(words)
        assert words[words.index("--revision") + 1] == "abc"
    assert how_to_serve(Path("a"), conversion(r=8, task_type="SEQ_2_SEQ_LM")) == []


def test_truncation_is_the_best_of_its_rank(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    assert run.convert("--to", tmp_path / "small", "--rank", 3) == 0
    said = capsys.readouterr().out
    kept, total = {}, {}
    for target in run.targets:
        update = run.update(target)
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        A, B = factors(tmp_path / "small", target)
        assert relative(B.double() @ A.double(), U[:, :3] * S[:3] @ Vh[:3]) < 1e-6, target
        kept[target], total[target] = S[:3].square().sum().item(), S.square().sum().item()
    worst = min(run.targets, key=lambda target: kept[target] / total[target])
    assert f"kept energy {sum(kept.values()) / sum(total.values()):.6f}" in said
    assert f"least {kept[worst] / total[worst]:.6f} in {worst}" in said
    assert "--max-lora-rank 8" in said


def test_trainers_key_layouts_and_dtypes(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("saved-head")
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    named = {}
    for key, tensor in tensors.items():
        if "lora_" in key:
            named[key.replace(".weight", ".default.weight")] = tensor
        else:
            named[key.replace("lm_head.", "lm_head.modules_to_save.default.")] = tensor
            named[key.replace("lm_head.", "lm_head.original_module.")] = torch.zeros_like(tensor)
    raw = shutil.copytree(run.adapter, tmp_path / "raw")
    save_file(named, raw / "adapter_model.safetensors")
    assert run.convert("--to", tmp_path / "one") == run.convert("--to", tmp_path / "two", "--trained", raw) == 0
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_16_bit_adapters_are_converted_as_they_are(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    coarse = shutil.copytree(run.adapter, tmp_path / "coarse")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(coarse / "adapter_model.safetensors").items()}
    save_file(tensors, coarse / "adapter_model.safetensors")
    assert run.convert("--to", tmp_path / "plain", "--trained", coarse) == 0
    assert "stored in BF16" in capsys.readouterr().err
    target = next(iter(run.targets))
    (A, B), (A0, B0) = (factors(directory, target) for directory in (coarse, run.out / "loraga_init"))
    s = run.model.base_model.model.get_submodule(target).scaling["default"]
    found_A, found_B = factors(tmp_path / "plain", target)
    expected = s * (B.double() @ A.double() - B0.double() @ A0.double())
    assert relative(found_B.double() @ found_A.double(), expected) < 1e-6


def test_targets_that_did_not_move_stay(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("plain")
    still, moved, *_ = run.targets
    partly = shutil.copytree(run.adapter, tmp_path / "partly")
    tensors = load_file(partly / "adapter_model.safetensors")
    start = load_file(run.out / "loraga_init" / "adapter_model.safetensors")
    save_file(
        {**tensors, **{k: v for k, v in start.items() if f".{still}." in k}}, partly / "adapter_model.safetensors"
    )
    assert run.convert("--to", tmp_path / "plain", "--trained", partly) == 0
    A, B = factors(tmp_path / "plain", still)
    assert not A.any() and not B.any()
    A, B = factors(tmp_path / "plain", moved)
    assert relative(B.double() @ A.double(), run.update(moved)) < 1e-6


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def into_checkpoint(directory: Path) -> None:
    shutil.copytree(directory, directory.with_name("moved"))
    shutil.rmtree(directory)
    directory.mkdir()
    directory.with_name("moved").rename(directory / "checkpoint-6")


def into_pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: edit_tensors(d, lambda t: t.update({Q: torch.empty(0)})), f"{Q} is empty, shape (0,): ZeRO-3"),
        (lambda d: edit_tensors(d, lambda t: t[Q].fill_(torch.nan)), f"{Q} has values that are not finite"),
        (lambda d: edit_tensors(d, lambda t: t.pop(Q)), f"{Q} is missing"),
        (lambda d: edit_tensors(d, lambda t: t.update({Q: t[Q][:2].clone()})), f"{Q} has shape (2, 64)"),
        (
            lambda d: edit_tensors(d, lambda t: t.update({Q.replace("q_proj", "other"): t[Q].clone()})),
            f"{Q.replace('q_proj', 'other')} is of no target",
        ),
        (lambda d: edit_tensors(d, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), "is stored as F8_E4M3"),
        (
            lambda d: edit_tensors(
                d, lambda t: t.update({Q.replace("q_proj.lora_A", "other.base_layer"): t[Q].clone()})
            ),
            "other.base_layer.weight is of no target",
        ),
        (lambda d: edit_config(d, r=8), "has rank 8 and"),
        (lambda d: edit_config(d, use_dora=True), "has use_dora"),
        (lambda d: edit_config(d, bias="all"), "has bias 'all'"),
        (lambda d: edit_config(d, peft_type="LOHA"), "--trained"),
        (into_checkpoint, "write one of checkpoint-6"),
        (into_pickle, "adapter_model.bin), which is never loaded"),
        (shutil.rmtree, "is no directory"),
    ],
)
def test_what_does_not_belong_is_refused_in_one_line(
    trained: Callable[[str], Trained],
    damage: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = trained("plain")
    broken = shutil.copytree(run.adapter, tmp_path / "broken")
    damage(broken)
    capsys.readouterr()  # of the run, if this test is the first that asks for it
    assert run.convert("--to", tmp_path / "plain", "--trained", broken) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert not (tmp_path / "plain").exists()


def test_mistaken_directories_are_refused(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    other = save_model(tmp_path / "other", seed=1)
    own = shutil.copytree(run.adapter, tmp_path / "own")
    for arguments, said in (
        ((), "--to: None: is missing"),
        (("--to", tmp_path / "x", "--rank", 0), "--rank: 0"),
        (("--to", tmp_path / "x", "--init", run.out), f"write {run.out / 'loraga_init'}"),
        (("--to", tmp_path / "x", "--init", run.adapter), "has no loraga_report.json beside it"),
        (("--to", tmp_path / "x", "--trained", run.out / "loraga_init"), "is the start itself"),
        (("--to", own), "exists and is no output of loraga-dist; write another directory"),
        (("--to", own, "--overwrite"), "exists and is no output of loraga-dist"),
        (("--to", tmp_path / "x", "--merge", tmp_path / "x"), "share a place"),
        (("--to", tmp_path / "x" / "adapter", "--merge", tmp_path / "x"), "share a place"),
        (("--merge", tmp_path / "x", "--base", other), "is not the base of loraga_init"),
        (("--merge", tmp_path / "x", "--base", tmp_path), "holds neither"),
        (("--to", tmp_path / "x", "--base", other), "--base: "),
        (("--to", tmp_path / "x", "--base", run.out / "residual_base"), "is not the base of loraga_init"),
        (("--to", tmp_path / "x", "--base", tmp_path / "nowhere"), "write the original model's directory"),
        (("--to", tmp_path / "x", "--init", run.out / "loraga_offset"), "is not what its loraga_report.json tells of"),
    ):
        assert run.convert(*arguments) == 2, arguments
        assert said in capsys.readouterr().err, arguments
        assert not (tmp_path / "x").exists()
    assert load_file(own / "adapter_model.safetensors")


def test_overwrite_replaces_an_earlier_result_only(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("plain")
    assert run.convert("--to", tmp_path / "plain", "--rank", 2) == 0
    assert run.convert("--to", tmp_path / "plain", "--overwrite") == 0
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["r"] == 2 * R
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_overwrite_keeps_what_is_not_of_the_earlier_result(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    for option in ("--to", "--merge"):
        place = tmp_path / option.strip("-")
        assert run.convert(option, place) == 0
        (place / "notes.txt").write_text("thesis")
        assert run.convert(option, place, "--overwrite") == 2
        assert f"{option}: '{place}': holds notes.txt, not of the output" in capsys.readouterr().err
        assert (place / "notes.txt").read_text() == "thesis"


def test_overwrite_keeps_a_model_that_was_trained_on_in_its_place(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = trained("plain"), tmp_path / "merged"
    assert run.convert("--merge", merged) == 0
    again = shutil.copytree(merged, tmp_path / "again", copy_function=shutil.copy)  # written at other times
    model = run.load(merged)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(merged)
    os.utime(merged / "model.safetensors", (0, 0))  # before the record of it
    assert run.convert("--merge", merged, "--overwrite") == 2
    assert "model.safetensors, not of the output that --overwrite replaces" in capsys.readouterr().err
    assert not load_file(merged / "model.safetensors")["model.norm.weight"].any()
    assert run.convert("--merge", again, "--overwrite") == 0


def test_overwrite_replaces_what_an_earlier_version_made(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("plain")
    assert run.convert("--to", tmp_path / "plain") == 0
    path = tmp_path / "plain" / "loraga_conversion.json"
    record = json.loads(path.read_text())
    assert record["files"].keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    path.write_text(json.dumps(record | {"files": list(record["files"])}))  # which told no digests
    assert run.convert("--to", tmp_path / "plain", "--overwrite") == 0


def test_a_start_that_was_trained_over_is_no_start(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    out = shutil.copytree(run.out, tmp_path / "out")
    shutil.copy(run.adapter / "adapter_model.safetensors", out / "loraga_init")
    shutil.rmtree(out / "residual_base")
    assert run.convert("--to", tmp_path / "plain", "--init", out / "loraga_init") == 2
    assert main(["materialize-base", str(out)]) == 2
    assert capsys.readouterr().err.count("is not what its loraga_report.json tells of") == 2


def test_a_base_that_moved_is_named_in_full(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("plain")
    shutil.copytree(run.base, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert run.convert("--to", "plain", "--base", "moved") == 0
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "moved"
    )


def test_training_on_the_original_base_is_warned_of(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    wrong = shutil.copytree(run.adapter, tmp_path / "wrong")
    edit_config(wrong, base_model_name_or_path=str(run.base))
    assert run.convert("--to", tmp_path / "plain", "--trained", wrong) == 0
    assert "names the original base" in capsys.readouterr().err


def test_keys_that_peft_passes_over_are_said(
    trained: Callable[[str], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("plain")
    newer = shutil.copytree(run.adapter, tmp_path / "newer")
    edit_config(newer, new_kind=16, other_kind=None)
    assert run.convert("--to", tmp_path / "plain", "--trained", newer) == 0
    assert "config has new_kind, which this version of PEFT passes over" in capsys.readouterr().err
