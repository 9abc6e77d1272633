"""Which way through a model fits, and what is kept where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, llama_config, save_data, save_model
from outputs import make_output

from loraga_dist.config import GradientConfig, InitConfig, parse_config
from loraga_dist.errors import UserError
from loraga_dist.forecast.advice import advice
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.report import PlanReport
from loraga_dist.forecast.ways import Room, verdict
from loraga_dist.gradients.block_order import BlockOrder
from loraga_dist.gradients.kept import FreeSpace, Keeping, choose_keeping
from loraga_dist.ranks.world import World
from loraga_dist.request.request import understand

THERE = Path("there")


def keeping(
    memory: float | None, files: float | None, *, device: float | None = None, beside_one: bool = False, **gradient: Any
) -> Keeping:
    """Of 10 microbatches that take 100 bytes, 10 more in memory, and 20 on a device while they wait."""
    return choose_keeping(
        kept_bytes=100,
        resident_bytes=10,
        between_bytes=20,
        num_microbatches=10,
        free=FreeSpace(
            memory_bytes=memory, files_bytes=files, device_bytes=device, directory=THERE, beside_one=beside_one
        ),
        gradient=GradientConfig.model_validate(gradient),
    )


@pytest.mark.parametrize(
    ("memory", "files", "chunk", "directory"),
    [
        (None, None, None, None),
        (2200, 0, None, None),  # all in half of what is free
        (2199, 2000, None, THERE),
        (2199, 1999, 9, None),  # as many in memory as in files: in memory
        (1100, 1999, 9, THERE),
        (300, 10**6, None, THERE),
        (60, 10**6, 3, THERE),  # what stays in memory has no room
    ],
)
def test_all_in_memory_else_in_files_else_as_many_as_fit(
    memory: float | None, files: float | None, chunk: int | None, directory: Path | None
) -> None:
    assert keeping(memory, files) == Keeping(chunk_microbatches=chunk, directory=directory)


@pytest.mark.parametrize(("device", "chunk"), [(180, None), (179, 9), (39, 2), (0, 1)])
def test_no_more_wait_than_the_device_has_room_for(device: float, chunk: int | None) -> None:
    assert keeping(None, None, device=device) == Keeping(chunk_microbatches=chunk)
    assert keeping(1300, 0, device=device) == Keeping(chunk_microbatches=min(chunk or 10, 5))


def test_a_first_microbatch_that_is_counted_already_is_not_counted_again() -> None:
    def beside_one(memory: float, files: float, **gradient: Any) -> Keeping:
        return keeping(memory, files, beside_one=True, **gradient)

    assert beside_one(220, 0) == Keeping(chunk_microbatches=2)
    assert beside_one(1, 10**6) == Keeping(chunk_microbatches=1)
    assert beside_one(0, 10**6) == Keeping(chunk_microbatches=1, directory=THERE)
    assert beside_one(0, 0) == Keeping(chunk_microbatches=1), "the plan says that it is too large"
    with pytest.raises(UserError, match=r"gradient.activations_dir"):
        beside_one(10**6, 0, activations_dir="there")


def test_the_users_choice_is_kept_or_refused() -> None:
    assert keeping(None, None, chunk_microbatches=3) == Keeping(chunk_microbatches=3)
    assert keeping(700, 10**6, chunk_microbatches=3) == Keeping(chunk_microbatches=3)
    assert keeping(600, 10**6, chunk_microbatches=3) == Keeping(chunk_microbatches=3, directory=THERE)
    assert keeping(None, None, activations_dir="there") == Keeping(directory=THERE)
    assert keeping(10**6, 500, activations_dir="there") == Keeping(chunk_microbatches=2, directory=THERE)
    with pytest.raises(UserError, match=r"gradient.chunk_microbatches.*2 at most"):
        keeping(500, 500, chunk_microbatches=3)
    for memory, files, chosen in ((200, 100, {}), (10**6, 100, {"activations_dir": "there"})):
        with pytest.raises(UserError, match=r"gradient.activations_dir.*calibration.max_length"):
            keeping(memory, files, **chosen)


def forecaster(
    directory: Path,
    world_size: int = 1,
    kind: str | None = None,
    device: str = "cuda",
    scheme: str = "lora_ga",
    calibration: dict[str, Any] | None = None,
    **gradient: Any,
) -> Forecaster:
    model = directory / "model"
    if kind is None:
        llama_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=12).save_pretrained(model)
    elif not model.exists():
        save_model(model, kind)
    tree = config_tree(
        model,
        directory / "none.jsonl",
        directory / "out",
        kind=kind or "llama",
        init={"scheme": scheme},
        gradient=gradient,
        calibration={"max_samples": 4, "per_device_batch_size": 1} | (calibration or {}),
    )
    tree["model"]["dtype"] = "float32"
    return Forecaster.of_config(parse_config(InitConfig, tree), world_size, torch.device(device))


def titles(directory: Path, *arguments: Any, **gradient: Any) -> list[str]:
    return [way.title for way in forecaster(directory, *arguments, **gradient).ways()]


def test_ways_are_what_the_settings_and_the_model_allow(tmp_path: Path) -> None:
    llama, t5 = tmp_path / "llama", tmp_path / "t5"
    assert titles(llama) == ["model order", "block order", "block order from disk"]
    assert titles(llama, checkpointing="non_reentrant")[0] == "model order, blocks recomputed"
    assert titles(llama, order="model") == ["model order", "model order, blocks recomputed"]
    assert titles(llama, order="block") == ["block order", "block order from disk"]
    assert titles(llama, 2) == ["block order"]
    assert titles(llama, 2, order="model") == ["model order, blocks recomputed"]
    assert titles(llama, 2, order="model", checkpointing="none") == ["model order"]
    assert titles(t5, 1, "t5") == ["model order", "model order, blocks recomputed"]
    assert titles(t5, 2, "t5") == ["model order, blocks recomputed"]
    with pytest.raises(UserError, match=r"gradient.order"):
        titles(t5, 1, "t5", order="block")


def test_the_first_way_that_fits_is_taken(tmp_path: Path) -> None:
    asked = forecaster(tmp_path, state_device="device")
    shapes = asked.largest_allowed()
    assert asked.fitting(Room()).way == next(asked.ways())
    peaks = {way.title: replace(asked, chosen=way).worst(shapes).peak_bytes for way in asked.ways()}
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
    for title, peak_bytes in peaks.items():
        fitted = asked.fitting(Room(device_bytes=1.12 * peak_bytes))
        assert fitted.way.title == title
        assert fitted.worst(shapes).peak_bytes == peak_bytes
    assert asked.fitting(Room(device_bytes=1000)).way.title == "block order from disk", "that needs least"


def test_where_memory_is_short_one_microbatch_waits_in_files(tmp_path: Path) -> None:
    asked = forecaster(tmp_path, 2, device="cpu").changed(calibration={"max_samples": 256, "max_length": 512})
    shapes = asked.largest_allowed()
    one = Keeping(chunk_microbatches=1, directory=asked.files_directory)
    least = replace(asked, chosen=replace(asked.way, keeping=one)).worst(shapes).peak_bytes
    for share, expected in ((1.12, "fits"), (0.9, "tight"), (0.5, "too large")):
        found = asked.fitting(Room(device_bytes=share * least))
        assert found.way.keeping.directory == asked.files_directory and found.peak_bytes <= least
        assert (found.way.keeping == one) == (expected == "fits"), (
            "where that does not fit, all in files takes less here"
        )
        assert verdict(found.peak_bytes, share * least) == expected
        assert all("inf" not in line for line in advice(found, share * least))
    without_files = asked.fitting(Room(device_bytes=least, files_bytes=0))
    assert without_files.peak_bytes > least and without_files.way.keeping == Keeping(chunk_microbatches=1)


def test_ranks_have_what_the_least_of_them_has() -> None:
    rooms = [Room(device_bytes=5, host_bytes=7), Room(device_bytes=6, host_bytes=3)]
    assert Room.least(map(vars, rooms)) == Room(device_bytes=5, host_bytes=3)


@pytest.mark.parametrize("max_samples", [24, "auto"])
def test_data_goes_through_the_blocks_as_often_as_planned(
    max_samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data.jsonl")
    calibration = {"max_samples": max_samples, "sample_limit": 24, "per_device_batch_size": 1, "target_cosine": 0.9999}
    tree = config_tree(model, data, tmp_path / "out", gradient={"order": "block"}, calibration=calibration)
    chunks: list[int] = []
    begin = BlockOrder._begin
    monkeypatch.setattr(BlockOrder, "_begin", lambda self, chunk: (chunks.append(len(chunk)), begin(self, chunk)))
    make_output(tree)
    config = parse_config(InitConfig, tree)
    planned = PlanReport(forecaster=Forecaster.of_config(config, 1, torch.device("cpu"))).course
    assert chunks == ([24] if max_samples == 24 else [4, 2, 2, 4, 4, 8])
    assert (planned.num_chunks, planned.num_first_chunks) == (1, len(chunks))


def test_a_change_has_the_data_that_it_leaves(tmp_path: Path) -> None:
    asked = forecaster(tmp_path, calibration={"max_length": 64, "per_device_batch_size": 2})
    for change in ({"max_length": 32}, {"per_device_batch_size": 1}):
        written = forecaster(tmp_path, calibration={"max_length": 64, "per_device_batch_size": 2} | change)
        assert asked.changed(calibration=change).request.amount == written.request.amount != asked.request.amount


def test_a_plan_counts_the_search_for_a_step(tmp_path: Path) -> None:
    asked = forecaster(tmp_path, 2, scheme="rrr_step", calibration={"max_samples": 40, "max_length": 64})
    shape, found = asked.request.shape, PlanReport(forecaster=asked)
    given = PlanReport(forecaster=asked.changed(init={"step": 0.004}))
    forwards = 5 * 5  # lengths, and microbatches on each rank of the 10 samples kept apart
    assert found.work.traffic_bytes_per_rank["step searched"] == forwards * sum(shape.numels) * 4 // 2
    assert "step searched" not in given.work.traffic_bytes_per_rank
    assert found.work.flops["model"] - given.work.flops["model"] == 5 * 10 * 64 * 2 * shape.linear_numel


def test_a_plan_counts_the_moments_of_inputs(tmp_path: Path) -> None:
    asked = forecaster(tmp_path, scheme="rrr", calibration={"max_samples": 400, "max_length": 1024})
    num_tokens = 400 * 128  # the model has no more positions
    assert asked.request.moment_share == 16384 / num_tokens
    whole, sampled = (asked.changed(init={"whitening": whitening}) for whitening in ("exact", "sampled"))
    engines = [PlanReport(forecaster=each).work.flops["engine"] for each in (whole, sampled)]
    each_token = 12 * (6 * 512**2 + 1024**2)
    assert engines[0] - engines[1] == (num_tokens - 16384) * each_token


def test_a_plan_of_short_texts_counts_the_pass_that_refines(tmp_path: Path) -> None:
    tree = config_tree(save_model(tmp_path / "model"), save_data(tmp_path / "data.jsonl"), tmp_path / "out")
    tree["gradient"] = {"engine": "sketch", "refine_passes": "auto"}
    tree["calibration"]["per_device_batch_size"] = 1
    config = parse_config(InitConfig, tree)
    known = PlanReport(forecaster=Forecaster.of(understand(config, World.alone()), World.alone()))
    unknown = PlanReport(forecaster=Forecaster.of_config(config, 1, torch.device("cpu")))
    assert (known.refine_passes, unknown.refine_passes) == (1, 0)
    assert json.loads((make_output(tree) / "loraga_report.json").read_text())["refine_passes"] == 1
