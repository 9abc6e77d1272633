"""The residual base W_res = W - s B0 A0, streamed from the base checkpoint in bounded memory."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from loraga_dist.artifacts.adapter import FactorSource
from loraga_dist.artifacts.names import MODEL_CONFIG, MODEL_STEM
from loraga_dist.config import InitConfig
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checksums import OnBytes, TensorDigest, no_progress
from loraga_dist.files.parallel import over_cores
from loraga_dist.files.safetensors_io import SafetensorsWriter, TensorSlot, as_bytes, dtype_name, read_range, read_rows
from loraga_dist.model.base import MODEL_FILE_PATTERNS, residual_dtype_of
from loraga_dist.model.targets import Target
from loraga_dist.schemes import SCHEMES

CHUNK_ELEMENTS = 2**20
"""Elements handled at once. 8 MiB of float64 stay in the cache; larger chunks were up to twice as slow."""

MAX_SHARD_BYTES = 5 * 10**9

_CHAT_TEMPLATES = "additional_chat_templates"  # the one subdirectory that transformers reads


@dataclass(frozen=True)
class PlannedFile:
    """One weight file to write: its tensors in order."""

    name: str
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.entries.values())


def writes_residual(config: InitConfig) -> bool:
    """Whether the output gets a `residual_base/`: asked for, and the scheme changes the base."""
    return config.output.residual_base == "full" and SCHEMES[config.init.scheme].changes_base


def num_residual_bytes(index: Mapping[str, TensorSlot], residual_dtype: str) -> int:
    """Of the tensors of a `residual_base/`."""
    return sum(slot.numel * residual_dtype_of(slot.dtype, residual_dtype).itemsize for slot in index.values())


def plan_residual_files(
    index: Mapping[str, TensorSlot], residual_dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[PlannedFile]:
    """Split the checkpoint's tensors over files as transformers would. residual_dtype: as `output.residual_dtype`."""
    split = split_state_dict_into_shards_factory(
        dict(index),
        get_storage_size=lambda slot: slot.numel * residual_dtype_of(slot.dtype, residual_dtype).itemsize,
        filename_pattern=MODEL_STEM + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    files = []
    for name, keys in split.filename_to_tensors.items():
        entries = {key: (residual_dtype_of(index[key].dtype, residual_dtype), index[key].shape) for key in keys}
        # widest first keeps every tensor aligned to its own size, as the format's own writer does
        files.append(PlannedFile(name, dict(sorted(entries.items(), key=lambda item: -item[1][0].itemsize))))
    return files


def write_residual_files(
    files: Iterable[PlannedFile],
    index: Mapping[str, TensorSlot],
    targets: Iterable[Target],
    adapter: FactorSource,
    destination: Path,
    on_progress: OnBytes = no_progress,
    magnitudes: Callable[[str], Tensor] | None = None,
) -> dict[str, tuple[TensorDigest, TensorDigest]]:
    """Write these files; returns key -> (digest of the base tensor, digest of the residual tensor).

    Targets become W - s B0 A0 with the factors as stored, in float64, then cast to the planned dtype; others are copied
    byte for byte or cast. on_progress: told of bytes written. magnitudes: target name -> (M,), the norms that the
    weights of its outputs are given before the cast. Raises UserError when a value does not fit the dtype.
    """
    target_of = {target.weight_key: target for target in targets}
    digests = {}
    for file in files:
        with SafetensorsWriter(destination / file.name, file.entries) as writer:
            for key, (dtype, shape) in file.entries.items():
                base_digest, residual_digest = hashlib.sha256(), hashlib.sha256()
                for base, residual in _residual_chunks(index[key], dtype, target_of.get(key), adapter, magnitudes):
                    writer.append(key, residual)
                    base_digest.update(as_bytes(base))
                    residual_digest.update(as_bytes(residual))
                    on_progress(residual.nbytes)
                digests[key] = (
                    TensorDigest(dtype_name(index[key].dtype), shape, base_digest.hexdigest()),
                    TensorDigest(dtype_name(dtype), shape, residual_digest.hexdigest()),
                )
    return digests


def write_model(
    model_dir: Path,
    index: Mapping[str, TensorSlot],
    targets: Sequence[Target],
    adapter: FactorSource,
    destination: Path,
    residual_dtype: str = "auto",
    replaced: Mapping[str, TensorSlot] = MappingProxyType({}),
    on_progress: OnBytes = no_progress,
    magnitudes: Callable[[str], Tensor] | None = None,
) -> dict[str, tuple[TensorDigest, TensorDigest]]:
    """A whole model directory W - s B A from one process, as `write_residual_files` writes it, on all cores.

    replaced: tensors that take the place of the checkpoint's under their keys, in the checkpoint's dtypes.
    """
    files = plan_residual_files(index, residual_dtype)
    sources = {**index, **replaced}
    digests = {}
    for part in over_cores(
        lambda file: write_residual_files([file], sources, targets, adapter, destination, on_progress, magnitudes),
        files,
    ):
        digests |= part
    finish_residual_base(model_dir, destination, files, residual_dtype)
    return digests


def digest_base(
    index: Mapping[str, TensorSlot], keys: Iterable[str], on_progress: OnBytes = no_progress
) -> dict[str, TensorDigest]:
    """The digests of these checkpoint tensors. on_progress: told of bytes read."""

    def digest_of(key: str) -> tuple[str, TensorDigest]:
        slot, digest = index[key], hashlib.sha256()
        for start, end in chunks(slot.numel, CHUNK_ELEMENTS):
            chunk = as_bytes(read_range(slot, start, end))
            digest.update(chunk)
            on_progress(len(chunk))
        return key, TensorDigest(dtype_name(slot.dtype), slot.shape, digest.hexdigest())

    return dict(over_cores(digest_of, keys))


def finish_residual_base(model_dir: Path, destination: Path, files: Sequence[PlannedFile], residual_dtype: str) -> None:
    """What one rank writes beside the weights: the index, config.json, tokenizer, chat templates, custom code."""
    try:
        destination.mkdir(parents=True, exist_ok=True)
        _copy_model_files(model_dir, destination)
        _copy_model_files(model_dir / _CHAT_TEMPLATES, destination / _CHAT_TEMPLATES)
        if residual_dtype != "auto":
            config_path = destination / MODEL_CONFIG
            _write_json(config_path, _with_dtype(json.loads(config_path.read_bytes()), residual_dtype))
        if len(files) > 1:
            _write_json(
                destination / f"{MODEL_STEM}.safetensors.index.json",
                {
                    "metadata": {"total_size": sum(file.num_bytes for file in files)},
                    "weight_map": {key: file.name for file in files for key in file.entries},
                },
            )
    except OSError as error:
        raise RunError(f"{error.filename or destination} cannot be written ({error.strerror})") from error


def subtract_offset(target: Target, weight_rows: Tensor, A_RN: Tensor, B_MR: Tensor, row0: int) -> Tensor:
    """W - s B A in float64, for the rows of the stored weight that start at `row0`; factors in float64."""
    left, right = (A_RN.T, B_MR.T) if target.transposed else (B_MR, A_RN)
    rows = slice(row0, row0 + len(weight_rows))
    return weight_rows.to(torch.float64, copy=True).addmm_(left[rows], right, alpha=-target.scaling)


def output_norms(slot: TensorSlot, target: Target, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """||.|| over the inputs of every output, (M,) in float64: of W - s B A, or of W where no A_RN, B_MR are given."""
    squares_M = torch.zeros(target.M, dtype=torch.float64)
    A_RN, B_MR = (None, None) if factors is None else (factor.double() for factor in factors)
    for row0, row1 in chunks(slot.shape[0], rows_per_chunk(target)):
        rows = read_rows(slot, row0, row1)
        if A_RN is None or B_MR is None:
            squares = rows.to(torch.float64, copy=True).square_()
        else:
            squares = subtract_offset(target, rows, A_RN, B_MR, row0).square_()
        if target.transposed:
            squares_M += squares.sum(dim=0)
        else:
            squares_M[row0:row1] = squares.sum(dim=1)
    return squares_M.sqrt_()


def start_magnitudes(slot: TensorSlot, target: Target, A_RN: Tensor, B_MR: Tensor, *, changes_base: bool) -> Tensor:
    """DoRA's magnitudes (M,), float64, with which it starts as the plain adapter would: the norms of W_res + s B A.

    That is the original W where the base became W - s B A, and W + s B A on an unchanged base. slot: of W. Raises
    UserError for an output whose weights are all zero, or not finite: DoRA divides by these norms.
    """
    if changes_base:
        norms_M = output_norms(slot, target)
    else:
        norms_M = output_norms(slot, replace(target, scaling=-target.scaling), (A_RN, B_MR))
    if not (norms_M.isfinite().all() and (norms_M > 0).all()):
        problem = f"{slot.name} has an output whose weights are zero or not finite, and DoRA divides by their norm"
        raise UserError("lora.use_dora", True, f"{problem}; write false, or add {target.name} to lora.exclude_modules")
    return norms_M


def chunks(length: int, step: int) -> Iterator[tuple[int, int]]:
    """[0, length) in pieces of at most `step`."""
    for start in range(0, length, step):
        yield start, min(start + step, length)


def rows_per_chunk(target: Target) -> int:
    """Rows of a target's stored weight that make one chunk."""
    return max(1, CHUNK_ELEMENTS // target.stored_shape[1])


def _residual_chunks(
    slot: TensorSlot,
    dtype: torch.dtype,
    target: Target | None,
    adapter: FactorSource,
    magnitudes: Callable[[str], Tensor] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    if target is None:
        for start, end in chunks(slot.numel, CHUNK_ELEMENTS):
            base = read_range(slot, start, end)
            yield base, _cast(base, dtype, slot.name)
        return
    assert slot.shape == target.stored_shape, (slot, target)
    A_RN, B_MR = (factor.double() for factor in adapter.factors(target.name))
    times_M = None
    if magnitudes is not None:
        times_M = magnitudes(target.name).double() / output_norms(slot, target, (A_RN, B_MR))
    for row0, row1 in chunks(slot.shape[0], rows_per_chunk(target)):
        base = read_rows(slot, row0, row1)
        changed = subtract_offset(target, base, A_RN, B_MR, row0)
        if times_M is not None:
            changed *= times_M if target.transposed else times_M[row0:row1, None]
        yield base, _cast(changed, dtype, slot.name)


def _cast(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    if values.dtype == dtype:
        return values
    cast = values.to(dtype)
    # one cheap pass finds that all is finite; the dear comparison is for weights that hold infinities themselves
    all_finite = torch.stack(cast.aminmax()).isfinite().all()
    if not all_finite and not torch.equal(cast.isfinite(), values.isfinite()):
        shown = str(dtype).removeprefix("torch.")
        raise UserError("output.residual_dtype", shown, f"cannot hold values of {key}; write bfloat16 or float32")
    return cast


def _copy_model_files(source: Path, destination: Path) -> None:
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in MODEL_FILE_PATTERNS)
        if wanted and path.is_file() and not path.name.endswith(".index.json"):
            destination.mkdir(exist_ok=True)
            shutil.copyfile(path, destination / path.name)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The model config with this dtype, its sub-configs' included, under the name that transformers writes today."""
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict) and value.keys() & {"dtype", "torch_dtype"}:
            config[key] = _with_dtype(value, dtype)
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
