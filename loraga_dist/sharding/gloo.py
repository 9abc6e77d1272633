"""An all-gather for gloo without the second copy of the result that its own makes and fills.

256 MiB over two ranks: 0.12 s and no more memory, against 0.61 s and 256 MiB (docs/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Works:
    """Several collectives to wait for as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def all_gather_in_place(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Works | None:
    """`torch.distributed.all_gather_into_tensor` by one broadcast per rank, straight into its part of the output."""
    parts = output_tensor.view(-1).chunk(dist.get_world_size(group))
    parts[dist.get_rank(group)].copy_(input_tensor.view(-1))
    works = _Works(
        [dist.broadcast(part, group=group, group_src=source, async_op=True) for source, part in enumerate(parts)]
    )
    if async_op:
        return works
    works.wait()
    return None
