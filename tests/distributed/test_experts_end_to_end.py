"""Mixtures of experts from files to files: starts on 1, 2 and 3 ranks, and all that is done with one afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from builders import config_tree, save_data, save_model
from outputs import (
    EXPERTS,
    base_of,
    captured_shares,
    causal_lm,
    disturb,
    flip_bit,
    line_of,
    logits_of,
    make_output,
    make_outputs,
    read_products,
    read_report,
    read_start,
    relative,
    started,
    write_config,
)
from peft import PeftModel
from ranks import run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stopping import init_until

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main, main
from loraga_dist.files.checksums import write_checksums
from loraga_dist.ranks.world import World

GLOBAL_BATCH = 6
"""Sequences in a global microbatch, so that windows of a sketch are the same on any number of ranks."""
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-rrr": ("mixtral", {"init": {"scheme": "rrr"}}),
    "qwen3_moe-sketch": ("qwen3_moe", {"gradient": {"engine": "sketch", "oversampling": 16, "refine_passes": 1}}),
    "deepseek_v3-pissa": ("deepseek_v3", {"init": {"scheme": "pissa"}}),
    "gpt_oss-model-order": ("gpt_oss", {"gradient": {"order": "model"}}),
    "llama4": ("llama4", {}),
}
"""Family and settings of every output."""
ROUTER = {"deepseek_v3": "mlp.gate.weight", "gpt_oss": "mlp.router.weight", "llama4": "feed_forward.router.weight"}
"""Which has a start, too, by family; of rank 2, as some have 4 experts."""
WAYS_OF = {1: [*WAYS], 2: [*WAYS], 3: ["mixtral", "qwen3_moe-sketch"]}
"""By the number of ranks."""


class Outputs(NamedTuple):
    root: Path
    by_size: dict[int, dict[str, Path]]


def tree_of(root: Path, way: str, out: Path, world_size: int = 1, **sections: dict[str, Any]) -> dict[str, Any]:
    kind, settings = WAYS[way]
    tree = config_tree(root / kind, root / "data.jsonl", out, kind=kind, **(settings | sections))
    tree["lora"]["target_parameters"] = EXPERTS
    if kind in ROUTER:
        tree["lora"] |= {"target_parameters": [*EXPERTS, ROUTER[kind]], "rank_pattern": {ROUTER[kind]: 2}}
    tree["calibration"]["per_device_batch_size"] = GLOBAL_BATCH // world_size
    return tree


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    root = tmp_path_factory.mktemp("experts")
    save_data(root / "data.jsonl")
    for kind in {kind for kind, _ in WAYS.values()}:
        save_model(root / kind, kind)
    by_size = {}
    for size, ways in WAYS_OF.items():
        trees = [tree_of(root, way, root / f"{way}-{size}", size) for way in ways]
        by_size[size] = dict(zip(ways, make_outputs(trees, size), strict=True))
    return Outputs(root, by_size)


@pytest.fixture
def mixtral(outputs: Outputs, tmp_path: Path) -> Path:
    """A copy of an output that a test may damage."""
    return Path(shutil.copytree(outputs.by_size[2]["mixtral"], tmp_path / "out"))


@pytest.mark.parametrize("way", WAYS)
def test_ranks_agree(way: str, outputs: Outputs) -> None:
    alone, *sharded = (read_start(made[way]) for made in outputs.by_size.values() if way in made)
    assert sum(".experts." in name for name in alone) > len(alone) / 3
    assert any(name.endswith(("mlp.gate", "router")) for name in alone) == (WAYS[way][0] in ROUTER)
    for found in sharded:
        assert found.keys() == alone.keys()
        for name, (A, B) in alone.items():
            if way == "mixtral-rrr":  # B is zero; what rows of A span says no sign
                assert not found[name][1].any() and not B.any()
                assert relative(found[name][0].T @ found[name][0], A.T @ A) < 1e-4, name
            else:
                assert relative(found[name][1] @ found[name][0], B @ A) < 1e-4, name


@pytest.mark.parametrize("way", WAYS)
def test_stock_peft_gives_the_original_logits(way: str, outputs: Outputs) -> None:
    out = outputs.by_size[2][way]
    expected = logits_of(causal_lm(base_of(out)))
    assert (logits_of(started(out)) - expected).abs().max() < 1e-5
    changes_base = (out / "residual_base").exists()
    if changes_base:
        assert (logits_of(causal_lm(out / "residual_base")) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["mixtral", "mixtral-rrr", "gpt_oss-model-order", "llama4"])
def test_converted_it_is_the_trained_model(way: str, outputs: Outputs, tmp_path: Path) -> None:
    out, base = outputs.by_size[2][way], outputs.root / WAYS[way][0]
    model = started(out, is_trainable=True)
    disturb(model)
    model.save_pretrained(tmp_path / "trained")
    expected, original = logits_of(model), logits_of(causal_lm(base))
    trained = ["convert", "--init", str(out / "loraga_init"), "--trained", str(tmp_path / "trained")]
    assert main([*trained, "--to", str(tmp_path / "plain"), "--merge", str(tmp_path / "merged")]) == 0
    plain = PeftModel.from_pretrained(causal_lm(base), tmp_path / "plain")
    tolerance = 1e-5 * expected.abs().max()
    assert (expected - original).abs().max() > 1e-2
    assert (logits_of(plain) - expected).abs().max() < tolerance
    assert (logits_of(causal_lm(tmp_path / "merged")) - expected).abs().max() < tolerance
    assert read_weights(tmp_path / "merged").keys() == read_weights(base).keys()

    assert main([*trained, "--to", str(tmp_path / "rank2"), "--rank", "2"]) == 0
    of_rank_2 = PeftModel.from_pretrained(causal_lm(base), tmp_path / "rank2").get_base_model()
    for name, layer in plain.get_base_model().named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        whole = layer.get_delta_weight("default").double()
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        best = U[..., :2] * S[..., None, :2] @ Vh[..., :2, :]
        assert relative(of_rank_2.get_submodule(name).get_delta_weight("default").double(), best) < 1e-4, name


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in directory.glob("*.safetensors") for key, tensor in load_file(path).items()}


def test_rebuilt_at_another_rank_it_starts_at_the_model(outputs: Outputs, tmp_path: Path, capsys: Any) -> None:
    source, to = outputs.by_size[2]["mixtral"], tmp_path / "rebuilt"
    pattern = "{experts.down_proj: 2, layers.1.mlp.experts.gate_up_proj: 1}"
    assert main(["rebuild", str(source), "--to", str(to), "--lora.r", "3", "--lora.rank_pattern", pattern]) == 0
    ranks = {name.rpartition(".")[0]: target["r"] for name, target in read_report(to)["targets"].items()}
    assert ranks["model.layers.0.mlp.experts.gate_up_proj"] == 3 and ranks["model.layers.0.mlp.experts.down_proj"] == 2
    assert ranks["model.layers.1.mlp.experts.gate_up_proj"] == 1
    assert (logits_of(started(to)) - logits_of(causal_lm(base_of(source)))).abs().max() < 1e-5
    capsys.readouterr()
    assert main(["rebuild", str(source), "--to", str(tmp_path / "rrr"), "--init.scheme", "rrr"]) == 2
    assert "init.scheme: 'rrr'" in line_of(capsys)


def test_the_residual_base_is_made_again(mixtral: Path) -> None:
    before = read_weights(mixtral / "residual_base")
    again = mixtral.parent / "again"
    assert main(["materialize-base", str(mixtral), "--to", str(again)]) == 0
    after = read_weights(again)
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert any("experts.3.w2" in key for key in before), "experts are written as the checkpoint has them"


@pytest.mark.parametrize("part", ["loraga_init", "loraga_offset", "residual_base", "factors"])
def test_verify_finds_a_flipped_bit(part: str, mixtral: Path) -> None:
    assert verify(mixtral).problems == []
    path, position = where_an_expert_is(mixtral / part)
    flip_bit(path, position, bit=1)
    assert any(part in problem for problem in verify(mixtral).problems)
    write_checksums(mixtral, World.alone())  # then what the tensors themselves say
    assert verify(mixtral).problems


def where_an_expert_is(directory: Path) -> tuple[Path, int]:
    """A file that holds a tensor of an expert, and where in it the exponent of that one's first element is."""
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for key, entry in json.loads(content[8 : 8 + length]).items():
            if "experts" in key:
                return path, 8 + length + entry["data_offsets"][0] + 3
    raise AssertionError(f"{directory} holds no expert")


