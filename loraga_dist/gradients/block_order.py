"""Block order: every block is held once forward and once backward, and takes all microbatches of a chunk meanwhile.

    enter     the model's own forward with stubs for blocks: the first block's input, and how each block is called
    forward   block by block, keeping what goes in
    leave     the model's own forward with stubs, the last of which returns what was kept: logits, loss, its gradient
    backward  block by block, the last first, each run again with a graph from its kept input; taps show x and dy

The first microbatch of all goes through the model's own forward, which holds the blocks for the others on its way: so
it is known, at no gather, that blocks are called as the stubs recorded and that the loss is the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from loraga_dist.data.losses import Loss
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.experts import Sink, experts_tapped
from loraga_dist.gradients.head import Head
from loraga_dist.gradients.kept import Keeping, KeptInputs
from loraga_dist.gradients.observer import require_all_seen
from loraga_dist.gradients.route import Route, Take
from loraga_dist.gradients.stubs import Call, Form, Stubs, why_not
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.blocks import Blocks
from loraga_dist.model.stacks import modules_of
from loraga_dist.ranks.memory import return_freed_memory
from loraga_dist.sharding.base import Sharding


class NotInBlocks(Exception):
    """The model is not the sequence of blocks it seemed to be; says why. On all ranks alike, before anything is shown
    to a sink."""


@dataclass(frozen=True, kw_only=True)
class OnWay:
    """What is called on the way."""

    pause: Callable[[], None]
    """Between blocks, where nothing is half done."""
    advance: Callable[[], object]
    """After each block's forward of a microbatch."""


