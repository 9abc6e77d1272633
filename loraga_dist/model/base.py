"""From the user's model section to a transformers class, its config and a compute dtype; no weights are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn

from loraga_dist.config import Dtype, ModelConfig, TaskType
from loraga_dist.errors import RunError, UserError, blame
from loraga_dist.files.checksums import sha256_of
from loraga_dist.files.disk import MAX_JSON_BYTES, BrokenFileError, read_json
from loraga_dist.files.quantized import QuantizedSlot, dequantized
from loraga_dist.files.safetensors_io import Entries, TensorSlot, scan_checkpoint
from loraga_dist.files.stored_tensors import Slot, entries_of
from loraga_dist.model.classes import find_class
from loraga_dist.model.conversion import StoredModel, stored_model

_MODEL_KEY = "model.name_or_path"
MOST_LAYERS = 10_000
"""Where a config.json is all there is."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A pretrained checkpoint, found and understood but not loaded."""

    directory: Path
    index: dict[str, TensorSlot]
    """What its files hold."""
    model_class: type[nn.Module]
    config: Any
    """Of the model in floating point."""
    dtype: torch.dtype
    class_name: str | None = None
    """As `model.class`; None where nobody has to say it."""
    quantization: Mapping[str, Any] | None = None
    """What config.json says of quantized weights."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Its `base_identity`, taken when it was read."""

    @cached_property
    def weights(self) -> dict[str, Slot]:
        """What the files hold, or what that stands for where they are quantized. Raises UserError as `dequantized`."""
        return dequantized(self.index, self.quantization, self.dtype)

    @property
    def entries(self) -> Entries:
        """Dtypes and shapes of the checkpoint's tensors, as if it held floats."""
        return entries_of(self.weights)

    def stored(self, meta_model: nn.Module) -> StoredModel:
        """Where the model's parameters lie. Raises UserError as `stored_model`, and for what transformers would have to
        convert of a quantized checkpoint, or fill in."""
        found = stored_model(meta_model, self.weights)
        if self.quantization is not None and self.index and found.as_it_is is None:
            name = [*found.lacking, *found.changed][0]
            made = "is not in the checkpoint" if found.lacking else "is not made of whole tensors of the checkpoint"
            quantized = f"which is quantized ({self.quantization['quant_method']})"
            raise UserError(_MODEL_KEY, name, f"{made}, {quantized}; write one in floating point")
        return found


def find_base_model(
    config: ModelConfig, task_type: TaskType, device: torch.device, *, needs_weights: bool = True
) -> BaseModel:
    """Resolve path or hub id, read headers and config; raises UserError for anything that will not load.

    needs_weights: without, a directory may hold a config.json alone (the index is then empty), and nothing else is
    downloaded from the hub.
    """
    from transformers import AutoConfig

    directory = resolve_model_dir(config.name_or_path, config.revision, needs_weights=needs_weights)
    has_weights = any(directory.glob("*.safetensors*"))
    index = read_checkpoint_index(directory) if needs_weights or has_weights else {}
    if (directory / "adapter_config.json").is_file():
        problem = "has an adapter_config.json beside its weights, so that transformers would load that adapter, too"
        raise UserError(_MODEL_KEY, config.name_or_path, f"{problem}; write a copy without it")
    instead = "write a model that transformers loads"
    identity = base_identity(directory, index)
    with blame(_MODEL_KEY, config.name_or_path, "its config.json does not load", instead):
        hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
        if config.attn_implementation is not None:
            hf_config._attn_implementation = config.attn_implementation
        _require_countable_layers(config, hf_config, index)
        for holder in (hf_config, hf_config.get_text_config()):  # else the model would be built of quantized layers
            vars(holder).pop("quantization_config", None)
        found = find_class(config, hf_config, task_type, directory)
        base = BaseModel(
            directory=directory,
            index=index,
            model_class=found.model_class,
            config=found.config,
            class_name=found.class_name,
            dtype=_compute_dtype(config.dtype, hf_config, index, device),
            quantization=quantization_of(directory),
            identity=identity,
        )
        assert base.weights is not None, "formats that cannot be read are refused here"
        return base


