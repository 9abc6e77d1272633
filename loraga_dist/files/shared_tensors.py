"""Tensors that several ranks hold, as one set of safetensors files with an index, laid out like model checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from loraga_dist.files.safetensors_io import SafetensorsWriter, write_index
from loraga_dist.ranks.world import World


def write_shared_tensors(directory: Path, stem: str, tensors: Mapping[str, Tensor], world: World) -> None:
    """Each rank writes its own tensors (contiguous, on the host) to one file, rank 0 the index; a collective.

    `safetensors_io.scan_checkpoint(directory, stem)` finds them. Raises RunError when a file cannot be written.
    """
    name, num_bytes = f"{stem}-{world.rank + 1:05d}-of-{world.size:05d}.safetensors", 0
    with world.together():
        if tensors:
            widest_first = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
            entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in widest_first.items()}
            with SafetensorsWriter(directory / name, entries) as writer:
                for key, tensor in widest_first.items():
                    writer.append(key, tensor)
            num_bytes = writer.num_bytes
    files = world.all_json((name, num_bytes, list(tensors)))
    with world.together():
        if world.is_main:
            weight_map = {key: name for name, _, keys in files for key in keys}
            write_index(directory, stem, weight_map, sum(num_bytes for _, num_bytes, _ in files))