class BlockOrder(Route):
    """See the module's docstring.

    targets: all that will be asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        loss: Loss,
        *,
        targets: Sequence[str],
        sharding: Sharding,
        keeping: Keeping,
        on_way: OnWay,
    ) -> None:
        self._model = model
        self._blocks = blocks.of(model)
        self._sharding = sharding
        self._on_way = on_way
        self._top = blocks.count
        """The stage after all blocks."""
        inside = [blocks.index_of(name) for name in targets]
        self._lowest = min((index for index in inside if index is not None), default=self._top)
        self._stage_of = dict(zip(targets, (self._top if index is None else index for index in inside), strict=True))
        self._behind = modules_of(model, [name for name, at in self._stage_of.items() if at == self._top])
        in_blocks = {id(parameter) for block in self._blocks for parameter in block.parameters()}
        self._outside = [parameter for parameter in model.parameters() if id(parameter) not in in_blocks]
        self._stubs = Stubs(model, self._blocks, sharding.world.device)
        self._by_token = loss.by_token
        self._head = Head(model, self._stubs, loss)
        self._kept = KeptInputs(keeping.directory, sharding.world.device)
        self._trusted = False
        self._chunk: tuple[int, ...] = ()
        """Numbers of the microbatches that are on their way."""
        self._stage = self._top
        self._calls: list[list[Call]] = []
        self._losses: dict[int, Tensor] = {}
        self._upper: dict[int, Tensor] = {}
        """Gradients at the output of this stage, by microbatch; at the top there are none."""
        self._lower: dict[int, Tensor] = {}
        """Gradients at its input, as far as they are known."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        training = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            # experts multiply alike in every forward, so that a block gives what it gave
            with self._kept, ExitStack() as self._held, self._stubs.installed(), experts_tapped(self._model):
                yield
        finally:
            for module, mode in training.items():
                module.training = mode

    @contextmanager
    def showing(self, chunk: Sequence[Microbatch], names: Sequence[str], sink: Sink) -> Iterator[Take]:
        (stage,) = {self._stage_of[name] for name in names}
        numbers = tuple(microbatch.index for microbatch in chunk)
        if self._chunk != numbers or stage > self._stage:
            self._begin(chunk)
            self._chunk = numbers
        self._descend(stage, chunk)
        position = {microbatch.index: at for at, microbatch in enumerate(chunk)}

        def take(microbatch: Microbatch) -> Tensor:
            self._backward(microbatch, position[microbatch.index])
            return_freed_memory()
            return self._losses[position[microbatch.index]]

        with tapped(self._model, names, sink, checkpointing="none"):
            yield take

    def _begin(self, chunk: Sequence[Microbatch]) -> None:
        """Forward, and the losses; the outside parameters stay held for the backward of the top stage."""
        self._held.close()
        self._kept.clear()
        self._upper, self._lower, self._losses, self._stage = {}, {}, {}, self._top
        self._held.enter_context(self._sharding.hold(self._outside, then=self._blocks[0].parameters()))
        with torch.no_grad():
            if self._trusted:
                self._enter(chunk)
                for index in range(self._top):
                    with self._holding(index, index + 1):
                        for at in range(len(chunk)):
                            self._forward(index, at)
                    self._on_way.pause()
            else:
                with _called(self._model, self._stage_of) as called:
                    logits = self._forward_driven(chunk)
                require_all_seen(list(self._stage_of), called, self._sharding.world)
                hidden = self._kept.get(self._top, 0)
                self._agree(lambda: self._head.difference(chunk[0], hidden, logits))
                self._trusted = True
                del logits, hidden
        for at, microbatch in enumerate(chunk):
            self._backward(microbatch, at)

    def _enter(self, chunk: Sequence[Microbatch]) -> str | None:
        """Keep the first block's inputs, and how blocks are called; what speaks against going by blocks."""
        self._calls = []
        for at, microbatch in enumerate(chunk):
            # nobody reads these logits, which are large
            entry = self._stubs.enter(microbatch, self._behind, 1 if self._by_token else None)
            if entry.early:
                return f"the target {entry.early[0]} runs before the last of them"
            self._kept.put(0, at, entry.hidden)
            self._calls.append(entry.calls)
        return None

    def _forward(self, index: int, at: int) -> None:
        self._keep(index + 1, at, self._stubs.run_block(index, self._kept.get(index, at), self._calls[at][index]))

    def _keep(self, index: int, at: int, output: Any) -> None:
        """What the block before this one gave."""
        self._kept.put(index, at, self._stubs.form.hidden(output))
        return_freed_memory()
        self._on_way.advance()

    def _forward_driven(self, chunk: Sequence[Microbatch]) -> Tensor:
        """The same, driven by the first microbatch in the model's own forward; its logits."""

        def on_block(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            outputs: list[Any] = []

            def step() -> str | None:
                hidden, call = Call.split(args, kwargs)
                output, has_other_inputs = self._drive(index, hidden, call)
                outputs.append(output)
                if index == 0:
                    self._stubs.form = Form.of(output)
                    if (reason := self._enter(chunk)) is not None:
                        return reason
                if not (_same(self._calls[0][index], call) and _same(self._kept.get(index, 0), hidden)):
                    return f"block {index} is given what only running the blocks before it makes"
                for at in range(len(chunk)):
                    if at:
                        output, has_other_inputs = self._drive(index, self._kept.get(index, at), self._calls[at][index])
                    if has_other_inputs:
                        return f"block {index} uses what a block before it left behind"
                    self._keep(index + 1, at, output)
                return None

            with self._holding(index, index + 1):
                self._agree(step)
            self._on_way.pause()
            return outputs[0]

        return self._stubs.run(chunk[0], on_block, self._head.tokens_at_once(chunk[0]))

    def _drive(self, index: int, hidden: Tensor, call: Call) -> tuple[Any, bool]:
        """A block's output, and whether it has inputs that it was not called with: a graph knows."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = self._stubs.run_block(index, leaf, call)
        return tree_map_only(Tensor, Tensor.detach, output), any(
            source is not leaf and not isinstance(source, nn.Parameter)
            for tensor in tree_flatten(output)[0]
            if isinstance(tensor, Tensor)
            for source in _sources(tensor)
        )

    def _agree(self, step: Callable[[], str | None]) -> None:
        """Take a step of a model in blocks. Raises NotInBlocks on all ranks if on one something speaks against it."""
        for of_rank in self._sharding.world.all_json(why_not(step)):
            if of_rank is not None:
                raise NotInBlocks(f"{type(self._model).__name__} is no sequence of its blocks; {of_rank}")

    def _backward(self, microbatch: Microbatch, at: int) -> None:
        """One microbatch through the stage that is held."""
        if self._stage == self._top:
            self._losses[at], self._lower[at] = self._head.backward(microbatch, self._kept.get(self._top, at))
            return
        hidden = self._kept.get(self._stage, at).detach()
        wanted = self._stage > self._lowest and at not in self._lower
        hidden.requires_grad_(wanted)
        with torch.enable_grad():
            output = self._stubs.run_block(self._stage, hidden, self._calls[at][self._stage])
            output = self._stubs.form.hidden(output)
            if output.requires_grad:  # else none of the targets took part in this microbatch
                output.backward(self._upper[at])
        if wanted:
            assert hidden.grad is not None, "a block's output depends on its input"
            self._lower[at] = hidden.grad

    def _descend(self, stage: int, chunk: Sequence[Microbatch]) -> None:
        """Bring the gradients of all microbatches down to the output of a stage, and hold it."""
        while self._stage > stage:
            for at, microbatch in enumerate(chunk):
                if at not in self._lower:  # no target of this stage was asked for
                    self._backward(microbatch, at)
            self._held.close()
            self._kept.drop(self._stage)
            self._upper, self._lower = self._lower, {}
            self._stage -= 1
            self._on_way.pause()
            self._held.enter_context(self._holding(self._stage, self._stage - 1 if self._stage > self._lowest else -1))

    def _holding(self, index: int, then: int) -> AbstractContextManager[None]:
        following = self._blocks[then].parameters() if 0 <= then < self._top else ()
        return self._sharding.hold(self._blocks[index].parameters(), then=following)


@contextmanager
def _called(model: nn.Module, names: Iterable[str]) -> Iterator[set[str]]:
    """Which of these modules run, while the context lasts."""
    called: set[str] = set()
    with ExitStack() as hooks:
        of_module: dict[nn.Module, list[str]] = {}
        for name, module in modules_of(model, names).items():
            of_module.setdefault(module, []).append(name)
        for module, own in of_module.items():
            handle = module.register_forward_pre_hook(lambda *_, own=own: called.update(own))
            hooks.callback(handle.remove)
        yield called


def _sources(result: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward from a result would end at."""
    seen, left = set(), [result.grad_fn]
    while left:
        if (node := left.pop()) is None or node in seen:
            continue
        seen.add(node)
        if (source := getattr(node, "variable", None)) is not None:
            yield source
        left += [following for following, _ in node.next_functions]


def _same(one: Any, other: Any) -> bool:
    """Whether two trees have equal tensors, NaNs included, and equal plain values in the same places."""
    (ours, structure), (theirs, other_structure) = (
        tree_flatten(vars(tree) if isinstance(tree, Call) else tree) for tree in (one, other)
    )
    return structure == other_structure and all(map(_same_leaf, ours, theirs))


def _same_leaf(mine: Any, its: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(its, Tensor):
        return (mine.shape, mine.dtype) == (its.shape, its.dtype) and bool(
            ((mine == its.to(mine.device)) | (mine != mine)).all()
        )
    if type(mine) is not type(its):
        return False
    return mine == its if isinstance(mine, int | float | str) else True
