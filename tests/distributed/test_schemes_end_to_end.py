"""Schemes, directions and scales through the whole pipeline, against stock PEFT's own initializations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import byte_tokenizer, config_tree, save_data, save_model
from launching import INIT
from outputs import (
    base_of,
    causal_lm,
    disturb,
    line_of,
    logits_of,
    make_output,
    read_adapter,
    read_report,
    started,
    write_config,
)
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import preprocess_loraga
from pieces import PROJECTIONS
from ranks import run_script
from safetensors.torch import load_file, save_file

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main, main
from loraga_dist.config import InitConfig, parse_config
from loraga_dist.errors import Preempted
from loraga_dist.ranks.stop import StopRequest
from loraga_dist.ranks.world import World
from loraga_dist.run.pipeline import run
from loraga_dist.schemes import SCHEMES


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


@pytest.mark.parametrize(
    ("direction", "scale"),
    [("ArB2r", "unit"), ("A2rBr", "stable"), ("ArBr", "gd"), ("random", "stable"), ("ArB2r", "weight_svd")],
)
def test_two_ranks_give_the_single_process_factors(paths: tuple, direction: str, scale: str) -> None:
    root, model, data = paths
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}}
    lora = {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]} | patterns
    init = {"direction": direction, "scale": scale}
    alone, sharded = (
        make_output(config_tree(model, data, root / f"{direction}-{scale}-{size}", lora=lora, init=init), size)
        for size in (1, 2)
    )
    assert verify(alone).ok and verify(sharded).ok
    found, expected = read_adapter(sharded), read_adapter(alone)
    assert found["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape[0] == 6
    assert found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 2
    for key, tensor in expected.items():
        # factors of gradients that were summed in another order
        assert (found[key] - tensor).norm() < 1e-4 * tensor.norm(), key


def test_scale_peft_is_what_stock_peft_computes(paths: tuple) -> None:
    root, model_dir, data = paths
    # r = 16 makes PEFT sketch with the full width of 64, so that its own randomized SVD is exact
    ours = read_adapter(make_output(config_tree(model_dir, data, root / "peft", r=16, init={"scale": "peft"})))

    tokenizer = byte_tokenizer()
    rows = [tokenizer(json.loads(line)["text"] + "</s>")["input_ids"] for line in data.read_text().splitlines()]
    model = causal_lm(model_dir)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def train_step() -> None:
        for row in rows:
            ids = torch.tensor([row])
            model(input_ids=ids, labels=ids).loss.backward()

    config = LoraConfig(
        r=16, lora_alpha=8, target_modules=PROJECTIONS, init_lora_weights="lora_ga",
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


PATTERNS = {
    "use_rslora": True,
    "lora_alpha": 3,
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6, "c_fc": 3},
    "alpha_pattern": {"v_proj": 5, "c_proj": 2},
}
OTHERS = ("lora_one", "rrr", "pissa", "olora", "kaiming")
OF_GRADIENTS = ("lora_one", "rrr")
FAMILIES = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_fc", "c_proj")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Outputs by scheme, family and number of ranks, each made once, when first asked for."""
    root, made = tmp_path_factory.mktemp("others"), {}

    def get(scheme: str, world_size: int = 1, kind: str = "llama") -> Path:
        key = (scheme, world_size, kind)
        if key not in made:
            base, out = root / kind, root / "-".join(map(str, key))
            if not base.exists():
                save_model(base, kind)
            tree = config_tree(base, save_data(root / "data.jsonl"), out, init={"scheme": scheme})
            used = {name: {key: value for key, value in PATTERNS[name].items() if key.endswith(FAMILIES[kind])}
                    for name in ("rank_pattern", "alpha_pattern")}  # fmt: skip
            tree["lora"] |= PATTERNS | used | {"target_modules": list(FAMILIES[kind])}
            if SCHEMES[scheme].source != "gradient" and kind == "llama":
                del tree["calibration"]  # the logits are compared on seeded token ids then
            made[key] = make_output(tree, world_size)
        return made[key]

    return get


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("scheme", OTHERS)
def test_stock_peft_loads_a_verified_start(runs: Callable[..., Path], scheme: str, world_size: int, kind: str) -> None:
    out = runs(scheme, world_size, kind)
    assert verify(out).problems == []
    changes_base = scheme in ("pissa", "olora")
    present = {name: (out / name).exists() for name in ("residual_base", "loraga_offset", "factors")}
    assert present == {
        "residual_base": changes_base,
        "loraga_offset": changes_base,
        "factors": scheme in OF_GRADIENTS,
    }
    assert verify(out).residual_checked == changes_base

    original = logits_of(causal_lm(base_of(out)))
    diff, largest = (logits_of(started(out)) - original).abs().max(), original.abs().max()
    check = read_report(out)["identity_check"]
    if scheme == "lora_one":
        # off the model by what the report and the README say, on other tokens
        assert 1e-3 * largest < diff < 3 * check["max_abs_logit_diff"]
        assert 1e-3 * check["max_abs_logit"] < check["max_abs_logit_diff"] < check["max_abs_logit"]
        assert f"Logits differ by {check['max_abs_logit_diff']:.3g}" in (out / "README.md").read_text()
    else:
        assert diff < 1e-5 * largest
        assert check["max_abs_logit_diff"] < 1e-5 * check["max_abs_logit"]
    for target in read_report(out)["targets"].values():
        assert (target["singular_values"] is not None) == (target["engine"] is not None) == (scheme in OF_GRADIENTS)
        assert (target["offset_ratio"] > 0) == (scheme not in ("kaiming", "rrr"))
    assert {target["owner_rank"] for target in read_report(out)["targets"].values()} == set(range(world_size))


