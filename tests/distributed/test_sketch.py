"""The sketch engine against dense sums, on streams that are hard for it, and on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run_ranks, succeed

from loraga_dist.artifacts.warnings import LOW_WINDOW_CAPTURE

WORKER = str(Path(__file__).with_name("sketch_worker.py"))


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("sketch") / "result.json"
    succeed(run_ranks([WORKER, str(path)], request.param))
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("stream", "one_pass", "refined"),
    [
        ("plain", 0.9995, 0.9999),
        ("bfloat16", 0.9995, 0.9999),
        ("few tokens", 0.99, 0.9999),
        ("late", 0.9995, 0.9999),
        ("one microbatch", 0.999, 0.9999),
        ("many tokens a microbatch", 0.9995, 0.9999),
        ("fewer tokens than triplets", 0.9999, 0.9999),
    ],
)
def test_efficiency(results: dict, stream: str, one_pass: float, refined: float) -> None:
    assert results["factorized"][f"{stream}, 0 refinements"]["efficiency"] >= one_pass
    assert results["factorized"][f"{stream}, 1 refinements"]["efficiency"] >= refined


def test_what_it_says_of_itself_is_true(results: dict) -> None:
    right = {name: result for name, result in results["factorized"].items() if result["efficiency"] > 0.99}
    assert set(results["factorized"]) - set(right) <= {"two tasks in turn, 0 refinements"}
    for name, result in right.items():
        assert result["orthonormality"] < 1e-4, name
        assert result["captured"] == pytest.approx(result["captured_truth"], abs=0.15), name
        for found, truth in zip(result["singular_values"], result["singular_values_truth"], strict=True):
            assert found == pytest.approx(truth, rel=0.1, abs=1e-3 * result["singular_values_truth"][0]), name


def test_window_capture_falls_when_the_data_changes(results: dict) -> None:
    captures = {name: result["window_capture"] for name, result in results["factorized"].items()}
    assert captures["two tasks in turn, 0 refinements"] < LOW_WINDOW_CAPTURE
    assert captures["plain, 0 refinements"] > LOW_WINDOW_CAPTURE
    assert captures["late, 0 refinements"] > LOW_WINDOW_CAPTURE
    assert captures["one microbatch, 0 refinements"] is None, "there is nothing to compare with"


@pytest.mark.parametrize("engine", ["ExactEngine", "SketchEngine"])
@pytest.mark.parametrize("stream", ["plain", "late"])
def test_halves_can_be_compared_at_any_time(results: dict, engine: str, stream: str) -> None:
    found = results["cosines"][f"{engine}, {stream}"]
    assert found["asked"][0] is None, "a single microbatch has no halves"
    assert found["asked"][1:] == pytest.approx(found["truth"][1:], abs=0.1)
    assert found["asked"][-1:] == found["found"], "asking does not change the answer"
