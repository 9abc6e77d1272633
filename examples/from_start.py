"""What the three scripts share: a start's base, data in all formats of calibration, a look at the first losses."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from peft import PeftConfig
from transformers import TrainerCallback

from loraga_dist.artifacts.report import Report
from loraga_dist.config import CalibrationConfig
from loraga_dist.data.samples import Sample, load_samples
from loraga_dist.errors import LoragaError


def base_of(loraga_dir: Path) -> tuple[str, dict[str, Any]]:
    """Name or directory of the model that the adapter in `loraga_init` belongs on, and what `from_pretrained` needs
    beside it."""
    how: dict[str, Any] = {"trust_remote_code": Report.read(loraga_dir).config.model.trust_remote_code}
    if (loraga_dir / "residual_base").exists():
        return str(loraga_dir / "residual_base"), how
    adapter = PeftConfig.from_pretrained(loraga_dir / "loraga_init")  # a scheme that leaves the base as it is
    assert adapter.base_model_name_or_path is not None, "every start names it"
    return adapter.base_model_name_or_path, {**how, "revision": adapter.revision}


def read_samples(data: str, calibration: CalibrationConfig, tokenizer: Any, num_samples: int) -> list[Sample]:
    """The file's first samples, shuffled, with the token ids and labels that calibration would make of them.

    calibration: of the start, which says what columns mean, where there is a loss, and what is too long.
    Ends the script with one line where the file holds none, or what a supervised loss does not train on.
    """
    here = {"data_files": data, "dataset_name": None, "dataset_config": None, "split": "train"}
    config = calibration.model_copy(update={**here, "max_samples": num_samples})
    try:
        samples = load_samples(config, tokenizer, task_type="CAUSAL_LM", max_positions=None)
    except LoragaError as error:
        sys.exit(str(error))
    if samples[0].weight is not None:
        sys.exit(f"{data} holds preferences or rewards: train with TRL's DPOTrainer or GRPOTrainer")
    return samples


class FirstLosses:
    """Warns, once, when the loss of steps 6 to 10 is above the first step's by more than batches differ."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.losses: list[float] = []

    def warning(self, loss: float) -> str | None:
        """A line, or None; loss: of one more step."""
        self.losses.append(loss)
        if len(self.losses) != 10:
            return None
        first, later = self.losses[0], self.losses[5:]
        is_finite = math.isfinite(sum(self.losses))
        if is_finite and mean(later) - first <= 2 * math.sqrt(1 + 1 / len(later)) * stdev(later):
            return None
        return (
            f"warning: the loss rises, from {first:.3f} in the first step to {mean(later):.3f} over steps 6 to 10; "
            f"write a --learning_rate below {self.learning_rate:g}"
        )


class WarnOfFirstLosses(TrainerCallback):
    """The same in a Trainer that logs every step."""

    def __init__(self, learning_rate: float) -> None:
        self.first_losses = FirstLosses(learning_rate)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            line = self.first_losses.warning(float(logs["loss"]))
            if line:
                print(line, flush=True)
