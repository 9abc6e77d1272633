"""The convergence benchmark: its search and measures are what they claim, and every row comes out of a small run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from builders import byte_tokenizer, llama_config, make_model
from convergence import best_rate
from convergence_methods import METHODS, Inputs, R, alignment, best_cosine, full_gradients, lora_layers
from convergence_report import BEGIN, END, Results, steps_to, tables, write_plots
from launching import ROOT, succeed
from ranks import run_script
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.plots


@pytest.mark.parametrize("best", [-4, -1, 0, 1, 5])
def test_search_brackets_the_best_rate(best: int) -> None:
    tried: list[int] = []

    def loss_at(lr: float) -> float:
        tried.append(round(math.log2(lr / 0.001)))
        return math.inf if tried[-1] > best + 1 else abs(tried[-1] - best - 0.1)

    assert best_rate(loss_at, 0.001) == 0.001 * 2.0**best
    assert {best - 1, best, best + 1} <= set(tried)


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


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "lora_ga_exact", "random"])
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


def test_quick_run_and_going_on(tmp_path: Path) -> None:
    model = tmp_path / "model"
    LlamaForCausalLM(llama_config(num_hidden_layers=1)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    path, document = tmp_path / "runs.jsonl", tmp_path / "page.md"
    arguments = [str(ROOT / "benchmarks" / "convergence.py"), "--quick", "--model", str(model), "--json", str(path)]
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    succeed(run_script([*arguments, "--markdown", str(document)], 1, timeout_seconds=250))

    lines = path.read_text().splitlines()
    results = Results([json.loads(line) for line in lines])
    assert results.methods == list(METHODS)
    for method in METHODS:
        best = results.best_lr("help", method)
        rates = results.rates("help", method)
        assert best / 2 in rates and best * 2 in rates, method
        losses = results.final_losses("help", method, best)
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses), method
        (curve, _) = results.curves("help", method, best)
        assert curve[-1][1] < curve[0][1], method
    page = document.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert all(method.label in page for method in METHODS.values())
    write_plots(results, tmp_path / "plots")
    assert {plot.name for plot in (tmp_path / "plots").iterdir()} == {"convergence_curves.svg", "convergence_rates.svg"}
    cosine = {method: results.alignments["help", method, 0]["cosine"] for method in METHODS}
    assert cosine["full"] == pytest.approx(1, abs=1e-9)
    assert cosine["lora_ga_exact"] > max(cosine["lora"], cosine["random"]) + 0.1

    # a kill in the middle of a line: the same command runs what is missing, with the same results
    runs = [number for number, line in enumerate(lines) if json.loads(line)["kind"] == "run"]
    path.write_text("\n".join(lines[: runs[-2]]) + "\n" + lines[runs[-2]][:30])
    succeed(run_script(arguments, 1, timeout_seconds=250))
    again = Results([json.loads(line) for line in path.read_text().splitlines()])
    assert {key: run["curve"] for key, run in again.runs.items()} == {
        key: run["curve"] for key, run in results.runs.items()
    }

    (refused,) = run_script([argument for argument in arguments if argument != "--quick"], 1)
    assert refused.code == 2 and "other settings" in refused.stderr
    document.write_text("no markers")
    (refused,) = run_script([*arguments, "--markdown", str(document)], 1)
    assert refused.code == 2 and "has no lines" in refused.stderr


def test_document_has_the_tables_of_the_committed_results() -> None:
    lines = (ROOT / "benchmarks" / "convergence.jsonl").read_text().splitlines()
    results = Results([json.loads(line) for line in lines])
    document = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    written = document.partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == tables(results).strip(), "run benchmarks/convergence.py with --markdown"