@pytest.mark.parametrize("kind", ["tied", "t5", "bert", "bart"])
def test_every_family_starts_without_data(kind: str, tmp_path: Path) -> None:
    tree = config_tree(save_model(tmp_path / kind, kind), tmp_path / "none", tmp_path / "out", kind=kind)
    tree["init"] = {"scheme": "pissa"}
    if kind == "bart":  # its head has fewer rows than r
        tree["lora"]["modules_to_save"] = ["classification_head"]
    del tree["calibration"]
    run(parse_config(InitConfig, tree), World.alone(), StopRequest())
    check = read_report(tmp_path / "out")["identity_check"]
    assert check["max_abs_logit_diff"] < 1e-5 * check["max_abs_logit"]
    assert verify(tmp_path / "out").residual_checked


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("scheme", OTHERS)
def test_ranks_do_not_matter(runs: Callable[..., Path], scheme: str, kind: str) -> None:
    found, expected = read_adapter(runs(scheme, 2, kind)), read_adapter(runs(scheme, 1, kind))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def test_lora_one_starts_down_the_loss(runs: Callable[..., Path]) -> None:
    out = runs("lora_one")
    rows = Path(read_report(out)["config"]["calibration"]["data_files"]).read_text().splitlines()
    ids = torch.tensor([byte_tokenizer()(json.loads(row)["text"])["input_ids"][:10] for row in rows])

    def loss(model: Any) -> float:
        with torch.no_grad():
            return model.eval()(input_ids=ids, labels=ids).loss.item()

    model = started(out)
    with model.disable_adapter():
        before = loss(model)
    assert loss(model) < before - 0.01


