"""One process that holds the whole model; needs neither DeepSpeed nor a launcher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import Parameter

from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import BaseModel
from loraga_dist.model.blocks import Piece
from loraga_dist.model.targets import Target
from loraga_dist.sharding.base import Sharding, model_in_files, pretrained
from loraga_dist.sharding.slices import elements_of, part_of


class SingleProcess(Sharding):
    is_sharded = False

    def load(self, base: BaseModel, stored: Mapping[str, StoredTensor] | None) -> nn.Module:
        if base.quantization is None:
            return pretrained(base).to(self.world.device).requires_grad_(False).eval()
        assert stored is not None, "quantized weights that have to be converted are refused before"

        def make(tensor: StoredTensor, dtype: torch.dtype) -> Parameter:
            whole = torch.empty(tensor.shape, dtype=dtype, device=self.world.device)
            tensor.read_into(0, whole.view(-1))
            return Parameter(whole, requires_grad=False)

        return model_in_files(base, stored, self.world.device, make)

    def attach(self, model: nn.Module) -> nn.Module:
        return model

    def release(self) -> None:
        return None

    def detach(self) -> None:
        return None

    @contextmanager
    def hold(self, parameters: Iterable[Parameter], then: Iterable[Parameter] = ()) -> Iterator[None]:
        yield

    @contextmanager
    def passing(self, pieces: Iterable[Piece]) -> Iterator[None]:
        yield

    def weight_on(self, parameter: Parameter, target: Target, owner: int) -> torch.Tensor | None:
        return part_of(elements_of(parameter), 0, target)[0].view(target.parameter_shape)

    def own_slice(self, parameter: Parameter) -> tuple[torch.Tensor, int]:
        return elements_of(parameter), 0

    @contextmanager
    def new_parameters(self, dtype: torch.dtype) -> Iterator[None]:
        yield
