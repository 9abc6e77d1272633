"""Ways to go through a model: what may be done with a request, from the cheapest to the one that needs least memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from loraga_dist.config import Checkpointing, GradientConfig
from loraga_dist.gradients.kept import Keeping
from loraga_dist.model.blocks import MODEL_ORDER, Order, choose_order
from loraga_dist.request.request import CheckpointRequest
from loraga_dist.sharding.settings import Holding

MARGIN = 0.1
"""The plan may be off by this share: below 1 - MARGIN of the memory it fits, above 1 + MARGIN it cannot."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How calibration goes through the model."""

    order: Order
    checkpointing: Checkpointing
    """Of model order; never `auto`."""
    from_disk: bool = False
    """Weights stay in the checkpoint's files, and are read a piece at a time."""
    keeping: Keeping = Keeping()
    """Of block order."""

    @property
    def all_keeping(self) -> Keeping:
        """`keeping`, and whether model order computes blocks again."""
        return replace(self.keeping, recomputes=self.checkpointing == "non_reentrant")

    @property
    def title(self) -> str:
        where = " from disk" if self.from_disk else ""
        if self.order.blocks is not None:
            return f"block order{where}"
        recomputed = ", blocks recomputed" if self.checkpointing == "non_reentrant" else ""
        return f"{'weights' if self.from_disk else 'model order'}{recomputed}{where}"


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that one rank may take; None where that is not known."""

    device_bytes: float | None = None
    """Of what computes: a GPU's memory, or the host's."""
    host_bytes: float | None = None
    """Beside a GPU."""
    files_bytes: float | None = None
    """Of the directory that would take what is kept between blocks."""

    @classmethod
    def least(cls, rooms: Iterable[Mapping[str, float | None]]) -> Self:
        """What all ranks have; of each its `vars`."""
        rooms = list(rooms)

        def of_all(key: str) -> float | None:
            known = [room[key] for room in rooms]
            return min((each for each in known if each is not None), default=None)

        return cls(**{key: of_all(key) for key in rooms[0]})


Verdict = Literal["fits", "tight", "too large"]


def verdict(peak_bytes: float, limit_bytes: float | None) -> Verdict:
    """`fits`, `tight` (the plan is not exact enough to say) or `too large`."""
    if limit_bytes is None or peak_bytes <= (1 - MARGIN) * limit_bytes:
        return "fits"
    return "tight" if peak_bytes <= (1 + MARGIN) * limit_bytes else "too large"


def ways(request: CheckpointRequest, world_size: int) -> Iterator[Way]:
    """All that the user's settings allow, in order of cost. Raises UserError where they allow none."""
    gradient, holding = request.config.gradient, Holding.of(request.config.deepspeed, world_size)
    is_whole = not holding.is_sharded
    if request.saved_order is not None:
        first = in_pieces = request.saved_order
    elif request.scheme.source == "gradient":
        names = [target.name for target in request.targets]
        model_class = request.base.model_class.__name__
        first, in_pieces = (
            choose_order(gradient.order, model_class, request.blocks, names, in_pieces=sharded)
            for sharded in (holding.is_sharded, True)
        )
    else:
        first = in_pieces = MODEL_ORDER
    if first.blocks is None:
        for checkpointing in _checkpointings(gradient, in_pieces, is_whole=is_whole):
            yield Way(order=first, checkpointing=checkpointing)
    if in_pieces.blocks is not None:
        if is_whole and first.blocks is None:
            in_pieces = replace(in_pieces, why="the activations of the whole model have no room")
        yield Way(order=in_pieces, checkpointing="none")
    in_blocks = in_pieces.blocks if request.scheme.source == "gradient" else request.blocks
    # a configuration alone says nothing of its files
    if is_whole and in_blocks is not None and (request.stored.as_it_is is not None or not request.base.index):
        if in_pieces.blocks is not None:
            in_pieces = replace(in_pieces, why="the model has no room, and a block is read once for all microbatches")
        yield Way(order=in_pieces, checkpointing="none", from_disk=True)


def _checkpointings(gradient: GradientConfig, in_pieces: Order, *, is_whole: bool) -> list[Checkpointing]:
    """Of model order: recomputing costs a forward more, and so does block order, which needs less memory."""
    if gradient.checkpointing != "auto":
        return [gradient.checkpointing]
    return [
        *(["none"] if is_whole else []),
        *(["non_reentrant"] if in_pieces.blocks is None else []),
    ]
