"""The convergence benchmark: its search and measures are what they claim, and every row comes out of a small run."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import byte_tokenizer, llama_config, make_model
from convergence_methods import METHODS, Inputs, R, alignment, best_cosine, full_gradients, lora_layers
from convergence_report import Results, markers_of, steps_to, tables, write_plots
from convergence_tasks import QUICK, FewShot
from launching import ROOT, succeed
from ranks import run_script
from rate_search import Journal, best_rate, finer_rate, settings_of, train
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import LlamaForCausalLM

from loraga_dist.errors import UserError

pytestmark = pytest.mark.plots


@pytest.mark.parametrize("best", [-4, -1, 0, 1, 5])
def test_search_brackets_the_best_rate(best: int) -> None:
    tried: list[int] = []

    def loss_at(lr: float) -> float:
        tried.append(round(math.log2(lr / 0.001)))
        return math.inf if tried[-1] > best + 1 else abs(tried[-1] - best - 0.1)

    assert best_rate(loss_at, 0.001) == 0.001 * 2.0**best
    assert {best - 1, best, best + 1} <= set(tried)


@pytest.mark.parametrize("best", [-0.5, 0, 0.5])
def test_search_goes_on_to_finer_rates(best: float) -> None:
    def loss_at(lr: float) -> float:
        return abs(math.log2(lr / 0.004) - best)

    assert finer_rate(loss_at, 0.004) == pytest.approx(0.004 * 2**best, rel=1e-5)
    # 0.008 from above and 0.004 from below have the same neighbour
    assert finer_rate(lambda lr: abs(lr - 0.0056), 0.008) == finer_rate(lambda lr: abs(lr - 0.0056), 0.004)


def test_settings_that_came_later_hold_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Journal(path, QUICK)
    header = json.loads(path.read_text())
    del header["settings"]["more_steps"]
    path.write_text(json.dumps(header) + "\n")
    entries = Journal(path, QUICK).read()
    assert [entry["kind"] for entry in entries] == ["header", "settings"]
    assert settings_of(entries)["more_steps"] == QUICK.more_steps
    with pytest.raises(UserError, match="other settings"):
        Journal(path, replace(QUICK, more_steps=QUICK.more_steps + 1))


def test_steps_to_a_loss() -> None:
    curve = [(0, 3.0), (10, 2.0), (20, 1.5)]
    assert steps_to(curve, 2.5) == pytest.approx(5)
    assert steps_to(curve, 1.5) == pytest.approx(20)
    assert steps_to(curve, 3.5) == 0
    assert steps_to(curve, 1.4) is None


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (4, 32), generator=draw) for _ in range(3)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


@pytest.fixture(scope="module")
def gradients(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return full_gradients(make_model("llama"), batches)


def test_full_gradients_are_those_of_the_mean_loss(
    batches: list[dict[str, Tensor]], gradients: dict[str, Tensor]
) -> None:
    model = make_model("llama")
    sum(model(**batch).loss / len(batches) for batch in batches).backward()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    assert gradients.keys() == linear.keys()
    for name, G_MN in gradients.items():
        torch.testing.assert_close(G_MN, linear[name].weight.grad)


STARTS_AT_THE_MODEL = [
    "lora", "rslora", "pissa", "lora_ga_exact", "random", "eva", "orthonormal", "rrr", "rrr_diagonal", "rrr_none",
]  # fmt: skip


@pytest.mark.parametrize("method", STARTS_AT_THE_MODEL)
def test_alignment_is_the_formula(method: str, batches: list[dict[str, Tensor]], gradients: dict[str, Tensor]) -> None:
    torch.manual_seed(1)
    started = METHODS[method].start(make_model("llama"), Inputs(batches=batches, seed=1, steps=8))
    cosines = []
    for layer, G_MN in zip(lora_layers(started), gradients.values(), strict=True):
        A_RN, B_MR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = B_MR @ B_MR.T @ G_MN + G_MN @ A_RN.T @ A_RN
        cosines.append(cosine_similarity(update.flatten(), G_MN.flatten(), dim=0).item())
    found = alignment(started, make_model("llama"), gradients)
    assert found["cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert found["start_change"] == 0
    if method == "lora_ga_exact":  # calibrated on the very batches of the gradient
        assert found["cosine"] == pytest.approx(best_cosine(gradients, 2 * R), abs=1e-4)


def test_dora_and_adalora_first_updates(batches: list[dict[str, Tensor]], gradients: dict[str, Tensor]) -> None:
    inputs = Inputs(batches=batches, seed=1, steps=10)
    for method in ("dora", "adalora"):
        torch.manual_seed(1)
        started = METHODS[method].start(make_model("llama"), inputs)
        cosines = []
        for name, G_MN in gradients.items():
            layer = started.get_submodule(f"base_model.model.{name}")
            W_MN, A_RN, B_MR = layer.base_layer.weight, layer.lora_A["default"], layer.lora_B["default"]
            if method == "dora":  # B = 0: A does not move; the magnitudes move the rows along themselves
                rows_MN = nn.functional.normalize(W_MN, dim=1)
                A_RN, s = A_RN.weight, layer.scaling["default"]
                direct = s**2 * G_MN @ A_RN.T @ A_RN
                # what B adds along a row changes the row's norm, which DoRA divides out
                direct = direct - (direct * rows_MN).sum(1, keepdim=True) * rows_MN
                update = direct + (G_MN * rows_MN).sum(1, keepdim=True) * rows_MN
            else:  # only the singular values, which are 0, move
                update = (B_MR * (B_MR.T @ G_MN @ A_RN.T).diagonal()) @ A_RN
            cosines.append(cosine_similarity(update.flatten(), G_MN.flatten(), dim=0).item())
        found = alignment(started, make_model("llama"), gradients)
        assert found["cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4), method


def test_controls_are_what_they_control_for(batches: list[dict[str, Tensor]]) -> None:
    inputs = Inputs(batches=batches, seed=1, steps=8)
    rrr, control, eva = (METHODS[name].start(make_model("llama"), inputs) for name in ("rrr", "orthonormal", "eva"))
    for ours, random, pca in zip(lora_layers(rrr), lora_layers(control), lora_layers(eva), strict=True):
        assert ours.scaling == random.scaling
        for layer, norm in ((ours, 1 / math.sqrt(3)), (random, 1 / math.sqrt(3)), (pca, 1.0)):
            A_RN = layer.lora_A["default"].weight
            assert A_RN.shape[0] == R and A_RN.requires_grad
            torch.testing.assert_close(A_RN @ A_RN.T, norm**2 * torch.eye(R), atol=1e-4, rtol=0)
            assert not layer.lora_B["default"].weight.any()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convergence") / "model"
    LlamaForCausalLM(llama_config(num_hidden_layers=1)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_few_shot_stops_early_on_other_windows(small_model: Path) -> None:
    bench = FewShot(str(small_model), QUICK, "help")
    windows = sorted([*bench.training_starts.tolist(), *bench.validation_starts.tolist()])
    assert len(windows) == 2 * QUICK.few_shot_windows
    assert all(after - before >= QUICK.sequence_length for before, after in itertools.pairwise(windows))
    for batches in (bench.calibration_batches(3), list(bench.training_batches(4, 3))):  # an epoch
        rows = torch.cat([batch["input_ids"] for batch in batches])
        expected = [bench.training_ids[start : start + QUICK.sequence_length] for start in bench.training_starts]
        assert sorted(rows.tolist()) == sorted(row.tolist() for row in expected)

    method, seen = METHODS["full"], []

    def validation_loss(model: nn.Module) -> float:
        seen.append(bench.validation_loss(model))
        return seen[-1]

    started = method.start(bench.model, Inputs(batches=[], seed=0, steps=8))
    run = train(
        bench, started, method, 0.1, seed=0, steps=8, check_every_steps=1,
        loss_before=bench.heldout_loss(started), validation_loss=validation_loss,
    )  # fmt: skip
    lowest = seen.index(min(seen))
    assert len(seen) == 9 and lowest < 8
    assert run["final_loss"] == pytest.approx(run["curve"][lowest][1], abs=1e-5)


@pytest.fixture(scope="module")
def quick_table(small_model: Path) -> Path:
    """Results of the first part."""
    path, document = small_model.parent / "runs.jsonl", small_model.parent / "page.md"
    markers = markers_of(path)
    document.write_text(f"before\n{markers.begin}\nold\n{markers.end}\nafter\n")
    arguments = _arguments(small_model, path, "--parts", "table", "--markdown", str(document))
    succeed(run_script(arguments, 1, timeout_seconds=250))
    return path


def _arguments(model: Path, path: Path, *more: str) -> list[str]:
    script = str(ROOT / "benchmarks" / "convergence.py")
    return [script, "--quick", "--model", str(model), "--json", str(path), *more]


def _rows(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _results(path: Path) -> Results:
    return Results([json.loads(line) for line in path.read_text().splitlines()])


def test_quick_run_and_going_on(small_model: Path, quick_table: Path, tmp_path: Path) -> None:
    lines = quick_table.read_text().splitlines()
    results = _results(quick_table)
    assert results.methods == list(METHODS)
    for method in METHODS:
        best = results.best_lr("help", method)
        rates = results.rates("help", method)
        assert best / 2 in rates and best * 2 in rates, method
        losses = results.final_losses("help", method, best)
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses), method
        (curve, _) = results.curves("help", method, best)
        assert curve[-1][1] < curve[0][1], method
    page = quick_table.with_name("page.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert all(method.label in page for method in METHODS.values())
    write_plots(results, tmp_path / "plots")
    assert {plot.name for plot in (tmp_path / "plots").iterdir()} == {"convergence_curves.svg", "convergence_rates.svg"}
    cosine = {method: results.alignments["help", method, 0]["cosine"] for method in METHODS}
    assert cosine["full"] == pytest.approx(1, abs=1e-9)
    assert cosine["lora_ga_exact"] > max(cosine["lora"], cosine["random"]) + 0.1

    # a kill in the middle of a line: the same command runs what is missing, with the same results
    path, document = tmp_path / "runs.jsonl", tmp_path / "page.md"
    arguments = _arguments(small_model, path, "--parts", "table")
    runs = [number for number, line in enumerate(lines) if json.loads(line)["kind"] == "run"]
    path.write_text("\n".join(lines[: runs[-2]]) + "\n" + lines[runs[-2]][:30])
    succeed(run_script(arguments, 1, timeout_seconds=250))
    assert {key: run["curve"] for key, run in _results(path).runs.items()} == {
        key: run["curve"] for key, run in results.runs.items()
    }

    (refused,) = run_script([argument for argument in arguments if argument != "--quick"], 1)
    assert refused.code == 2 and "other settings" in refused.stderr
    (refused,) = run_script([*arguments, "all"], 1)
    assert refused.code == 2 and "is none of table, longer, spread, 6, 3, 9, few-shot" in refused.stderr
    document.write_text("no markers")
    (refused,) = run_script([*arguments, "--markdown", str(document)], 1)
    assert refused.code == 2 and "has no lines" in refused.stderr

    # results of another model
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    (of_model,) = (entry for entry in entries if entry["kind"] == "model")
    of_model["loss"] += 0.001
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries if entry is not entries[-1]))
    (refused,) = run_script(arguments, 1)
    assert refused.code == 3 and "name that one, or a new results file" in refused.stderr
    assert len(path.read_text().splitlines()) == len(entries) - 1


def test_fair_comparison(small_model: Path, quick_table: Path, tmp_path: Path) -> None:
    path, document = tmp_path / "runs.jsonl", tmp_path / "page.md"
    shutil.copy(quick_table, path)
    plain, longer = ("lora", "rslora", "lora_plus"), ("lora_longer", "rslora_longer", "lora_plus_longer")
    first = _arguments(small_model, path, "--parts", "longer", "spread", "6", "--methods", *plain, *longer, "rrr")
    succeed(run_script(first, 1, timeout_seconds=250))
    more = _arguments(small_model, path, "--parts", "3", "9", "few-shot", "--methods", "rslora", "rslora_longer", "rrr")
    succeed(run_script([*more, "--markdown", str(document)], 1, timeout_seconds=250))

    results = _results(path)
    for method in (*plain, *longer, "rrr"):
        on_grid = results.on_grid().best_lr("help", method)
        for lr in (on_grid / 2, on_grid, on_grid * 2):
            assert len(results.final_losses("help", method, lr)) == 2, method
        rates = results.rates("help", method)
        for lr in (on_grid / math.sqrt(2), on_grid * math.sqrt(2)):
            assert any(math.isclose(lr, rate, rel_tol=1e-5) for rate in rates), method
        assert results.is_done("help", method)
    last_steps = {
        (task, method): results.curves(task, method, results.best_lr(task, method))[0][-1][0]
        for task in ("help", "help, 3 steps", "help, 9 steps", "help, few-shot")
        for method in ("rslora", "rslora_longer", "rrr")
    }
    assert last_steps == {
        **{("help", m): 6 for m in ("rslora", "rrr")}, ("help", "rslora_longer"): 9,
        **{("help, 3 steps", m): 3 for m in ("rslora", "rrr")}, ("help, 3 steps", "rslora_longer"): 6,
        **{("help, 9 steps", m): 9 for m in ("rslora", "rrr")}, ("help, 9 steps", "rslora_longer"): 12,
        **{("help, few-shot", m): 9 for m in ("rslora", "rrr")}, ("help, few-shot", "rslora_longer"): 12,
    }  # fmt: skip

    first_table, _, rest = document.read_text().partition("Cosine of")
    spread, rows = ({row[0]: row[1:] for row in _rows(text)} for text in (first_table, rest))
    best = results.on_grid().best_lr("help", "rslora")
    seeds = [
        statistics.fmean(results.runs["help", "rslora", seed, lr]["final_loss"] for lr in (best / 2, best, best * 2))
        for seed in (0, 1)
    ]
    assert spread["rsLoRA"][5].startswith(f"{statistics.fmean(seeds):.3f}") and spread["DoRA"][5] == ""
    losses = {
        method: results.final_losses("help", method, results.best_lr("help", method)) for method in (*plain, "rrr")
    }
    floor = min((losses[method] for method in plain), key=statistics.fmean)
    differences = [own - other for own, other in zip(losses["rrr"], floor, strict=True)]
    shown = rows["6 steps, RRR"]
    assert shown[0].startswith(f"{statistics.fmean(differences):+.3f}".replace("-", "−"))
    assert shown[1] == f"{sum(d < 0 for d in differences)} of 2" and shown[3].endswith("of 2")
    assert rows["3 steps, RRR"] == ["", "", "", ""]  # nothing to compare with yet


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("convergence*.jsonl")), ids=lambda path: path.name)
def test_document_has_the_tables_of_the_committed_results(file: Path) -> None:
    document = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    markers = markers_of(file)
    written = document.partition(markers.begin)[2].partition(markers.end)[0]
    assert written.strip() == tables(_results(file)).strip(), "run benchmarks/convergence.py with --markdown"
