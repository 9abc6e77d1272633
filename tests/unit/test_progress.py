"""What phases say of themselves, and the seconds they took."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator

import pytest
import torch

from loraga_dist.gradients.passes import is_time_to_look, steps_to_reach
from loraga_dist.ranks import progress
from loraga_dist.ranks.progress import Clock, phase


@pytest.fixture
def every_step_is_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    yield


def test_a_phase_says_when_it_begins_how_far_it_is_and_when_it_has_ended(
    every_step_is_said: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with phase("calibrate", 8, "batches", shown=True) as steps:
        assert capsys.readouterr().err == "calibrate: 8 batches\n"
        steps.advance()
        assert re.fullmatch(r"calibrate: 1 of 8 batches, .* batches/s, \d+ s left\n", capsys.readouterr().err)
        steps.extend(-6)
        steps.note("split-half cosine 0.50 of 0.9")
        steps.advance()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"calibrate: 2 batches in \d+\.\d s; split-half cosine 0.50 of 0.9", line)


def test_only_the_whole_is_known_of_some_phases_and_parts_of_others_are_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with phase("load", 269 * 10**6, "B", shown=True, counted=False):
        pass
    first, last = capsys.readouterr().err.splitlines()
    assert first == "load: 269MB" and last.startswith("load: 269MB in ")
    with phase("factorize", 3, "targets", shown=True, nested=True) as steps:
        steps.advance(3)
    with phase("calibrate", 3, "batches", shown=False) as steps:
        steps.advance(3)
    with pytest.raises(ZeroDivisionError), phase("write", 3, "B", shown=True):
        raise ZeroDivisionError
    assert capsys.readouterr().err == "write: 3.00B\n", "what failed has not ended"


def test_looks_are_few_and_soon_enough() -> None:
    assert [number for number in range(50) if is_time_to_look(number)] == [4, 6, 8, 12, 16, 24, 32, 48]


@pytest.mark.parametrize("target", [0.4, 0.9])
def test_the_look_at_which_halves_will_agree_is_foretold(target: float) -> None:
    """From halves of samples of gradients that are a mean and noise, which averages out as chance has it."""
    generator = torch.Generator().manual_seed(0)
    size, noise, most = 4000, 5.0, 1024
    mean = torch.randn(size, generator=generator)
    even, odd = torch.zeros(size), torch.zeros(size)
    foretold, reached = {}, None
    for step in range(1, most + 1):
        half = even if step % 2 else odd
        half += mean + noise * torch.randn(size, generator=generator)
        if is_time_to_look(step):
            cosine = torch.nn.functional.cosine_similarity(even, odd, dim=0).item()
            if cosine >= target:
                reached = step
                break
            foretold[step] = steps_to_reach(target, cosine, step, most)
    assert reached is not None and len(foretold) > 4
    # halves that hardly agree yet tell little
    assert all(reached / 1.6 <= steps <= reached * 1.6 for step, steps in foretold.items() if step >= reached / 4)
    assert all(is_time_to_look(steps) and steps > step for step, steps in foretold.items())


def test_the_figures_of_the_configuration_and_what_never_agrees() -> None:
    assert steps_to_reach(0.9, 0.53, 256, 10**6) == 2048, "as calibration.sample_limit says"
    assert steps_to_reach(0.9, -0.1, 4, 2048) == steps_to_reach(0.9, 0.0, 4, 2048) == 2048
    assert steps_to_reach(0.9, 0.899, 8, 2048) == 12, "the next look"
    assert steps_to_reach(0.9, 0.899, 8, 10) == 10, "all there is"


def test_a_clock_goes_on_from_what_earlier_runs_took() -> None:
    first = Clock()
    with first.phase("load"):
        time.sleep(0.02)
    with first.phase("calibrate"):
        time.sleep(0.02)
        saved = first.seconds  # in the middle of it
    assert list(saved) == ["load", "calibrate", "total"]
    assert saved["load"] >= 0.02 and saved["calibrate"] >= 0.02
    second = Clock()
    with second.phase("load"):
        time.sleep(0.01)
    second.go_on_from(saved)
    for _ in range(2):
        with second.phase("calibrate"):
            time.sleep(0.01)
    found = second.seconds
    assert list(found) == ["load", "calibrate", "total"]
    assert math.isclose(found["load"], saved["load"] + 0.01, abs_tol=0.02)
    assert found["calibrate"] >= saved["calibrate"] + 0.02
    assert found["total"] >= found["load"] + found["calibrate"]
