"""What the pipeline asks of a backend that holds the model, whole or in shards."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook

from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import BaseModel
from loraga_dist.model.blocks import Piece
from loraga_dist.model.conversion import require_found, stored_as
from loraga_dist.model.targets import Target
from loraga_dist.ranks.world import World
from loraga_dist.sharding.slices import part_of, square_norm, subtract_lowrank_


def pretrained(base: BaseModel) -> nn.Module:
    """`from_pretrained`, but a parameter the checkpoint lacks is an error instead of a random start."""
    model_class: Any = base.model_class
    model, loading = model_class.from_pretrained(
        base.directory, config=base.config, dtype=base.dtype, output_loading_info=True
    )
    require_found(sorted(loading["missing_keys"]))
    return model


def without_values(base: BaseModel) -> Any:
    """The model of the checkpoint's config, its weights tied; whoever asks for it fills the parameters."""
    from transformers.initialization import no_init_weights

    model_class: Any = base.model_class
    with no_init_weights():  # of a copy, as from_pretrained: it writes into the config
        model = model_class._from_config(copy.deepcopy(base.config), dtype=base.dtype)
    model.tie_weights()  # transformers leaves that out together with the initialization
    return model


def model_on_meta(base: BaseModel) -> Any:
    """The model of a config, its parameters on the meta device; buffers, also those of no file, are real."""

    def without_memory(module: nn.Module, name: str, parameter: Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(without_memory)
    try:
        return without_values(base)
    finally:
        hook.remove()


def wanted_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameters and buffers that a model's class wants in another dtype than the model's, as from_pretrained does."""
    return {
        name: wanted
        for part, wanted in reversed(model._get_dtype_plan(dtype).items())  # the first that fits is the last here
        for name, _ in [*model.named_parameters(), *model.named_buffers()]
        if re.search(part.replace("*", ".*"), name)
    }


@torch.no_grad()
def read_buffers(model: nn.Module, stored: Mapping[str, StoredTensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Read the buffers that the checkpoint holds; the others are the config's. Raises RunError on a short read.

    dtypes: of those that shall have another than they have.
    """
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{path}.{key}".removeprefix(".")
            module._buffers[key] = whole = buffer.to(dtypes.get(name, buffer.dtype))
            if name in stored:
                stored_as(name, whole.shape, stored).read_into(0, whole.view(-1))


def model_in_files(
    base: BaseModel,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    make: Callable[[StoredTensor, torch.dtype], Parameter],
) -> nn.Module:
    """The frozen model, in eval mode, with a parameter that `make` returns for each tensor, tied ones one; its buffers
    are read. Raises UserError for tensors of another shape than the config says."""
    model = model_on_meta(base)
    dtypes = wanted_dtypes(model, base.dtype)
    names = {parameter: name for name, parameter in model.named_parameters()}
    made: dict[Parameter, Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                name = names[parameter]
                tensor = stored_as(name, parameter.shape, stored)
                made[parameter] = make(tensor, dtypes.get(name) or parameter.dtype)
            module._parameters[key] = None if parameter is None else made[parameter]
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    read_buffers(model, stored, dtypes)
    return model.eval()


Change = Callable[[torch.Tensor, int], None]
"""change(elements, first): changes elements of a flattened parameter in place; `first` is the position of the first."""


class Sharding(ABC):
    """One model, held the backend's way.

    `hold` makes a piece of it whole for a while, `passing` each of several for its own forward; that is all that block
    order needs. Model order's backward runs between `attach` and `detach`.
    """

    is_sharded: bool
    """Whether a parameter's elements are spread over ranks."""
    stays_in_files: bool = False
    """Whether parameters are nowhere but in the checkpoint's files, unless they are held."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.num_bytes_read = 0
        """From files since loading, of parameters that stay there."""

    @abstractmethod
    def load(self, base: BaseModel, stored: Mapping[str, StoredTensor] | None) -> nn.Module:
        """The frozen pretrained model, in eval mode.

        stored: where its tensors lie, by its own names; None where transformers has to convert them.
        """

    @abstractmethod
    def hold(self, parameters: Iterable[Parameter], then: Iterable[Parameter] = ()) -> AbstractContextManager[None]:
        """These parameters are whole, on the device that computes, for the time of the context; a collective.

        then: those that will be held next, which may be fetched meanwhile. Contexts nest, of other parameters.
        """

    @contextmanager
    def passing(self, pieces: Iterable[Piece]) -> Iterator[None]:
        """The parameters of each of these pieces are whole while its module runs forward, without gradients; a
        collective then."""
        handles = []
        with ExitStack() as left_open:  # by a forward that raised

            def watch(module: nn.Module, parameters: Sequence[Parameter]) -> None:
                running: list[ExitStack] = []

                def begin(*_: Any) -> None:
                    running.append(left_open.enter_context(ExitStack()))
                    running[-1].enter_context(self.hold(parameters))

                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(lambda *_: running.pop().close()))

            for piece in pieces:
                watch(piece.module, piece.parameters)
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @abstractmethod
    def attach(self, model: nn.Module) -> nn.Module:
        """The module to call for forward and backward; its parameters must be frozen."""

    @abstractmethod
    def release(self) -> None:
        """Free what a backward left gathered; call after every microbatch."""

    @abstractmethod
    def detach(self) -> None:
        """Undo `attach`, so that the model can be changed or handed to a trainer."""

    @abstractmethod
    def weight_on(self, parameter: Parameter, target: Target, owner: int) -> torch.Tensor | None:
        """A target's matrix as it is stored in the parameter, on the rank `owner`; None on the others, which receive
        nothing. A collective."""

    @abstractmethod
    def own_slice(self, parameter: Parameter) -> tuple[torch.Tensor, int]:
        """This rank's elements of the flattened parameter as a writable 1-D view, and the position of the first."""

    @abstractmethod
    def new_parameters(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Modules built in this context hold their parameters the backend's way, from the start."""

    @torch.no_grad()
    def edit(self, parameter: Parameter, change: Change) -> None:
        """Change this rank's part of a parameter; no communication."""
        change(*self.own_slice(parameter))

    def subtract_lowrank(self, parameter: Parameter, target: Target, A_RN: torch.Tensor, B_MR: torch.Tensor) -> None:
        """W_MN -= scaling * B A on this rank's part of W; no communication."""

        def subtract(shard: torch.Tensor, start: int) -> None:
            subtract_lowrank_(*part_of(shard, start, target), target, A_RN, B_MR, target.scaling)

        self.edit(parameter, subtract)

    @torch.no_grad()
    def put(self, parameter: Parameter, full: torch.Tensor) -> None:
        """Overwrite a parameter with `full`, of which every rank has a copy; no communication."""
        shard, start = self.own_slice(parameter)
        shard.copy_(full.reshape(-1)[start : start + shard.numel()])

    @torch.no_grad()
    def square_norms(self, parameters: Sequence[tuple[Parameter, Sequence[Target]]]) -> torch.Tensor:
        """||W||_F^2 of every target of these parameters, one after the other, float64, by one collective."""
        own = [
            square_norm(part_of(*self.own_slice(parameter), target)[0])
            for parameter, targets in parameters
            for target in targets
        ]
        return self.world.sum_(torch.stack(own).to(self.world.device))
