"""The figures of a finished run in TensorBoard or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loraga_dist.artifacts.names import TENSORBOARD
from loraga_dist.artifacts.report import Report
from loraga_dist.config import OutputConfig
from loraga_dist.errors import RunError, UserError
from loraga_dist.ranks.world import dotted

_PER_TARGET = ("captured_energy", "split_half_cosine", "window_capture", "offset_ratio", "numerical_rank")
_TOTALS = ("num_sequences", "num_supervised_tokens", "split_half_cosine", "mean_loss", "state_bytes_per_rank")


def check_trackers(config: OutputConfig) -> None:
    """Raise UserError for a tracker whose package is not installed, or that would ask for a login after the run."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise UserError("output.report_to", name, f"is not installed; pip install {name}, or write none")
    if "wandb" in config.trackers and not _wandb_can_log():
        problem = "has no login; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE to offline"
        raise UserError("output.report_to", "wandb", problem)


def _wandb_can_log() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def track(directory: Path, report: Report) -> None:
    """Log a report's figures and configuration; rank 0 alone calls this, when `directory` is in place.

    TensorBoard's events go to `tensorboard/` in it, Weights & Biases' own files beside it. Raises RunError when a
    tracker fails.
    """
    trackers = report.config.output.trackers
    if not trackers:
        return
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # accelerate's logger wants one
    for name in trackers:
        try:
            if name == "tensorboard":
                tracker: Any = TensorBoardTracker(TENSORBOARD, directory)
            else:
                project = os.environ.get("WANDB_PROJECT", "loraga_dist")
                tracker = WandBTracker(project, name=directory.name, dir=str(directory.parent))
            tracker.main_process_only = False  # this is rank 0; the state above need not say so
            tracker.start()
            settings = dict(dotted(report.config.model_dump()))
            tracker.store_init_configuration({key: _plain(value) for key, value in settings.items() if value != {}})
            tracker.log(dict(figures(report)), step=0)
            tracker.finish()
        except Exception as error:  # each service has errors of its own
            raise RunError(
                f"report_to: {name} failed ({type(error).__name__}: {error}); the output in {directory} is complete "
                "and verified"
            ) from error


def figures(report: Report) -> Iterator[tuple[str, float]]:
    """Names and values of all that is a number: totals, seconds, bytes by rank, and what is known of every target."""
    numbers: dict[str, float | None] = {name: getattr(report, name) for name in _TOTALS}
    numbers |= {f"seconds/{phase}": seconds for phase, seconds in report.seconds.items()}
    for name in ("peak_bytes_per_rank", "planned_peak_bytes_per_rank"):
        numbers |= {f"{name}/{rank}": number for rank, number in enumerate(getattr(report, name))}
    if report.identity_check:
        for name in ("max_abs_logit_diff", "kl", "kl_of_rounding", "mean_loss_before", "mean_loss_after"):
            numbers[f"identity_check/{name}"] = getattr(report.identity_check, name)
    for target, found in report.targets.items():
        numbers |= {f"{name}/{target}": getattr(found, name) for name in _PER_TARGET}
    yield from ((name, number) for name, number in numbers.items() if number is not None)


def _plain(value: Any) -> bool | int | float | str:
    """As trackers take it."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
