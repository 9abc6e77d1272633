"""Which way through a model fits, and what is kept where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, llama_config, save_model

from loraga_dist.config import GradientConfig, InitConfig, parse_config
from loraga_dist.errors import UserError
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.ways import Room
from loraga_dist.gradients.kept import FreeSpace, Keeping, choose_keeping

THERE = Path("there")


def keeping(memory: float | None, files: float | None, *, device: float | None = None, **gradient: Any) -> Keeping:
    """Of 10 microbatches that take 100 bytes, 10 more in memory, and 20 on a device while they wait."""
    return choose_keeping(
        kept_bytes=100,
        resident_bytes=10,
        between_bytes=20,
        num_microbatches=10,
        free=FreeSpace(memory_bytes=memory, files_bytes=files, device_bytes=device, directory=THERE),
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


def forecaster(directory: Path, world_size: int = 1, kind: str | None = None, **gradient: Any) -> Forecaster:
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
        gradient=gradient,
        calibration={"max_samples": 4, "per_device_batch_size": 1},
    )
    tree["model"]["dtype"] = "float32"
    return Forecaster.of_config(parse_config(InitConfig, tree), world_size, torch.device("cuda"))


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


def test_ranks_have_what_the_least_of_them_has() -> None:
    rooms = [Room(device_bytes=5, host_bytes=7), Room(device_bytes=6, host_bytes=3)]
    assert Room.least(map(vars, rooms)) == Room(device_bytes=5, host_bytes=3)
