"""A model whose blocks do nothing: its own forward says how every block is called, or turns a hidden state into logits.

Stubs take the place of the blocks' `forward`, so that the modules stay what they are and answer all that is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loraga_dist.data.microbatches import Microbatch
from loraga_dist.engines.home import StateHome
from loraga_dist.errors import LoragaError, unforeseen
from loraga_dist.gradients.forward import forward, forward_set

_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """How a block is called in one microbatch, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states, first argument or `hidden_states`, and the rest."""
        if args:
            return args[0], cls(args[1:], kwargs)
        return kwargs[_HIDDEN], cls((), {name: value for name, value in kwargs.items() if name != _HIDDEN})

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with other tensors."""
        return Call(tree_map_only(Tensor, change, self.args), tree_map_only(Tensor, change, self.kwargs))


@dataclass(frozen=True)
class Form:
    """What blocks return: hidden states, or a tuple that begins with them."""

    num_others: int | None
    """What else is in the tuple; None for no tuple."""

    @classmethod
    def of(cls, output: Any) -> Form:
        return cls(len(output) - 1 if isinstance(output, tuple) else None)

    def hidden(self, output: Any) -> Tensor:
        return output if self.num_others is None else output[0]

    def wrap(self, hidden: Tensor) -> Any:
        return hidden if self.num_others is None else (hidden, *[None] * self.num_others)


@dataclass(frozen=True)
class Entry:
    """What a model makes of a microbatch without its blocks."""

    hidden: Tensor
    """The first block's."""
    calls: list[Call]
    """Of every block."""
    early: list[str]
    """Modules that ran before the last block did."""


class OutOfTurn(Exception):
    """Blocks are called in another order than they have, or not each once."""


def why_not(step: Callable[[], str | None]) -> str | None:
    """Take a step that only a model in blocks can take. Returns what speaks against that, or keeps it from it."""
    try:
        return step()
    except (LoragaError, torch.OutOfMemoryError, MemoryError):
        raise
    except OutOfTurn:
        return "they are not called one after the other, each once"
    except Exception as error:  # whatever a model makes of stubs
        return f"it does not run without them: {unforeseen(error)}"


@contextmanager
def short_head(model: Any, num_tokens: int | None) -> Iterator[None]:
    """The model's head, if it has one, gets so many tokens of each sequence at most; None for all.

    What is between blocks and head gets all: GPT-2, for one, wants as many tokens back as it was given.
    """

    def shorten(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # of one token it is called contiguous as it is, and with those strides a product of bfloat16 copies the head
        return args[0][:, :num_tokens].clone(memory_format=torch.contiguous_format), *args[1:]

    with ExitStack() as hooks:
        if num_tokens is not None and (head := model.get_output_embeddings()) is not None:
            hooks.callback(head.register_forward_pre_hook(shorten, prepend=True).remove)
        yield


class Stubs:
    """Stands in for a model's blocks while `installed`."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._model = model
        self._blocks = blocks
        self._device = device
        self._home = StateHome(device, on_host=device.type != "cpu")
        self._own: list[Callable[..., Any]] = []
        self._on_block: Callable[[int, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self.form = Form(None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        self._own = [block.forward for block in self._blocks]
        with ExitStack() as exits:
            for index, block in enumerate(self._blocks):

                def stand_in(*args: Any, index: int = index, **kwargs: Any) -> Any:
                    assert self._on_block is not None, "the model runs through stubs alone"
                    return self._on_block(index, args, kwargs)

                exits.enter_context(forward_set(block, stand_in))
            yield

    def run_block(self, index: int, hidden: Tensor, call: Call) -> Any:
        """The block itself."""
        call = call.map(self._home.fetch)
        return self._own[index](hidden, *call.args, **call.kwargs)

    def run(
        self,
        microbatch: Microbatch,
        on_block: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
        num_tokens: int | None = None,
    ) -> torch.Tensor:
        """The model's logits, with this in place of its blocks.

        num_tokens: of so many tokens of each sequence at most, where the model has a head.
        """
        before, self._on_block = self._on_block, on_block
        try:
            with short_head(self._model, num_tokens):
                return forward(self._model, microbatch, self._device)
        finally:
            self._on_block = before

    def enter(self, microbatch: Microbatch, behind: Mapping[str, nn.Module], num_tokens: int | None = None) -> Entry:
        """See what the model makes of its inputs.

        behind: modules that run after the blocks only, or so it seems. num_tokens: that have to go through the head.
        """
        entries: list[Tensor] = []
        calls: list[Call] = []
        early: set[str] = set()
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # blocks share tables and masks
        held = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                # a parameter's memory is another's once it is held no more
                own = tensor.detach().clone() if tensor.untyped_storage().data_ptr() in held else tensor.detach()
                kept[id(tensor)] = tensor, self._home.keep(own)
            return kept[id(tensor)][1]

        def on_block(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index != len(calls):
                raise OutOfTurn
            hidden, call = Call.split(args, kwargs)
            entries.append(hidden)
            calls.append(call.map(keep))
            return self.form.wrap(hidden)

        def note(*_: Any, name: str) -> None:
            if len(calls) < len(self._blocks):
                early.add(name)

        with ExitStack() as hooks:
            for name, module in behind.items():
                hooks.callback(module.register_forward_pre_hook(functools.partial(note, name=name)).remove)
            self.run(microbatch, on_block, num_tokens)
        if len(calls) < len(self._blocks):
            raise OutOfTurn
        return Entry(entries[0], calls, sorted(early))

    def leave(self, microbatch: Microbatch, hidden: Tensor) -> torch.Tensor:
        """The logits of these hidden states after the last block."""

        def on_block(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.form.wrap(hidden if index == len(self._blocks) - 1 else Call.split(args, kwargs)[0])

        return self.run(microbatch, on_block)