def quantization_of(model_dir: Path) -> dict[str, Any] | None:
    """What a model's config.json says of quantized weights; None if it says nothing. Raises BrokenFileError."""
    config = read_json(model_dir / "config.json")
    found = (holder.get("quantization_config") for holder in (config, config.get("text_config") or {}))
    return next((it for it in found if it is not None), None)


def _require_countable_layers(config: ModelConfig, hf_config: Any, index: dict[str, TensorSlot]) -> None:
    """Raise UserError for more layers than anyone has weights of: a copy of them would be built for ever."""
    layers = getattr(hf_config.get_text_config(), "num_hidden_layers", 0)
    most = len(index) or MOST_LAYERS
    if isinstance(layers, int) and layers > most:
        problem = f"its config.json says {layers} layers, and there are {most} tensors at most; write the right number"
        raise UserError(_MODEL_KEY, config.name_or_path, problem)


def _compute_dtype(wanted: Dtype, hf_config: Any, index: dict[str, TensorSlot], device: torch.device) -> torch.dtype:
    if wanted == "auto":
        dtype = _checkpoint_dtype(hf_config, index)
        # DeepSpeed has no float16 on CPUs; float32 holds every float16 exactly
        return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype
    if wanted == "float16" and device.type == "cpu":
        raise UserError("model.dtype", wanted, "does not run on a CPU; write float32 or bfloat16")
    return DTYPES[wanted]


def _checkpoint_dtype(hf_config: Any, index: dict[str, TensorSlot]) -> torch.dtype:
    stated = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(), "dtype", None)
    if isinstance(stated, str):
        stated = DTYPES.get(stated)
    if isinstance(stated, torch.dtype) and stated in DTYPES.values():
        return stated
    # older checkpoints state none: their first floating tensor speaks for them
    held = next((slot.dtype for slot in index.values() if slot.dtype in DTYPES.values()), None)
    if held is None and not index:
        raise UserError("model.dtype", "auto", "config.json states no dtype and there are no weights; write one")
    if held is None:
        raise UserError(
            _MODEL_KEY, str(next(iter(index.values())).path.parent), "holds no float32, bfloat16 or float16"
        )
    return held


MODEL_FILE_PATTERNS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.codes",
    "*.tokenizer",
    "*.jinja",
    "*.py",
    "tokenizer*",
    "LICENSE*",
    "NOTICE*",
)
"""What of a model directory, beside its weights, a copy of the model needs."""


_UNLISTED = re.compile("[\n\r\\\\\ud800-\udfff]")
"""What a name in SHA256SUMS cannot have as it is: ends of lines, backslashes, bytes that are not UTF-8."""

_CHAT_TEMPLATES = "additional_chat_templates"  # the one subdirectory that transformers reads


def is_model_file(name: str) -> bool:
    """Whether a file of this name, relative to a model's directory, is one beside the weights that a copy needs."""
    directory, _, file_name = name.rpartition("/")
    return directory in ("", _CHAT_TEMPLATES) and (
        any(fnmatch(file_name, pattern) for pattern in MODEL_FILE_PATTERNS) and not name.endswith(".index.json")
    )


def model_files(model_dir: Path) -> list[str]:
    """The files beside the weights that a copy of the model needs, relative to its directory.

    Raises UserError for one that is a link out of the directory, since what it leads to would be copied, perhaps
    uploaded, and for one that cannot be copied: too large to belong beside weights, or of a name that SHA256SUMS cannot
    hold.
    """
    root = Path(os.path.realpath(model_dir))
    # of a hub cache, snapshots/<commit> links to the blobs beside it
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    names = _names_of_model_files(model_dir)
    for name in names:
        problem, target = None, Path(os.path.realpath(model_dir / name))
        if not any(target.is_relative_to(place) for place in inside):
            problem = f"{name} is a link out of it, to {target}; put a copy in the link's place"
        elif target.stat().st_size > MAX_JSON_BYTES:
            problem = f"{name} has more than {MAX_JSON_BYTES} bytes and would be copied; move it out of there"
        elif _UNLISTED.search(name):
            problem = f"the name of {name!r} cannot be written into a list of files; give it another"
        if problem is not None:
            raise UserError(_MODEL_KEY, str(model_dir), problem)
    return names


