"""One process that leaves the frozen weights in the checkpoint's files and reads pieces of the model as they are held.

A held piece lies in one buffer, whose memory later ones take again. There are as many buffers as pieces held and read
ahead at one time, none larger than the largest piece.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn
from torch.nn import Parameter

from loraga_dist.errors import UserError
from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import BaseModel
from loraga_dist.model.targets import Target
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import Change, Sharding, model_in_files
from loraga_dist.sharding.slices import elements_of, part_of, square_norm

_ALIGNMENT_BYTES = 64
"""As torch allots memory: products of matrices elsewhere may be rounded another way."""


@dataclass(frozen=True)
class _Piece:
    """Parameters on their way from the files to a buffer."""

    wholes: Mapping[Parameter, torch.Tensor]
    """Views of the buffer."""
    buffer: torch.Tensor
    reading: Future[None]

    def is_of(self, parameters: Sequence[Parameter]) -> bool:
        return list(map(id, self.wholes)) == list(map(id, parameters))


class FromDisk(Sharding):
    """Parameters of the checkpoint are held as they are in its files, with the edits made to them since."""

    is_sharded = False
    stays_in_files = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._stored: dict[Parameter, StoredTensor] = {}
        self._edits: defaultdict[Parameter, list[Change]] = defaultdict(list)
        self._held: set[Parameter] = set()
        self._ahead: _Piece | None = None
        self._free: list[torch.Tensor] = []

    def load(self, base: BaseModel, stored: Mapping[str, StoredTensor] | None) -> nn.Module:
        """The model with parameters that have dtype, shape and device, but no memory.

        Raises UserError where tensors would have to be converted, or have another shape than the config says.
        """
        if stored is None:
            problem = "transformers has to convert its tensors, all of them in memory; write a copy that it saved"
            raise UserError("model.name_or_path", str(base.directory), problem)

        def make(tensor: StoredTensor, dtype: torch.dtype) -> Parameter:
            one = torch.empty((), dtype=dtype, device=self.world.device)
            parameter = Parameter(one.expand(tensor.shape), requires_grad=False)
            self._stored[parameter] = tensor
            return parameter

        return model_in_files(base, stored, self.world.device, make)

    @contextmanager
    def hold(self, parameters: Iterable[Parameter], then: Iterable[Parameter] = ()) -> Iterator[None]:
        """As Sharding's; raises RunError when a file has become shorter.

        Parameters that are not the checkpoint's, or are held already, tied ones for instance, are left alone.
        """
        wanted = [parameter for parameter in self._of_checkpoint(parameters) if parameter not in self._held]
        if self._ahead is not None and self._ahead.is_of(wanted):
            piece, self._ahead = self._ahead, None
        else:
            piece = self._begin(wanted)
        empty = {parameter: parameter.data for parameter in wanted}
        self._held.update(wanted)
        try:
            piece.reading.result()
            self._read_ahead(self._of_checkpoint(then))
            for parameter, whole in piece.wholes.items():
                parameter.data = whole.to(self.world.device)
                self._edit_whole(parameter)
            yield
        finally:
            for parameter, nothing in empty.items():
                parameter.data = nothing
            self._held.difference_update(wanted)
            self._recycle(piece)

    @torch.no_grad()
    def _edit_whole(self, parameter: Parameter) -> None:
        # not by the thread that read it ahead: an edit may have come since, and one thread rounds as the others do
        for change in self._edits.get(parameter, ()):
            change(parameter.data.view(-1), 0)

    def _of_checkpoint(self, parameters: Iterable[Parameter]) -> list[Parameter]:
        """Those of the checkpoint, each once."""
        return list(dict.fromkeys(parameter for parameter in parameters if parameter in self._stored))

    def _read_ahead(self, parameters: Sequence[Parameter]) -> None:
        if not parameters or self._ahead is not None and self._ahead.is_of(parameters):
            return
        superseded, self._ahead = self._ahead, None
        if superseded is not None:
            self._recycle(superseded)
        self._ahead = self._begin(parameters)

    def _begin(self, parameters: Sequence[Parameter]) -> _Piece:
        """Have a thread read them; it ends with that."""
        places, num_bytes = [], 0
        for parameter in parameters:
            end = num_bytes + parameter.numel() * parameter.dtype.itemsize
            places.append(slice(num_bytes, end))
            num_bytes = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        buffer = self._buffer(num_bytes)
        wholes = {
            parameter: buffer[place].view(parameter.dtype).view(parameter.shape)
            for parameter, place in zip(parameters, places, strict=True)
        }
        tensors = [self._stored[parameter] for parameter in parameters]
        self.num_bytes_read += sum(tensor.num_bytes for tensor in tensors)
        thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        reading = thread.submit(_read_all, tensors, list(wholes.values()))
        thread.shutdown(wait=False)
        return _Piece(wholes, buffer, reading)

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        """The smallest free one that is large enough, or a new one in the place of the largest."""
        self._free.sort(key=torch.Tensor.numel)
        for index, buffer in enumerate(self._free):
            if buffer.numel() >= num_bytes:
                return self._free.pop(index)
        del self._free[-1:]
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _recycle(self, piece: _Piece) -> None:
        wait([piece.reading])  # an interrupt may have come before its end
        self._free.append(piece.buffer)

    @torch.no_grad()
    def edit(self, parameter: Parameter, change: Change) -> None:
        """As Sharding's; of a parameter of the checkpoint the change is kept, and made whenever it is held."""
        assert parameter not in self._held, "a held parameter would not show it"
        if parameter in self._stored:
            self._edits[parameter].append(change)
        else:
            super().edit(parameter, change)

    def weight_on(self, parameter: Parameter, target: Target, owner: int) -> torch.Tensor | None:
        with self.hold([parameter]):
            return part_of(parameter.detach().view(-1), 0, target)[0].view(target.parameter_shape).clone()

    def own_slice(self, parameter: Parameter) -> tuple[torch.Tensor, int]:
        """As Sharding's, of a parameter that is not the checkpoint's."""
        assert parameter not in self._stored, "it has no memory to write to"
        return elements_of(parameter), 0

    def square_norms(self, parameters: Sequence[tuple[Parameter, Sequence[Target]]]) -> torch.Tensor:
        squares = []
        for index, (parameter, targets) in enumerate(parameters):
            following = [after for after, _ in parameters[index + 1 : index + 2]]
            with self.hold([parameter], then=following):
                elements = parameter.detach().view(-1)
                squares += [square_norm(part_of(elements, 0, target)[0]) for target in targets]
        return torch.stack(squares)

    @contextmanager
    def new_parameters(self, dtype: torch.dtype) -> Iterator[None]:
        yield

    def attach(self, model: nn.Module) -> NoReturn:
        raise AssertionError("of a model on disk there is block order alone")

    def release(self) -> None:
        return None

    def detach(self) -> None:
        return None


def _read_all(tensors: Sequence[StoredTensor], wholes: Sequence[torch.Tensor]) -> None:
    """Read tensors into memory of their shapes, cast where it is of another dtype. Raises RunError on a short read."""
    for tensor, whole in zip(tensors, wholes, strict=True):
        tensor.read_into(0, whole.view(-1))
