"""DeepSpeed's settings: what of the user's is taken, what is refused, and what of them others must know."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraga_dist.errors import UserError, blame

_ZERO = "deepspeed.zero_optimization"


@dataclass(frozen=True, kw_only=True)
class Holding:
    """How ranks will hold a model."""

    is_sharded: bool
    """By ZeRO-3; else whole, in a single process."""
    offloads_weights: bool
    """The shards lie on the host, beside a device that computes (offload_param)."""

    @classmethod
    def of(cls, deepspeed: str | dict[str, Any] | None, world_size: int) -> Holding:
        """From the section `deepspeed` and the number of ranks; raises UserError like `read_deepspeed_config`."""
        zero = read_deepspeed_config(deepspeed).get("zero_optimization", {})
        is_sharded = world_size > 1 or deepspeed is not None
        offloads = (zero.get("offload_param") or {}).get("device") == "cpu"
        return cls(is_sharded=is_sharded, offloads_weights=is_sharded and offloads)


def read_deepspeed_config(value: str | dict[str, Any] | None) -> dict[str, Any]:
    """The user's DeepSpeed settings as a dict; raises UserError when they are not ZeRO stage 3 or cannot be read."""
    if isinstance(value, str):
        with blame("deepspeed", value, "cannot be read", "write the path of a JSON file"):
            settings = json.loads(Path(value).read_text())
    else:
        settings = dict(value or {})
    if not isinstance(settings, dict):
        raise UserError("deepspeed", value, "must hold DeepSpeed's settings as one JSON object")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 3) != 3:
        raise UserError(f"{_ZERO}.stage", zero, "must be 3: the model is sharded by ZeRO-3")
    offload = zero.get("offload_param") or {}
    if not isinstance(offload, dict):
        raise UserError(f"{_ZERO}.offload_param", offload, "must be an object; write {device: cpu}")
    if offload.get("device") == "nvme":
        raise UserError(f"{_ZERO}.offload_param.device", "nvme", "is not supported; write cpu or none")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key, False) not in (False, "auto"):
            problem = "would gather weights in 8 bits and take the gradients of those; write false"
            raise UserError(f"{_ZERO}.{key}", zero[key], problem)
    if zero.get("zero_hpz_partition_size", 1) not in (1, "auto"):
        raise UserError(f"{_ZERO}.zero_hpz_partition_size", zero["zero_hpz_partition_size"], "write 1")
    return settings


def import_deepspeed() -> None:
    """Import it, on a host without GPUs, too. Raises UserError where it is missing."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        importlib.import_module("deepspeed")
    except ImportError as error:
        problem = "is not installed, and several ranks or a deepspeed section need it; pip install deepspeed"
        raise UserError("deepspeed", None, problem) from error


def require_usable(value: str | dict[str, Any] | None) -> None:
    """Raise UserError for settings that are not ZeRO stage 3, or that DeepSpeed itself refuses."""
    user = read_deepspeed_config(value)
    if "zero_optimization" not in user:
        return
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with blame(_ZERO, user["zero_optimization"], "DeepSpeed refuses it", "write keys and values of its documentation"):
        DeepSpeedZeroConfig(**calibration_settings(user, torch.float32)["zero_optimization"])


def calibration_settings(user: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Stage 3, no optimizer, one module gathered at a time; of the user's settings the ZeRO section is kept.

    These flags, not `zero.Init`'s dtype argument, fix the dtype: DeepSpeed ignores that one where fp16 is unsupported.
    """
    # ours come last: persistent or prefetched parameters would stay gathered while their shards are edited
    zero = {key: value for key, value in user.get("zero_optimization", {}).items() if value != "auto"}
    zero |= {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