def _names_of_model_files(model_dir: Path) -> list[str]:
    return [
        name
        for directory in (model_dir, model_dir / _CHAT_TEMPLATES)
        for path in (sorted(directory.iterdir()) if directory.is_dir() else ())
        if is_model_file(name := path.relative_to(model_dir).as_posix()) and path.is_file()
    ]


def base_identity(directory: Path, index: Mapping[str, TensorSlot]) -> dict[str, str]:
    """Digests that change whenever what a run reads of a model directory may have: of `weights`, by their layout and
    their files' sizes and times, and by name of the files beside them, of which the data is made as well.

    Raises RunError for a file that cannot be read.
    """
    files: dict[Path, tuple[str, int, int]] = {}
    try:
        for slot in index.values():
            if slot.path not in files:
                stat = slot.path.stat()
                files[slot.path] = (slot.path.name, stat.st_size, stat.st_mtime_ns)
        names = _names_of_model_files(directory)
        # what is larger is never read
        beside = {name: directory / name for name in names if (directory / name).stat().st_size <= MAX_JSON_BYTES}
        digests = {name: sha256_of(path) for name, path in beside.items()}
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read ({error.strerror})") from error
    layout = [[name, str(slot.dtype), list(slot.shape), files[slot.path]] for name, slot in sorted(index.items())]
    return {"weights": hashlib.sha256(json.dumps(layout).encode()).hexdigest(), **digests}


def resolve_model_dir(name_or_path: str, revision: str | None = None, *, needs_weights: bool = True) -> Path:
    """The local directory of a model: the path as given, or the hub's snapshot of that id (downloaded if need be).

    Raises UserError when there is neither. Weights other than safetensors are never downloaded; without
    `needs_weights` the config alone is.
    """
    with blame(_MODEL_KEY, name_or_path, "is no path", "write a model directory or a hub id"):
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(_MODEL_KEY, name_or_path, "is a file; write the directory that holds it")
    try:
        snapshot = snapshot_download(
            name_or_path,
            revision=revision,
            allow_patterns=["*.safetensors", *MODEL_FILE_PATTERNS] if needs_weights else ["config.json", "*.py"],
            # vendors' own second copy of the weights, beside the one transformers reads
            ignore_patterns=["consolidated*.safetensors", "original/*"],
        )
    except HFValidationError as error:
        raise UserError(_MODEL_KEY, name_or_path, "is no directory; write a model directory or a hub id") from error
    except OSError as error:  # every error of the hub client is one: unknown id, no access, offline
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            _MODEL_KEY,
            name_or_path,
            f"is no local directory, and the hub has no such model within reach ({reason}); write one or the other",
        ) from error
    return Path(snapshot)


def read_checkpoint_index(model_dir: Path) -> dict[str, TensorSlot]:
    """Every tensor of a model directory, from the headers alone. Raises UserError for anything not whole."""
    with blame(_MODEL_KEY, str(model_dir), "its weights cannot be read", "write a model in safetensors files"):
        try:
            return scan_checkpoint(model_dir)
        except BrokenFileError as error:
            raise UserError(_MODEL_KEY, str(model_dir), str(error)) from error


WIDE_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def residual_dtype_of(dtype: torch.dtype, residual_dtype: str) -> torch.dtype:
    """What a checkpoint tensor's dtype becomes. All floating tensors follow `residual_dtype`, so that the model has one
    dtype; quantized and integer tensors stay as they are."""
    return dtype if residual_dtype == "auto" or dtype not in WIDE_FLOATS else getattr(torch, residual_dtype)


def factor_dtype(compute: torch.dtype, weight: Slot | None, residual_dtype: str) -> torch.dtype:
    """What a target's A0 and B0 are rounded to: the coarser of the compute dtype and its residual's. A quantized weight
    has no residual, nor one that the files hold under no name of its own."""
    residual = compute
    if weight is not None and not isinstance(weight, QuantizedSlot) and weight.dtype in WIDE_FLOATS:
        residual = residual_dtype_of(weight.dtype, residual_dtype)
    return max(compute, residual, key=lambda dtype: torch.finfo(dtype).eps)
