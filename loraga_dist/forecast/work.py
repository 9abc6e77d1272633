"""What a plan does: flops of all ranks, and bytes that travel between them, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from loraga_dist.engines import ENGINES, Matrix
from loraga_dist.forecast.calibration import Course, Setting
from loraga_dist.model.plan import Plan
from loraga_dist.model.shape import ModelShape
from loraga_dist.request.request import USUAL_LENGTHS


@dataclass(frozen=True, kw_only=True)
class Work:
    """Flops of all ranks together, and bytes that each rank receives, over the whole calibration."""

    flops: dict[str, int]
    traffic_bytes_per_rank: dict[str, int]


class Search(NamedTuple):
    """Forwards over some data, to find the length of a step."""

    num_tokens: int
    microbatches_per_rank: int


@dataclass(frozen=True, kw_only=True)
class DataTaken:
    """What calibration takes of the data."""

    num_tokens: int
    refine_passes: int = 0
    """Of engines that refine."""
    moment_share: float = 1.0
    """Of the tokens, what moments of inputs are summed over; neighbours share an input, which no shape says, so that
    their work is the most it may be."""
    search: Search | None = None


class _Run(NamedTuple):
    """Some microbatches on their way through the model and back."""

    flops_per_token: int
    gathered_numel: int
    """Of one microbatch in model order, of one chunk in block order."""


def work(
    plan: Plan, shape: ModelShape, setting: Setting, course: Course, taken: DataTaken, *, recomputes: bool
) -> Work:
    """Matrix products of the model and of the engines; attention scores are left out.

    Per token: forward 2 flops an entry, backward (towards inputs; weights are frozen) the same, and what is computed
    again once more. Weights are gathered for that, and for the forwards whose logits are compared.

    recomputes: in model order blocks are computed again in backward.
    """
    num_tokens = taken.num_tokens

    def passes_of(matrix: Matrix) -> int:
        return 1 + taken.refine_passes if ENGINES[matrix.engine].refines else 1

    flops_per_token = gathered = 0
    if plan.order.blocks is None:
        through = _through_model(shape, recomputes=recomputes)
        passes = sum(max(passes_of(matrix) for group in sweep for matrix in group) for sweep in course.sweeps)
        flops_per_token += passes * through.flops_per_token
        gathered += passes * course.num_microbatches * through.gathered_numel
    else:
        for num_chunks, groups in _runs(plan, course, passes_of):
            through = _through_blocks(plan, shape, groups)
            flops_per_token += through.flops_per_token
            gathered += num_chunks * through.gathered_numel
    pairs = [(ENGINES[matrix.engine], matrix) for matrix in plan.matrices.values()]
    of_engines = sum(
        matrix.expected_rows(num_tokens) * engine.flops_per_token(matrix) * passes_of(matrix)
        + int(taken.moment_share * matrix.expected_rows(num_tokens)) * matrix.moment_flops_per_token
        for engine, matrix in pairs
    )
    collectives = sum(
        engine.traffic_bytes(matrix, course.num_microbatches, taken.refine_passes) for engine, matrix in pairs
    )
    collectives += sum(2 * matrix.moment_bytes for _, matrix in pairs)
    # each of these weights goes to its owner once
    to_owners = sum(t.M * t.N for t in plan.targets) / setting.world_size if plan.scheme.source == "weight" else 0
    # the model's logits, those of its other rounding, and the start's
    num_compared = 3 if plan.scheme.changes_base and shape.dtype != torch.float32 else 2
    away = 1 - 1 / setting.world_size
    flops = {"model": num_tokens * flops_per_token, "engine": of_engines}
    searched = {}
    if (search := taken.search) is not None:
        flops["model"] += USUAL_LENGTHS * search.num_tokens * 2 * shape.linear_numel
        forwards = USUAL_LENGTHS * search.microbatches_per_rank
        searched = {"step searched": int(away * forwards * sum(shape.numels) * shape.num_bytes_each)}
    return Work(
        flops=flops,
        traffic_bytes_per_rank={
            "weights gathered": int(away * (gathered + to_owners) * shape.num_bytes_each),
            "logits compared": int(away * num_compared * sum(shape.numels) * shape.num_bytes_each),
            **searched,
            "gradients and bases": int(away * collectives),
            "A and B": int(away * sum(target.adapter_bytes for target in plan.targets)),
        },
    )


def _runs(plan: Plan, course: Course, passes_of: Callable[[Matrix], int]) -> list[tuple[int, list[Sequence[Matrix]]]]:
    """Each run of the data through the blocks: in how many chunks, and the groups it is shown. A single chunk stays, as
    long as it is to go down."""

    def stage(group: Sequence[Matrix]) -> int:
        return plan.order.stage_of(group[0].name)

    runs: list[tuple[int, list[Sequence[Matrix]]]] = []
    for number, sweep in enumerate(course.sweeps):
        passes = [(group, max(map(passes_of, group))) for group in sweep]
        for done in range(max(count for _, count in passes)):
            groups = [group for group, count in passes if count > done]
            num_chunks = course.num_chunks if number or done else course.num_first_chunks
            if num_chunks == 1 and runs and runs[-1][0] == 1 and stage(groups[0]) <= stage(runs[-1][1][-1]):
                runs[-1][1].extend(groups)
            else:
                runs.append((num_chunks, groups))
    return runs


def _through_model(shape: ModelShape, *, recomputes: bool) -> _Run:
    return _Run(
        flops_per_token=2 * (2 * shape.linear_numel + recomputes * shape.block_linear_numel),
        gathered_numel=2 * sum(shape.numels) + recomputes * shape.block_numel - shape.embedding_numel,
    )


def _through_blocks(plan: Plan, shape: ModelShape, groups: Sequence[Sequence[Matrix]]) -> _Run:
    """Forward, the loss and its gradient, and back to the lowest of these groups; a block that has several of them is
    run again for each."""
    stages = Counter(plan.order.stage_of(group[0].name) for group in groups)
    linear, top = shape.linear_numels_of_blocks, len(shape.linear_numels_of_blocks)
    after_blocks = shape.linear_numel - sum(linear)
    back = range(min(stages), top)
    again = sum(linear[stage] * max(1, stages[stage]) for stage in back)
    return _Run(
        flops_per_token=2 * (sum(linear) + 2 * after_blocks * (1 + stages[top]) + 2 * again),
        gathered_numel=sum(shape.numels) + sum(shape.numels_of_blocks[stage] for stage in back),
    )
