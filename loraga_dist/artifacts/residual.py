"""The residual base W_res = W - s B0 A0, streamed from the base checkpoint in bounded memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from loraga_dist.artifacts.names import MODEL_CONFIG, MODEL_STEM
from loraga_dist.artifacts.tensors import Region, num_bytes_of, read_chunks, regions_by_key, weight_chunks
from loraga_dist.errors import UserError
from loraga_dist.files.checksums import OnBytes, TensorDigest, no_progress
from loraga_dist.files.disk import MAX_JSON_BYTES, json_text, naming_write_errors, parse_json, read_bounded
from loraga_dist.files.parallel import over_cores
from loraga_dist.files.safetensors_io import Entries, SafetensorsWriter, TensorSlot, as_bytes, dtype_name, write_index
from loraga_dist.files.stored_tensors import Slot, entries_of
from loraga_dist.model.base import model_files, residual_dtype_of
from loraga_dist.model.targets import Target

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class PlannedFile:
    """One weight file to write: its tensors in order."""

    name: str
    entries: Entries

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.entries.values())


def residual_entries(base: Entries, residual_dtype: str) -> Entries:
    """Dtypes and shapes of a `residual_base/`, by checkpoint key. residual_dtype: as `output.residual_dtype`."""
    return {key: (residual_dtype_of(dtype, residual_dtype), shape) for key, (dtype, shape) in base.items()}


def plan_model_files(entries: Entries, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[PlannedFile]:
    """Split a model's tensors over files as transformers would."""
    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: num_bytes_of([entry]),
        filename_pattern=MODEL_STEM + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    # widest first keeps every tensor aligned to its own size, as the format's own writer does
    return [
        PlannedFile(name, {key: entries[key] for key in sorted(keys, key=lambda key: -entries[key][0].itemsize)})
        for name, keys in split.filename_to_tensors.items()
    ]


def write_residual_file(
    file: PlannedFile,
    index: Mapping[str, TensorSlot],
    targets: Iterable[Target],
    factors: Callable[[Target], tuple[Tensor, Tensor]],
    destination: Path,
    on_progress: OnBytes = no_progress,
    magnitudes: Callable[[str], Tensor] | None = None,
) -> dict[str, tuple[TensorDigest, TensorDigest]]:
    """Write one weight file; returns key -> (digest of the base tensor, digest of the residual tensor).

    Targets become W - s B A in float64, then cast to the planned dtype; others are copied byte for byte or cast.
    factors: target -> A_RN, B_MR. on_progress: told of bytes written. magnitudes: target name -> (M,), the norms that
    the weights of its outputs are given before the cast. Raises UserError when a value does not fit the dtype.
    """
    regions = regions_by_key(targets)
    digests = {}
    with SafetensorsWriter(destination / file.name, file.entries) as writer:
        for key, (dtype, shape) in file.entries.items():
            base_digest, residual_digest = hashlib.sha256(), hashlib.sha256()
            for base, residual in _residual_chunks(index, key, dtype, regions.get(key), factors, magnitudes):
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
    factors: Callable[[Target], tuple[Tensor, Tensor]],
    destination: Path,
    residual_dtype: str = "auto",
    replaced: Mapping[str, TensorSlot] = MappingProxyType({}),
    on_progress: OnBytes = no_progress,
    magnitudes: Callable[[str], Tensor] | None = None,
) -> dict[str, tuple[TensorDigest, TensorDigest]]:
    """A whole model directory W - s B A from one process, as `write_residual_file` writes it, on all cores.

    replaced: tensors that take the place of the checkpoint's under their keys, in the checkpoint's dtypes.
    Nine parameters, because `materialize-base`, `rebuild` and a merging `convert` differ in the last four.
    """
    files = plan_model_files(residual_entries(entries_of(index), residual_dtype))
    sources = {**index, **replaced}
    digests = {}
    for part in over_cores(
        lambda file: write_residual_file(file, sources, targets, factors, destination, on_progress, magnitudes), files
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
        for elements in read_chunks(slot):
            digest.update(as_bytes(elements))
            on_progress(elements.nbytes)
        return key, TensorDigest(dtype_name(slot.dtype), slot.shape, digest.hexdigest())

    return dict(over_cores(digest_of, keys))


def finish_residual_base(model_dir: Path, destination: Path, files: Sequence[PlannedFile], residual_dtype: str) -> None:
    """What one rank writes beside the weights: the index, config.json, tokenizer, chat templates, custom code."""
    with naming_write_errors(destination):
        for name, content in _read_model_files(model_dir, residual_dtype):
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            (destination / name).write_bytes(content)
    if len(files) > 1:
        weight_map = {key: file.name for file in files for key in file.entries}
        write_index(destination, MODEL_STEM, weight_map, sum(file.num_bytes for file in files))


def digest_model_files(model_dir: Path, residual_dtype: str) -> dict[str, str]:
    """SHA-256 of every file that `finish_residual_base` writes, but for the index; raises RunError."""
    files = _read_model_files(model_dir, residual_dtype)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files}


