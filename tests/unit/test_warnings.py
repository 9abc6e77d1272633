"""What a report warns of, and when it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import target_tree

from loraga_dist.artifacts.report import IdentityCheck, TargetReport
from loraga_dist.artifacts.warnings import MANY_ROUNDINGS, find_warnings
from loraga_dist.config import SchemeConfig
from loraga_dist.schemes import SCALES, SchemeInputs

ADVICE = {
    "max_samples": "raise calibration.max_samples, or write auto",
    "sample_limit": "raise calibration.sample_limit",
    "target_cosine": "raise calibration.target_cosine",
    "data": "add more",
}


def warnings_of(
    *changes: dict[str, Any],
    stopped_by: str | None = "max_samples",
    refine_passes: int = 0,
    **init: Any,
) -> list[str]:
    """For targets t0, t1, ... that are fine but for the changes."""
    targets = {f"t{number}": TargetReport(**target_tree(**change)) for number, change in enumerate(changes)}
    return find_warnings(SchemeConfig(**init), targets, stopped_by=stopped_by, refine_passes=refine_passes)


def test_nothing_to_say_at_the_bounds_or_of_what_is_unknown() -> None:
    assert warnings_of({}, {"split_half_cosine": None, "window_capture": None}, {"offset_ratio": float("nan")}) == []


@pytest.mark.parametrize(
    ("change", "says", "advises"),
    [
        ({"offset_ratio": 1.25}, "offset_ratio above 1", ["lower lora.lora_alpha", "raise init.stable_gamma"]),
        ({"split_half_cosine": 0.32}, "split_half_cosine below 0.5", ["raise calibration.max_samples"]),
        ({"window_capture": 0.41}, "window_capture below 0.7", ["gradient.refine_passes 1", "per_device_batch_size"]),
        (
            {"numerical_rank": 3},
            "fewer directions than LoRA-GA takes",
            ["lower lora.r", "raise calibration.max_samples"],
        ),
    ],
)
def test_one_line_with_target_figure_and_advice(change: dict[str, Any], says: str, advises: list[str]) -> None:
    (line,) = warnings_of({}, change)
    ((figure,),) = [change.values()]
    assert says in line and f"1 of 2 targets (t1 {figure})" in line
    assert all(advice in line for advice in advises)


def test_a_budget_that_buys_no_more_is_said() -> None:
    assert warnings_of({}, {"shape": [6, 4]}, rank_budget=89) == []
    (line,) = warnings_of({}, {"shape": [6, 4]}, rank_budget=90)
    assert "init.rank_budget 90: 10 parameters were not spent" in line and "raise lora.r" in line


def test_the_worst_targets_come_first_and_the_rest_are_counted() -> None:
    noisy = [{"split_half_cosine": cosine} for cosine in (0.4, 0.1, 0.3, 0.2, 0.9)]
    (line,) = warnings_of(*noisy)
    assert "in 4 of 5 targets (t1 0.1, t3 0.2, t2 0.3, ...)" in line
    (line,) = warnings_of({"offset_ratio": 2.0}, {"offset_ratio": 3.0})
    assert "in 2 of 2 targets (t1 3, t0 2)" in line


@pytest.mark.parametrize("stopped_by", ADVICE)
def test_more_data_comes_from_what_ended_it(stopped_by: str) -> None:
    for change in ({"split_half_cosine": 0.1}, {"numerical_rank": 1}):
        (line,) = warnings_of(change, stopped_by=stopped_by)
        assert ADVICE[stopped_by] in line


def test_a_refine_pass_mends_what_a_window_missed() -> None:
    assert warnings_of({"window_capture": 0.1}, refine_passes=1) == []


def test_other_schemes_are_told_what_helps_them() -> None:
    (line,) = warnings_of({"numerical_rank": 3}, scheme="lora_one")
    assert "fewer directions than LoRA-One takes in" in line and "rows of A and columns of B start near zero" in line
    without_gradient = dict.fromkeys(("split_half_cosine", "window_capture", "numerical_rank", "singular_values"))
    assert warnings_of(without_gradient, scheme="pissa", stopped_by=None) == []
    (line,) = warnings_of(without_gradient | {"offset_ratio": 2.0}, scheme="olora", stopped_by=None)
    assert "lower lora.lora_alpha; output.residual_dtype float32" in line


@pytest.mark.parametrize("scale", SCALES)
def test_the_advice_makes_the_offset_smaller(scale: str) -> None:
    (line,) = warnings_of({"offset_ratio": 2.0}, scale=scale)

    def size(scaling: float = 2.0, stable_gamma: float = 16.0) -> float:
        S_R = torch.tensor([2.0, 1.0])
        inputs = SchemeInputs(
            M=64,
            N=32,
            r=2,
            scaling=scaling,
            direction="ArB2r",
            scale=scale,
            stable_gamma=stable_gamma,
            generator=torch.Generator(),
            weight_S_K=S_R,
        )
        A, B = SCALES[scale].multipliers(inputs, S_R)
        return scaling * torch.as_tensor(A * B).norm().item()

    assert ("lower lora.lora_alpha" in line) == (size(scaling=1.0) < 0.9 * size())
    assert ("raise lora.lora_alpha" in line) == (size(scaling=4.0) < 0.9 * size())
    assert ("raise init.stable_gamma" in line) == (size(stable_gamma=64.0) < 0.9 * size())
    assert ("write init.scale" in line) == (size(scaling=1.0) == pytest.approx(size()))


def test_a_start_that_is_further_off_than_another_rounding_is_warned_of() -> None:
    def warned(kl: float, scheme: str = "lora_ga") -> list[str]:
        check = IdentityCheck(
            max_abs_logit_diff=1.0, max_abs_logit=9.0, dtype="bfloat16", kl=kl, kl_of_rounding=2.0**-10
        )
        init = SchemeConfig.model_validate({"scheme": scheme})
        return find_warnings(init, {}, stopped_by=None, refine_passes=None, identity=check)

    assert warned(MANY_ROUNDINGS * 2.0**-10) == []
    (line,) = warned(8 * 2.0**-10)
    assert "KL from the model 0.0078 per token, 8 x that of another bfloat16 rounding" in line
    assert "output.residual_dtype float32" in line and "raise init.stable_gamma" in line
    assert "init.scheme lora_one or rrr or rrr_step or kaiming" in line
    assert "lower lora.lora_alpha" in warned(8 * 2.0**-10, "pissa")[0]
