"""Weights that a checkpoint holds quantized: which of its tensors belong together, and the numbers they stand for.

Each is read as a plain tensor would be, any range of elements of it, so that nobody else knows the formats.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraga_dist.errors import UserError
from loraga_dist.files.safetensors_io import TensorSlot, dtype_name, read_range, read_rows

_ELEMENTS_AT_A_TIME = 1 << 22
"""16 MiB in float32; of formats whose smallest piece is larger, that."""


@dataclass(frozen=True, kw_only=True)
class QuantizedSlot(ABC):
    """Where a weight's parts lie. To all that reads it is a tensor of floats, row-major as the model has it."""

    name: str
    """The key that the weight would have as floats."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The model's; it is read in any other as well."""
    parts: Mapping[str, TensorSlot]
    """Its tensors, by the ends of their names."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """In the files."""
        return sum(part.num_bytes for part in self.parts.values())

    @property
    def path(self) -> Path:
        return next(iter(self.parts.values())).path

    @property
    @abstractmethod
    def unit(self) -> int:
        """Elements that are dequantized together; the last ones may be fewer."""

    @abstractmethod
    def values(self, first: int, past: int, dtype: torch.dtype) -> Tensor:
        """Units [first, past) in a new tensor on the CPU, as transformers dequantizes them to a dtype."""

    def fill(self, start: int, elements: Tensor) -> None:
        """As TensorSlot's."""
        units_at_a_time = max(1, _ELEMENTS_AT_A_TIME // self.unit)
        while elements.numel():
            first = start // self.unit
            past = min(first + units_at_a_time, -(-(start + elements.numel()) // self.unit))
            found = self.values(first, past, elements.dtype).flatten()[start - first * self.unit :]
            part, elements = elements[: found.numel()], elements[found.numel() :]
            part.copy_(found[: part.numel()])
            start += part.numel()


Find = Callable[[Mapping[str, TensorSlot], Mapping[str, Any], torch.dtype], Iterator[QuantizedSlot]]


def dequantized(
    index: Mapping[str, TensorSlot], quantization: Mapping[str, Any] | None, dtype: torch.dtype
) -> dict[str, TensorSlot | QuantizedSlot]:
    """The tensors of a checkpoint as if it held floats.

    quantization: `quantization_config` of its config.json. dtype: the model's.
    Raises UserError for a format that is not known, or whose package is not installed.
    """
    if quantization is None:
        return dict(index)
    method: str = quantization.get("quant_method", "")
    if method not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise _unreadable(method, f"is how the checkpoint is quantized, and what can be read is {known}")
    package, find = _FORMATS[method]
    if importlib.util.find_spec(package) is None:
        problem = f"is how the checkpoint is quantized, and {package} is not installed"
        raise UserError("model.name_or_path", method, f"{problem}; pip install {package.replace('_', '-')}")
    found = list(find(index, quantization, dtype))
    taken = {part.name for slot in found for part in slot.parts.values()}
    for key, slot in index.items():
        if key not in taken and slot.dtype.itemsize == 1 and slot.dtype.is_floating_point:
            raise _unreadable(key, f"is stored as {dtype_name(slot.dtype)}, and no scale of it is known")
    return {key: slot for key, slot in index.items() if key not in taken} | {slot.name: slot for slot in found}


def _unreadable(value: Any, problem: str) -> UserError:
    return UserError("model.name_or_path", value, f"{problem}; write a checkpoint in floating point")


@dataclass(frozen=True, kw_only=True)
class _BlockScaled(QuantizedSlot):
    """Floats of 8 bits, or pairs of 4, with a scale for each block of rows and columns; of a stack each its own.

    transformers takes blocks for equal, and refuses the ragged ones of DeepSeek-V3.
    """

    block: tuple[int, int]

    @property
    def unit(self) -> int:
        return self.shape[-1]

    def values(self, first: int, past: int, dtype: torch.dtype) -> Tensor:
        weight, scale, (M, N) = self.parts["weight"], self.parts["scale"], self.shape[-2:]
        down, across = _grid(scale)
        rows = torch.arange(first, past)
        scale_rows = rows // M * down + rows % M // self.block[0]
        begin, end = int(scale_rows[0]), int(scale_rows[-1]) + 1
        scales = _powers(_rows(scale, begin, end, across))[scale_rows - begin]
        codes = _rows(weight, first, past, weight.shape[-1]).view(torch.uint8).flatten().int()
        # torch casts from 8 bits seven times as slowly
        floats = _meanings(weight.dtype).index_select(0, codes).view(torch.float32).view(-1, N)
        whole, rest = divmod(N, self.block[1])
        floats[:, : N - rest].unflatten(1, (whole, self.block[1])).mul_(scales[:, :whole, None])
        floats[:, N - rest :].mul_(scales[:, whole:])
        return floats.to(dtype)


def _find_block_scaled(
    index: Mapping[str, TensorSlot], quantization: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedSlot]:
    stated = quantization.get("weight_block_size")
    for key, weight in index.items():
        module = key.removesuffix(".weight")
        names = (f"{key}_scale_inv", f"{key}_scale", f"{module}.scale", f"{module}.qscale_weight")
        scale = next((index[name] for name in names if name in index), None)
        if scale is None or weight.dtype.itemsize != 1 or len(weight.shape) < 2:
            continue
        *outer, width = weight.shape
        shape = (*outer, width if weight.dtype.is_floating_point else 2 * width)
        block = _block(shape, scale, stated)
        parts = {"weight": weight, "scale": scale}
        yield _BlockScaled(name=key, shape=shape, dtype=dtype, parts=parts, block=block)


def _block(shape: tuple[int, ...], scale: TensorSlot, stated: Sequence[int] | None) -> tuple[int, int]:
    """Rows and columns to a scale: those of the configuration, or where they do not fit equal shares."""
    (M, N), (down, across) = shape[-2:], _grid(scale)
    if scale.numel == math.prod(shape[:-2]) * down * across:
        for rows, columns in (stated or (M, N), (M // max(1, down), N // max(1, across))):
            if rows and columns and (-(-M // rows), -(-N // columns)) == (down, across):
                return rows, columns
    raise _unreadable(scale.name, f"has shape {scale.shape}, which are no blocks of a weight of shape {shape}")


def _grid(scale: TensorSlot) -> tuple[int, int]:
    """Blocks of one matrix, down and across."""
    return (scale.shape[-2], scale.shape[-1]) if len(scale.shape) > 1 else (1, 1)


def _rows(slot: TensorSlot, first: int, past: int, width: int) -> Tensor:
    return read_range(slot, first * width, past * width).view(past - first, width)


def _powers(scales: Tensor) -> Tensor:
    """In float32; bytes are exponents."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def _meanings(dtype: torch.dtype) -> Tensor:
    """What every byte is: a float32, or two of them beside each other in what looks like a float64."""
    from transformers.integrations.mxfp4 import FP4_VALUES

    codes = torch.arange(256, dtype=torch.uint8)
    if dtype.is_floating_point:
        return codes.view(dtype).float()
    return torch.tensor(FP4_VALUES)[torch.stack([codes & 15, codes >> 4], dim=1).int()].view(torch.float64).flatten()


@dataclass(frozen=True, kw_only=True)
class _Transposed(QuantizedSlot):
    """Matrices that lie the other way round in memory."""

    stored: _BlockScaled

    @property
    def unit(self) -> int:
        return math.prod(self.shape[1:])

    def values(self, first: int, past: int, dtype: torch.dtype) -> Tensor:
        _, M, N = self.stored.shape
        whole = torch.empty(past - first, N, M, dtype=dtype)
        for one, other in zip(whole, self.stored.values(first * M, past * M, dtype).view(-1, M, N), strict=True):
            one.copy_(other.t())  # of matrices torch does that in blocks, of stacks element by element
        return whole


def _find_mxfp4(
    index: Mapping[str, TensorSlot], quantization: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedSlot]:
    for key, blocks in index.items():
        name = key.removesuffix("_blocks")
        scale = index.get(f"{name}_scales")
        if name != key and scale is not None:
            E, M, num_blocks, num_bytes = blocks.shape
            N, block = 2 * num_bytes * num_blocks, (1, 2 * num_bytes)
            parts = {"weight": replace(blocks, shape=(E, M, num_bytes * num_blocks)), "scale": scale}
            stored = _BlockScaled(name=name, shape=(E, M, N), dtype=dtype, parts=parts, block=block)
            yield _Transposed(name=name, shape=(E, N, M), dtype=dtype, parts=parts, stored=stored)


@dataclass(frozen=True, kw_only=True)
class _Bnb4bit(QuantizedSlot):
    """Blocks of the flattened weight share a maximum; with double quantization blocks of these share one again."""

    facts: Mapping[str, Any]
    """What bitsandbytes packs into a tensor: shape, type, sizes of blocks."""

    @property
    def unit(self) -> int:
        return self.facts["blocksize"] * self._maxima

    @property
    def _maxima(self) -> int:
        """Of a unit."""
        return self.facts.get("nested_blocksize", 1)

    def values(self, first: int, past: int, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        past_element = min(past * self.unit, self.numel)
        weight, count = self.parts["weight"], past_element - first * self.unit
        per_code = self.numel // weight.numel  # codes may be packed into wider floats, for FSDP
        packed = read_range(weight, first * self.unit // per_code, past_element // per_code)
        state: dict[str, Any] = {**self.facts, "shape": [count]}
        for name, units_of in (("absmax", self._maxima), ("nested_absmax", 1)):
            if name in self.parts:
                part = self.parts[name]
                state[name] = read_range(part, first * units_of, min(past * units_of, part.numel))
        for name in ("quant_map", "nested_quant_map"):
            if name in self.parts:
                state[name] = self.parts[name].read()
        return dequantize_4bit(packed.view(torch.uint8), QuantState.from_dict(state, torch.device("cpu"))).to(dtype)


@dataclass(frozen=True, kw_only=True)
class _Bnb8bit(QuantizedSlot):
    """Every row has a scale."""

    @property
    def unit(self) -> int:
        return self.shape[1]

    def values(self, first: int, past: int, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        codes, scales = (read_rows(self.parts[part], first, past) for part in ("weight", "SCB"))
        return int8_vectorwise_dequant(codes, scales).to(dtype)


def _find_bitsandbytes(
    index: Mapping[str, TensorSlot], quantization: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedSlot]:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.utils import unpack_tensor_to_dict

    for key, weight in index.items():
        module = key.removesuffix("weight")
        if f"{module}SCB" in index and module != key:
            parts = {name: index[module + name] for name in ("weight", "SCB")}
            yield _Bnb8bit(name=key, shape=weight.shape, dtype=dtype, parts=parts)
        packed = [f"{key}.quant_state.{kind}" for kind in QuantState.valid_qs_type_keys]
        for facts in (unpack_tensor_to_dict(index[name].read()) for name in packed if name in index):
            names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            parts = {name: index[f"{key}.{name}"] for name in names if f"{key}.{name}" in index}
            parts["weight"] = weight
            yield _Bnb4bit(name=key, shape=tuple(facts["shape"]), dtype=dtype, parts=parts, facts=facts)


@dataclass(frozen=True, kw_only=True)
class _Compressed(QuantizedSlot):
    """What compressed-tensors decompresses: here some rows at a time, since no scale is of more than a few."""

    scheme: Any
    compressor: Any

    @property
    def unit(self) -> int:
        return self._rows_per_unit * self.shape[1]

    @property
    def _is_packed(self) -> bool:
        return "weight_packed" in self.parts

    @property
    def _rows_per_unit(self) -> int:
        """That no block of scales and no word of packed zero points is cut."""
        if self.scheme.weights.block_structure is not None:
            return self.scheme.weights.block_structure[0]
        return 32 if self._is_packed and "weight_zero_point" in self.parts else 1

    def values(self, first: int, past: int, dtype: torch.dtype) -> Tensor:
        begin = first * self._rows_per_unit
        end = min(past * self._rows_per_unit, self.shape[0])
        state = {}
        for name, part in self.parts.items():
            if name == "weight_shape":
                state[name] = torch.tensor([end - begin, self.shape[1]])
            elif part.numel == 1:
                state[name] = part.read()
            elif part.shape[0] == self.shape[0]:
                state[name] = read_rows(part, begin, end)
            else:
                per_unit = self.scheme.weights.num_bits if self._is_packed else 1
                state[name] = read_rows(part, first * per_unit, min(past * per_unit, part.shape[0]))
        return self.compressor.decompress(state, self.scheme)["weight"].to(dtype)


def _find_compressed(
    index: Mapping[str, TensorSlot], quantization: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedSlot]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if quantization.get("transform_config") or sparsity != "dense":
        raise _unreadable("config.json", "transforms or thins out the quantized weights")
    config = QuantizationConfig.model_validate(
        {key: value for key, value in quantization.items() if key in QuantizationConfig.model_fields}
    )
    schemes: list[Any] = list(config.config_groups.values())
    linear = torch.nn.Linear(1, 1, device="meta")
    for key in index:
        module, _, end = key.rpartition(".")
        if end not in ("weight", "weight_packed") or f"{module}.weight_scale" not in index:
            continue
        fitting = schemes if len(schemes) == 1 else [it for it in schemes if is_match(module, linear, it.targets)]
        if not fitting or f"{module}.weight_g_idx" in index:
            problem = "has its columns in another order" if fitting else "is of no group of quantization_config"
            raise _unreadable(key, problem)
        scheme = fitting[0]
        compressor: Any = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        names = [name for name in compressor.compression_param_names(scheme) if name.startswith("weight")]
        parts = {name: index[f"{module}.{name}"] for name in names if f"{module}.{name}" in index}
        M, width = index[key].shape
        if end == "weight_packed":
            bits = 8 * index[key].dtype.itemsize
            width = width * bits // scheme.weights.num_bits
        name = f"{module}.weight"
        yield _Compressed(name=name, shape=(M, width), dtype=dtype, parts=parts, scheme=scheme, compressor=compressor)


_FORMATS: dict[str, tuple[str, Find]] = {
    "fp8": ("transformers", _find_block_scaled),
    "mxfp4": ("transformers", _find_mxfp4),
    "bitsandbytes": ("bitsandbytes", _find_bitsandbytes),
    "compressed-tensors": ("compressed_tensors", _find_compressed),
}
"""By what config.json calls them: the package that dequantizes, and what finds the weights."""