def run_and_stop(tree: dict[str, Any], overrides: Sequence[str], stops: Sequence[int], ranks: Sequence[int]) -> Path:
    """The output of a run that was stopped after so many looks each time, on so many ranks each time and the last."""
    config, out = write_config(tree), Path(tree["output"]["dir"])
    for stop, size in zip((*stops, 0), ranks, strict=True):
        codes = (
            [init_until(stop, config, overrides)]
            if size == 1
            else run_on_ranks(init_until, size, stop, config, overrides)
        )
        assert codes == [143 if stop else 0] * size
        assert out.exists() != bool(stop)
    assert verify(out).problems == []
    return out


def test_a_run_stopped_between_groups_ends_alike_on_other_ranks(outputs: Outputs, tmp_path: Path) -> None:
    tree = tree_of(outputs.root, "mixtral", tmp_path / "out", 2)
    found = read_products(run_and_stop(tree, ("--gradient.max_targets_in_flight", "13"), (7, 9), (1, 2, 1)))
    expected = read_products(outputs.by_size[1]["mixtral"])
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        assert relative(found[name], product) < 1e-4, name


def test_a_sketch_stopped_within_a_sweep_goes_on_on_other_ranks(outputs: Outputs, tmp_path: Path) -> None:
    exact = make_output(tree_of(outputs.root, "qwen3_moe-sketch", tmp_path / "exact", gradient={"engine": "exact"}))
    tree = tree_of(outputs.root, "qwen3_moe-sketch", tmp_path / "out", 2)
    shares = captured_shares(run_and_stop(tree, (), (4, 6), (2, 1, 2)), exact)
    assert len(shares) == len(read_report(exact)["targets"]) and min(shares.values()) > 0.999, shares


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_an_expert_without_tokens_starts_at_zero_and_is_named(engine: str, outputs: Outputs, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "a" * length}) + "\n" for length in (20, 30, 40)))
    # of one token gradients have one direction, which this one makes a column of B
    sections = {"gradient": {"engine": engine}, "init": {"direction": "A2rBr"}}
    tree = tree_of(outputs.root, "mixtral", tmp_path / "out", **sections)
    tree["calibration"]["data_files"] = str(data)
    out = make_output(tree)
    unseen = [name for name, (_, B) in read_start(out).items() if not B.any()]
    assert 8 < len(unseen) < 32 and all(".experts." in name for name in unseen)
    (line,) = [line for line in read_report(out)["warnings"] if "got no gradient" in line]
    assert f"{len(unseen)} of 40" in line and unseen[0] in line
    base, residual = read_weights(base_of(out)), read_weights(out / "residual_base")
    for name in unseen:
        layer, _, attribute, expert = name.split(".")[2], *name.split(".")[-3:]
        for part in ("w1", "w3") if attribute == "gate_up_proj" else ("w2",):
            key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
            assert torch.equal(base[key], residual[key]), key
    assert main(["rebuild", str(out), "--to", str(tmp_path / "rebuilt"), "--lora.r", "2"]) == 0
    for directory in (out, tmp_path / "rebuilt"):
        assert verify(directory).problems == []
        assert (logits_of(started(directory)) - logits_of(causal_lm(base_of(out)))).abs().max() < 1e-5