@pytest.mark.parametrize(("scheme", "kind"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_weights_are_split_as_stock_peft_does(runs: Callable[..., Path], scheme: str, kind: str) -> None:
    # stock OLoRA does not transpose what GPT-2 stores transposed
    out = runs(scheme, 2, kind)
    section = read_report(out)["config"]["lora"]
    keys = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
    config = LoraConfig(**{key: section[key] for key in keys}, init_lora_weights=scheme, fan_in_fan_out=kind == "gpt2")
    stock = get_peft_model(causal_lm(base_of(out)), config)
    ours, expected = started(out).state_dict(), stock.state_dict()
    assert ours.keys() == expected.keys()
    for key, B_MR in expected.items():
        if "lora_B" in key:
            a_key = key.replace("lora_B", "lora_A")
            product = B_MR @ expected[a_key]
            assert (ours[key] @ ours[a_key] - product).norm() < 1e-4 * product.norm(), key
            assert (ours[key].abs() - B_MR.abs()).norm() < 1e-4 * B_MR.norm(), key
            assert (ours[a_key].abs() - expected[a_key].abs()).norm() < 1e-4 * expected[a_key].norm(), key
        elif "base_layer.weight" in key:
            assert (ours[key] - B_MR).norm() < 1e-4 * B_MR.norm(), key


@pytest.mark.parametrize("scheme", OTHERS)
def test_a_trained_adapter_converts_and_merges(runs: Callable[..., Path], scheme: str, tmp_path: Path) -> None:
    out, trained = runs(scheme), tmp_path / "trained"
    model = started(out)
    disturb(model)
    model.save_pretrained(trained)
    words = [
        "--init",
        out / "loraga_init",
        "--trained",
        trained,
        "--to",
        tmp_path / "to",
        "--merge",
        tmp_path / "merged",
    ]
    assert main(["convert", *map(str, words)]) == 0
    expected = logits_of(model)
    base = causal_lm(base_of(out))
    converted = PeftModel.from_pretrained(base, tmp_path / "to")
    assert converted.peft_config["default"].r == (12 if SCHEMES[scheme].changes_base else 6), (
        "2r, or nothing subtracted"
    )
    for found in (logits_of(converted), logits_of(causal_lm(tmp_path / "merged"))):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rebuilding_goes_between_the_schemes_of_the_gradient(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, new, back = runs("lora_ga"), tmp_path / "new", tmp_path / "back"
    assert main(["rebuild", str(source), "--to", str(new), "--init.scheme", "lora_one"]) == 0
    assert verify(new).ok and not (new / "residual_base").exists() and not (new / "loraga_offset").exists()
    found, expected = read_adapter(new), read_adapter(runs("lora_one"))
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() < 1e-4 * tensor.norm(), key
    expected = logits_of(started(runs("lora_one")))
    assert (logits_of(started(new)) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert main(["rebuild", str(new), "--to", str(back), "--init.scheme", "lora_ga"]) == 0
    gammas = [read_report(out)["config"]["init"]["stable_gamma"] for out in (source, new, back, runs("pissa"))]
    assert gammas == [16, 128, 16, None], "each scheme's own, as it was used"
    for key, tensor in read_adapter(source).items():
        assert torch.equal(read_adapter(back)[key], tensor), key
    assert verify(back).residual_checked
    capsys.readouterr()

    for scheme in ("pissa", "olora", "kaiming"):
        assert main(["rebuild", str(source), "--to", str(tmp_path / "x"), "--init.scheme", scheme]) == 2
        assert f"init.scheme: '{scheme}': does not start from the gradients" in line_of(capsys)
        assert main(["rebuild", str(runs(scheme)), "--to", str(tmp_path / "x")]) == 2
        assert f"was made by {scheme} and holds no gradients" in line_of(capsys)
    for one, other in (("lora_ga", "rrr"), ("rrr", "lora_ga")):
        assert main(["rebuild", str(runs(one)), "--to", str(tmp_path / "x"), "--init.scheme", other]) == 2
        assert f"init.scheme: '{other}': is settled by the gradients of" in line_of(capsys)
    assert main(["rebuild", str(runs("rrr")), "--to", str(tmp_path / "x"), "--init.scheme", "rrr_step"]) == 2
    assert "init.step: None: its length is searched with the model; write a number" in line_of(capsys)
    assert main(["rebuild", str(runs("rrr")), "--to", str(tmp_path / "x"), "--init.damping", "0.1"]) == 2
    assert "init.damping: 0.1: is settled by the gradients of" in line_of(capsys)
    for scheme in ("lora_one", "rrr", "kaiming"):
        assert main(["materialize-base", str(runs(scheme))]) == 2
        assert f"was made by {scheme}, which leaves the base as it is; load loraga_init on" in line_of(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "new"]


@pytest.mark.parametrize(("scheme", "gone"), [("lora_one", "factors"), ("pissa", "loraga_offset")])
def test_verify_misses_what_the_scheme_writes(
    runs: Callable[..., Path], scheme: str, gone: str, tmp_path: Path
) -> None:
    out = shutil.copytree(runs(scheme), tmp_path / "out")
    weights = out / "loraga_init" / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(weights).items()}, weights)
    shutil.rmtree(out / gone)
    problems = " ".join(verify(out).problems)
    assert "not finite" in problems and f"{gone}" in problems


def test_gradients_need_data_and_weights_must_be_finite(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(base_of(runs("kaiming")), tmp_path / "base")
    tree = config_tree(base, tmp_path / "none", tmp_path / "out")
    del tree["calibration"]
    command = ["--config", str(write_config(tree))]
    assert init_main([*command, "--init.scheme", "lora_one"]) == 2
    assert "no data is named" in line_of(capsys)
    for path in base.glob("*.safetensors"):
        stored = load_file(path)
        for key in stored:
            if key.endswith("2.mlp.up_proj.weight"):
                stored[key][3, 5] = float("inf")
        save_file(stored, path, {"format": "pt"})
    results = run_script([INIT, *command, "--init.scheme", "pissa"], 2)
    assert [result.code for result in results] == [3, 3]
    said = "".join(result.stderr for result in results)
    assert "factorize: the weight of model.layers.2.mlp.up_proj holds a NaN or an infinity" in said
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_without_gradients_starts_over(runs: Callable[..., Path], tmp_path: Path) -> None:
    stop = StopRequest()
    stop.signal_name = "SIGTERM"
    tree = config_tree(base_of(runs("kaiming")), tmp_path / "none", tmp_path / "out", init={"scheme": "pissa"})
    del tree["calibration"]
    with pytest.raises(Preempted, match="SIGTERM; the same command starts over"):
        run(parse_config(InitConfig, tree), World.alone(), stop)
    assert not list(tmp_path.iterdir())
    run(parse_config(InitConfig, tree), World.alone(), StopRequest())
    assert verify(tmp_path / "out").ok