def _read_model_files(model_dir: Path, residual_dtype: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of what stands beside the weights; config.json says the dtype that they are cast to."""
    for name in model_files(model_dir):
        content = read_bounded(model_dir / name, MAX_JSON_BYTES)
        if name == MODEL_CONFIG and residual_dtype != "auto":
            content = json_text(_with_dtype(parse_json(content, name), residual_dtype)).encode()
        yield name, content


def subtract_offset(target: Target, weight_rows: Tensor, A_RN: Tensor, B_MR: Tensor, row0: int) -> Tensor:
    """W - s B A in float64, for the rows of the stored weight that start at `row0`; factors in float64."""
    left, right = (A_RN.T, B_MR.T) if target.stored_transposed else (B_MR, A_RN)
    rows = slice(row0, row0 + len(weight_rows))
    return weight_rows.to(torch.float64, copy=True).addmm_(left[rows], right, alpha=-target.scaling)


def output_norms(index: Mapping[str, Slot], target: Target, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """||.|| over the inputs of every output, (M,) in float64: of W - s B A, or of W where no A_RN, B_MR are given."""
    squares_M = torch.zeros(target.M, dtype=torch.float64)
    as_float64 = factors and (factors[0].double(), factors[1].double())
    for row0, rows in weight_chunks(target, index):
        changed = subtract_offset(target, rows, *as_float64, row0) if as_float64 else rows.to(torch.float64, copy=True)
        squares = changed.square_()
        if target.stored_transposed:
            squares_M += squares.sum(dim=0)
        else:
            squares_M[row0 : row0 + len(rows)] = squares.sum(dim=1)
    return squares_M.sqrt_()


def start_magnitudes(index: Mapping[str, Slot], target: Target, added: tuple[Tensor, Tensor] | None) -> Tensor:
    """DoRA's magnitudes (M,), float64, with which it starts as the plain adapter would: the norms of W_res + s B A.

    added: A_RN, B_MR on an unchanged base, which make it W + s B A; None where the base became W - s B A, so that it is
    the original W. index: of the checkpoint. Raises UserError for an output whose weights are all zero, or not finite:
    DoRA divides by these norms.
    """
    norms_M = output_norms(index, replace(target, scaling=-target.scaling), added)
    if not (norms_M.isfinite().all() and (norms_M > 0).all()):
        problem = f"{target.weight_key} has an output whose weights are zero or not finite: DoRA divides by their norm"
        raise UserError("lora.use_dora", True, f"{problem}; write false, or add {target.name} to lora.exclude_modules")
    return norms_M


def _residual_chunks(
    index: Mapping[str, TensorSlot],
    key: str,
    dtype: torch.dtype,
    regions: Sequence[Region] | None,
    factors: Callable[[Target], tuple[Tensor, Tensor]],
    magnitudes: Callable[[str], Tensor] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    slot = index[key]
    if regions is None:
        for base in read_chunks(slot):
            yield base, _cast(base, dtype, slot.name)
        return
    assert sum(region.rows.count for region in regions) == math.prod(slot.shape[:-1]), (slot, regions)
    for region in regions:
        target = region.target
        A_RN, B_MR = (factor.double() for factor in factors(target))
        times_M = None
        if magnitudes is not None:
            times_M = magnitudes(target.name).double() / output_norms(index, target, (A_RN, B_MR))
        for row0, (base,) in region.chunks(slot):
            changed = subtract_offset(target, base, A_RN, B_MR, row0)
            if times_M is not None:
                changed *= times_M if target.stored_transposed else times_M[row0 : row0 + len(base), None]
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


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The model config with this dtype, its sub-configs' included, under the name that transformers writes today."""
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict) and value.keys() & {"dtype", "torch_dtype"}:
            config[key] = _with_dtype(value, dtype)
    return config