def test_a_rank_budget_is_spent_by_stacks(outputs: Outputs, tmp_path: Path) -> None:
    out = make_output(tree_of(outputs.root, "mixtral", tmp_path / "out", init={"rank_budget": 9000}))
    report = read_report(out)
    spent, ranks = 0, {}
    for name, target in report["targets"].items():
        spent += target["r"] * sum(target["shape"])
        ranks.setdefault(name.rpartition(".")[0] if target.get("stack") else name, set()).add(target["r"])
    assert 4000 < spent <= 9000
    assert all(len(found) == 1 for found in ranks.values()) and len({min(found) for found in ranks.values()}) > 1
    assert (logits_of(started(out)) - logits_of(causal_lm(base_of(out)))).abs().max() < 1e-5


PARAMETERS = "lora.target_parameters"
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # name: a way, what its section `lora` has beside, the key, what to write instead
    "no such parameter": ("mixtral", {"target_parameters": ["experts.gate_proj"]}, PARAMETERS, "experts.gate_up_proj"),
    "one of them": ("mixtral", {"target_parameters": [*EXPERTS, "shared.w"]}, PARAMETERS, "'shared.w'"),
    "an expert": ("mixtral", {"target_parameters": [f"{EXPERTS[0]}.3"]}, PARAMETERS, "write lora.target_parameters: ["),
    "embeddings": ("mixtral", {"target_parameters": ["embed_tokens.weight"]}, PARAMETERS, "leave it out"),
    "vector": ("mixtral", {"target_parameters": ["input_layernorm.weight"]}, PARAMETERS, "leave it out"),
    "biases": ("gpt_oss-model-order", {"target_parameters": ["up_proj_bias"]}, PARAMETERS, "up_proj_bias"),
    "a router as a module": (
        "llama4", {"target_modules": ["router"], "target_parameters": EXPERTS}, "lora.target_modules", ROUTER["llama4"],
    ),
    "dropout": ("mixtral", {"lora_dropout": 0.1}, "lora.lora_dropout: 0.1", "write 0.0"),
    "DoRA": ("mixtral", {"use_dora": True}, "lora.use_dora: True", "write false"),
    "rank": ("mixtral", {"r": 13, "target_modules": ["q_proj"]}, "lora.r: 13", "write 12 or less"),
    "an expert's rank": ("mixtral", {"rank_pattern": {f"{EXPERTS[0]}.3": 2}}, "lora.rank_pattern", "parameter's"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str, outputs: Outputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way, lora, key, instead = REFUSED[name]
    tree = tree_of(outputs.root, way, tmp_path / "out")
    tree["lora"].update(lora)
    require_refusal(tree, capsys, key, instead)


def require_refusal(tree: dict[str, Any], capsys: pytest.CaptureFixture[str], key: str, instead: str) -> None:
    capsys.readouterr()
    assert init_main(["--config", str(write_config(tree))]) == 2
    line = line_of(capsys)
    assert line.startswith(f"loraga-dist: {key}") and instead in line, line
    assert not Path(tree["output"]["dir"]).exists()


def test_regressions_are_refused_where_inputs_are_on_the_other_side(
    outputs: Outputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama4's experts; beside its other layers, of which alone they are not."""
    tree = tree_of(outputs.root, "llama4", tmp_path / "out", init={"scheme": "rrr"})
    require_refusal(tree, capsys, "init.scheme: 'rrr'", PARAMETERS)
    del tree["lora"]["target_parameters"], tree["lora"]["rank_pattern"]
    assert not any(B.any() for _, B in read_start(make_output(tree)).values())


def test_a_checkpoint_without_one_of_the_experts_is_refused(
    outputs: Outputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tree_of(outputs.root, "mixtral", tmp_path / "out")
    base = Path(shutil.copytree(outputs.root / "mixtral", tmp_path / "base"))
    tree["model"]["name_or_path"] = str(base)
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    path = base / index["weight_map"].pop(lost)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with safe_open(path, "pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if key != lost}  # noqa: SIM118
    save_file(kept, path, {"format": "pt"})
    require_refusal(tree, capsys, "model.name_or_path", "experts.3.w2")
